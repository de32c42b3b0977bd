"""The names of a catalogue's fields and splits, and how misspelt names are recognised."""

import difflib
import functools
import re
import unicodedata

FIELDS = (
    "listing_id",
    "product_id",
    "title",
    "description",
    "category",
    "attributes",
    "images",
    "split",
)
FIELD_NAMES = frozenset(FIELDS)
LONGEST = 60  # characters; longer names are not compared, and are cut in messages
SPLITS = ("train", "validation", "test")
# Other catalogues' names of the fields. Qualifiers are removed first: "main_image_path" is "image".
_SYNONYMS = {
    "listing_id": "id listing item_id offer_id sku asin",
    "product_id": "product pid group_id item_group_id product_group parent_id",
    "title": "name product_name item_name headline",
    "description": "desc descr",
    "category": "cat",
    "attributes": "attrs attr aspects specs specifications",
    "images": "img photo picture pic file_name filename",
}
_FIELD_OF = {
    synonym: field for field, synonyms in _SYNONYMS.items() for synonym in synonyms.split()
}
_QUALIFIERS = frozenset(
    ("product", "item", "listing", "main", "primary", "name", "path", "file", "filename", "list")
)
# Hugging Face's datasets read the same names, and also "eval". That is left out, because it is
# validation to some people and test to others.
_SPLIT_OF = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "development": "validation",
    "validate": "validation",
    "testing": "test",
}
_PICTURE = re.compile(r"image|img|photo|picture|thumbnail", re.IGNORECASE)


def similar_field(name: str) -> str | None:
    """The field that an unknown field's name is a synonym or a misspelling of, else None."""
    return _similar_field(name) if len(name) <= LONGEST else None


@functools.lru_cache(maxsize=4096)
def _similar_field(name: str) -> str | None:
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", unicodedata.normalize("NFKC", name)).lower()
    plain = "_".join(re.findall(r"[^\W_]+", words))
    bare = "_".join(
        word
        for word in plain.split("_")
        if word.removesuffix("s") not in _QUALIFIERS and not word.isdigit()
    )
    for text in filter(None, (plain, bare)):
        for word in (text, text.removesuffix("s"), text + "s", re.sub("ies$", "y", text)):
            if word in FIELDS:
                return word
            if word in _FIELD_OF:
                return _FIELD_OF[word]
    # "category_id" and "subtitle" contain a field's whole name, but mean something else.
    others = [field for field in FIELDS if field.removesuffix("s") not in plain]
    return next(iter(difflib.get_close_matches(plain, others, n=1, cutoff=0.8)), None)


def may_hold_images(name: str) -> bool:
    """Whether an unknown field's name suggests that it holds pictures or their addresses."""
    return bool(_PICTURE.search(name)) or similar_field(name) == "images"


def split_name(split: str) -> str:
    """The split's normalised name: "Valid " gives "validation"."""
    plain = clean_identifier(split).casefold()
    return _SPLIT_OF.get(plain, plain)


def similar_splits(split: str) -> tuple[str, ...]:
    """The splits that a name may be a misspelling of; () if it is a proper name of a split.

    split: a name normalised by `split_name`.
    """
    return _similar_splits(split) if len(split) <= LONGEST else ()


@functools.lru_cache(maxsize=4096)
def _similar_splits(split: str) -> tuple[str, ...]:
    if split in SPLITS:
        return ()
    if split in ("eval", "evaluation"):
        return "validation", "test"
    if split == "all":  # reserved: `Catalog.indices("all")` gives every listing
        return SPLITS
    # "test2" and "train_small" contain a split's whole name, but are different splits.
    known = [name for name in (*SPLITS, *_SPLIT_OF) if name not in split]
    near = [name for name in known if sorted(name) == sorted(split)]
    near = near or difflib.get_close_matches(split, known, n=1, cutoff=0.8)
    return tuple(_SPLIT_OF.get(name, name) for name in near)


def clean_identifier(text: str) -> str:
    """An identifier in NFC without invisible characters and without blanks at its ends.

    Upper and lower case stay, and so do blanks inside.
    """
    if text.isascii() and text.isprintable():
        return text.strip(" ")
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf") or c.isspace())
    return kept.strip()
