"""What products exist: categories, their attributes and values, and the families drawn from them.

A family is a base product and a few look-alikes, each one attribute away from the base.
"""

import dataclasses
import random
from collections.abc import Mapping

# What a listing's photo can show of a colour name: sRGB, 0..255.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (42, 42, 46),
    "white": (242, 241, 236),
    "grey": (146, 148, 152),
    "navy": (30, 42, 96),
    "blue": (52, 108, 200),
    "teal": (22, 134, 132),
    "green": (50, 142, 74),
    "olive": (116, 114, 56),
    "yellow": (238, 198, 56),
    "orange": (232, 122, 40),
    "red": (206, 40, 46),
    "burgundy": (116, 26, 50),
    "pink": (238, 150, 176),
    "purple": (112, 66, 154),
    "beige": (214, 194, 158),
    "brown": (118, 76, 46),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "floral", "zigzag")
BRANDS = (
    *("Marlow", "Aster", "Kestrel", "Norrvik", "Lumio", "Oakfield", "Belmar", "Tindra"),
    *("Casa Vela", "Pinewood", "Harrow", "Solenne", "Mika & Co", "Fjordline", "Arden", "Quill"),
    *("Rosetti", "Bergen", "Nomad", "Everly", "Tamsin", "Dorado", "Clarke", "Yuna"),
)
FAMILY_SIZES = (4, 4, 5, 6)
# How often look-alikes differ in an attribute, an ordinary one being 1.
VARIANT_ODDS = {"color": 3.5, "pattern": 3.0, "material": 2.0}
HIDDEN_ODDS = 0.5
LISTINGS_PER_PRODUCT = (2, 4, 5, 5, 6, 6)


@dataclasses.dataclass(frozen=True)
class Category:
    """One kind of product: where a shop files it, and each attribute's possible values.

    hidden: the attributes that no photo shows; sellers write them or nobody knows.
    """

    path: str
    values: Mapping[str, tuple[str, ...]]
    hidden: frozenset[str] = frozenset()


def _category(path: str, *, hidden: str = "", **values: str) -> Category:
    split = {name: tuple(v.strip() for v in text.split(",")) for name, text in values.items()}
    shared = {"color": tuple(COLOURS)}
    return Category(path, {**shared, **split}, frozenset(hidden.split()))


_PATTERN = ", ".join(PATTERNS)
CATEGORIES: dict[str, Category] = {
    "dress": _category(
        "Women/Dresses",
        pattern=_PATTERN,
        neckline="round neck, v-neck, square neck, boat neck, halter neck",
        sleeves="sleeveless, short sleeves, long sleeves, puff sleeves",
        length="mini, knee length, maxi",
        waist="no belt, belted, bow waist",
        hem="straight hem, flared hem, ruffled hem",
        material="cotton, satin, knit",
    ),
    "shirt": _category(
        "Men/Shirts",
        pattern=_PATTERN,
        collar="classic collar, mandarin collar, crew neck, button-down collar",
        sleeves="short sleeves, long sleeves, rolled sleeves",
        closure="full buttons, half placket, full zip",
        pocket="no pocket, chest pocket, two pockets",
        hem="straight hem, curved hem",
        material="cotton, linen, denim",
    ),
    "shoe": _category(
        "Shoes/Sneakers and Boots",
        material="leather, suede, canvas",
        height="low top, mid top, high top",
        closure="laces, velcro, buckle, slip-on",
        sole="white, black, brown, grey",
        heel="flat, wedge, block heel",
        toe="round toe, cap toe, pointed toe",
        detail="no logo, side stripes, star logo",
    ),
    "handbag": _category(
        "Women/Handbags",
        material="leather, suede, canvas, wicker",
        pattern="plain, quilted, striped, two-tone",
        shape="tote, saddle bag, box bag, bucket bag",
        handle="top handle, two handles, shoulder strap, chain strap",
        closure="zip, flap, turn lock, bow",
        hardware="gold, silver, black",
        charm="no charm, tassel, scarf",
    ),
    "backpack": _category(
        "Luggage/Backpacks",
        hidden="volume",
        pattern="plain, two-tone, striped, camouflage, dotted",
        material="nylon, canvas, leather",
        shape="rounded, square, slim",
        closure="zip, flap, roll top",
        pockets="no pocket, one pocket, two pockets",
        trim="black, brown, orange, grey",
        side_pocket="no side pocket, side pockets",
        volume="14 l, 18 l, 22 l, 28 l",
    ),
    "hat": _category(
        "Accessories/Hats",
        style="beanie, baseball cap, fedora, bucket hat, sun hat",
        pattern=_PATTERN,
        material="cotton, knit, straw, felt",
        band="no band, black, white, red, gold",
        ornament="no ornament, pompom, bow, feather, patch",
        crown="low crown, high crown",
        brim="narrow brim, wide brim",
    ),
    "watch": _category(
        "Accessories/Watches",
        hidden="movement",
        shape="round, square, tonneau",
        case="gold, silver, rose gold, black",
        dial="white, black, blue, green",
        strap="leather strap, steel links, rubber strap, textile strap",
        numerals="no numerals, bars, dots, roman numerals",
        bezel="smooth bezel, diver bezel",
        complication="no date, date window, chronograph, moon phase",
        movement="quartz, automatic, solar",
    ),
    "mug": _category(
        "Kitchen/Mugs",
        hidden="capacity",
        pattern=_PATTERN,
        shape="straight, tapered, belly, flared",
        handle="round handle, square handle, ear handle, no handle",
        inside="white, black, yellow, red",
        glaze="glossy, matte, speckled",
        base="plain base, footed, dipped base",
        rim="no rim line, gold rim, dark rim",
        capacity="250 ml, 330 ml, 450 ml",
    ),
    "bottle": _category(
        "Kitchen/Water Bottles",
        hidden="capacity",
        pattern="plain, striped, dotted, zigzag, two-tone",
        material="steel, glass, plastic",
        shape="cylinder, shoulder, hourglass, square",
        cap="screw cap, flip cap, straw cap, loop cap",
        lid="black, white, beige, grey",
        sleeve="no sleeve, rubber boot, grip band",
        print="no print, logo print, mountain print",
        capacity="350 ml, 500 ml, 750 ml, 1 l",
    ),
    "lamp": _category(
        "Home/Table Lamps",
        hidden="socket",
        pattern="plain, striped, pleated, dotted, zigzag",
        shade="cone shade, drum shade, dome shade, globe shade",
        base="column base, tripod base, gourd base, arched base",
        finish="gold, black, white, oak, silver",
        edge="no trim, trim bands, fringe",
        switch="no pull, pull chain, cord switch",
        height="tall, squat",
        socket="E14, E27, LED",
    ),
    "chair": _category(
        "Furniture/Chairs",
        material="velvet, leather, wool, rattan",
        back="oval back, square back, wing back, low back",
        stitching="no stitching, buttoned, channelled, cross stitch",
        legs="tapered legs, hairpin legs, pedestal, sled base",
        finish="oak, walnut, black, silver",
        arms="no arms, low arms, high arms",
        cushion="no cushion, white cushion, yellow cushion",
    ),
    "sofa": _category(
        "Furniture/Sofas",
        hidden="filling",
        material="velvet, leather, wool, linen",
        seats="two seats, three seats, four seats",
        arms="rolled arms, square arms, slim arms",
        back="plain back, buttoned, channelled",
        legs="tapered legs, hairpin legs, block legs",
        finish="oak, walnut, black, silver",
        pillows="no pillows, white pillows, yellow pillows, red pillows",
        filling="foam, down, springs",
    ),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One product: its place in the catalogue and the truth about it (the oracle's attributes)."""

    product_id: str
    split: str
    family: int
    category: str
    attributes: Mapping[str, str]
    n_listings: int


def make_products(seed: int, families: Mapping[str, int]) -> list[Product]:
    """All products of all splits, family by family; no two share category and attributes.

    families: split -> number of families. Categories take turns. The brand is a family's own, and
    is not counted on to tell two products apart.
    """
    products: list[Product] = []
    seen: set[tuple[str, ...]] = set()
    categories = list(CATEGORIES)
    family = 0
    for split, n_families in families.items():
        for i in range(n_families):
            rng = random.Random(f"{seed}/{split}/family/{i}")
            category = categories[i % len(categories)]
            brand = rng.choice(BRANDS)
            for values in _family(rng, category, seen):
                products.append(
                    Product(
                        product_id=f"p{len(products):06d}",
                        split=split,
                        family=family,
                        category=category,
                        attributes={"brand": brand, **values},
                        n_listings=rng.choice(LISTINGS_PER_PRODUCT),
                    )
                )
            family += 1
    return products


def _family(rng: random.Random, category: str, seen: set[tuple[str, ...]]) -> list[dict[str, str]]:
    """A base and its look-alikes, each of which differs from the base in one attribute."""
    values, hidden = CATEGORIES[category].values, CATEGORIES[category].hidden
    odds = [HIDDEN_ODDS if name in hidden else VARIANT_ODDS.get(name, 1.0) for name in values]
    while True:
        base = {name: rng.choice(options) for name, options in values.items()}
        members = [base]
        size = rng.choice(FAMILY_SIZES)
        while len(members) < size:
            name = rng.choices(list(values), odds)[0]
            member = {**base, name: rng.choice(values[name])}
            if member not in members:
                members.append(member)
        keys = {(category, *member.values()) for member in members}
        if not keys & seen:
            seen |= keys
            return members
