"""What the built-in catalogue promises: deterministic, honest, split by family, and hard enough."""

import dataclasses
import pickle
import random

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from afmrl_jax.catalog.builtin import words
from afmrl_jax.catalog.builtin.photo import photograph
from afmrl_jax.catalog.builtin.vocabulary import CATEGORIES, make_products
from afmrl_jax.catalog.opening import BuiltIn
from afmrl_jax.catalog.synthetic import FAMILIES, Shape, SyntheticCatalog, open_world
from afmrl_jax.core.pages import load_page

SMALL = {"train": 24, "validation": 12, "test": 12}


@pytest.fixture(scope="module")
def small() -> SyntheticCatalog:
    return SyntheticCatalog(0, families=SMALL, image_size=48)


def pixels(catalog: SyntheticCatalog, index: int, draw: int = 0) -> np.ndarray:
    return np.asarray(catalog.image(index, draw=draw))


def test_a_rendering_depends_on_seed_index_and_draw_alone(small):
    copy = pickle.loads(pickle.dumps(small))
    for index in (200, 3, 77):  # another order, another process's copy
        for draw in (0, 5):
            assert copy.listing(index, draw) == small.listing(index, draw)
            np.testing.assert_array_equal(pixels(copy, index, draw), pixels(small, index, draw))
    assert (pixels(small, 3, 5) != pixels(small, 3, 6)).any()
    other_seed = SyntheticCatalog(1, families=SMALL, image_size=48)
    assert other_seed.listing(3) != small.listing(3)


def test_another_draw_is_the_same_product_by_another_seller(small):
    here, there = small.listing(3), small.listing(3, draw=9)
    assert here.listing_id != there.listing_id and here.title != there.title
    kept = ("product_id", "category", "attributes", "split")
    assert [getattr(here, name) for name in kept] == [getattr(there, name) for name in kept]


def test_the_fingerprint_changes_with_whatever_changes_the_content(small):
    others = [
        SyntheticCatalog(0, families=SMALL, image_size=48),
        SyntheticCatalog(1, families=SMALL, image_size=48),
        SyntheticCatalog(0, families=SMALL, image_size=64),
        SyntheticCatalog(0, families={**SMALL, "test": 13}, image_size=48),
    ]
    assert [other.fingerprint == small.fingerprint for other in others] == [True] + [False] * 3


def test_the_default_catalogue_is_as_large_as_promised():
    catalog = SyntheticCatalog()
    assert len(catalog.indices("test")) >= 1_000
    assert len(catalog.indices("train")) >= 3_000 and FAMILIES["train"] >= 600
    assert len(CATEGORIES) >= 12
    for category in CATEGORIES.values():
        assert len(category.values.keys() - category.hidden) >= 6
    listings_per_product = np.bincount(catalog.products)
    assert (listings_per_product.min(), listings_per_product.max()) == (2, 6)


def test_the_page_s_catalogue_is_the_default_one(tmp_path):
    options = BuiltIn.of(load_page("configs/evaluate.py"))
    assert options.open(tmp_path).fingerprint == SyntheticCatalog().fingerprint


def test_more_families_of_one_split_leave_the_products_of_the_others():
    wide = make_products(0, {**SMALL, "validation": 15, "test": 20})
    for split in SMALL:
        products = [
            [(p.category, p.attributes, p.n_listings) for p in made if p.split == split]
            for made in (make_products(0, SMALL), wide)
        ]
        assert products[1][: len(products[0])] == products[0]


def test_families_can_be_cut_and_training_products_listed_often(small):
    shaped = SyntheticCatalog(0, families=SMALL, shape=Shape(2, 0.25, 30), image_size=48)
    counts = np.bincount(shaped.products)
    families, splits = {}, {}
    for listing in range(len(shaped)):
        product = shaped.products[listing]
        families.setdefault(shaped.family(listing), set()).add(product)
        splits[product] = shaped.listing(listing).split
    assert {len(products) for products in families.values()} == {2}
    sold = {split: [n for p, n in enumerate(counts) if splits[p] == split] for split in SMALL}
    bestsellers = sold["train"].count(30)
    assert 4 <= bestsellers <= 20  # .25 of 48 products
    assert max(n for n in sold["train"] if n != 30) <= 6 == max(sold["test"] + sold["validation"])
    assert shaped.fingerprint != small.fingerprint


def test_the_splits_share_no_family_and_no_combination_of_attributes():
    products = make_products(0, FAMILIES)
    splits_of_family = {}
    for product in products:
        splits_of_family.setdefault(product.family, set()).add(product.split)
    assert all(len(splits) == 1 for splits in splits_of_family.values())

    def combination(product):
        return (product.category, *(v for k, v in product.attributes.items() if k != "brand"))

    assert len({combination(product) for product in products}) == len(products)


def test_members_of_a_family_differ_from_its_base_in_exactly_one_attribute():
    families = {}
    for product in make_products(3, {"train": 60}):
        families.setdefault(product.family, []).append(product)
    for base, *others in families.values():
        assert 3 <= len(others) <= 5
        for other in others:
            assert other.category == base.category
            changed = [k for k, v in other.attributes.items() if v != base.attributes[k]]
            assert len(changed) == 1


@pytest.mark.parametrize("name", CATEGORIES)
def test_every_visible_attribute_shows_and_no_hidden_one_does(name):
    category = CATEGORIES[name]
    rng = random.Random(name)
    base = {k: rng.choice(values) for k, values in category.values.items()}

    def shoot(**changes: str) -> np.ndarray:
        photo = photograph(random.Random(4), name, {**base, **changes}, 96)
        return photo.astype(np.int32)

    for attribute, values in category.values.items():
        photos = [shoot(**{attribute: value}) for value in values]
        for i, photo in enumerate(photos[1:], 1):
            changed = [int((abs(photo - other).max(-1) > 20).sum()) for other in photos[:i]]
            if attribute in category.hidden:
                assert max(changed) == 0
            else:
                assert min(changed) >= 16, f"{name}: {attribute}={values[i]} is hard to see"


def test_every_value_can_be_said_in_every_language():
    for name, category in CATEGORIES.items():
        for attribute, values in {**category.values, "": (name,)}.items():
            for value in values:
                said = [words.say(value, language, attribute) for language in words.LANGUAGES]
                assert all(said)
                international = attribute in ("capacity", "socket") and value[-1:] != " l"
                assert international or len(set(said)) > 1 or value in ("satin", "fedora", "nylon")


def test_sellers_leave_out_part_of_the_truth_and_invent_nothing(small):
    shares = []
    for index in range(len(small)):
        listing = small.listing(index)
        assert listing.title == listing.title.strip() != ""
        text = f"{listing.title} {listing.description}".lower()
        said = [
            any(words.say(value, language, name).lower() in text for language in words.LANGUAGES)
            for name, value in listing.attributes.items()
            if name != "brand"
        ]
        shares.append(np.mean(said))
    assert 0.45 < np.mean(shares) < 0.75
    descriptions = [small.listing(index).description for index in range(100)]
    assert 20 < sum(not text for text in descriptions) < 60


def test_evaluation_photos_are_rendered_once_and_then_read(tmp_path, small):
    def cached() -> SyntheticCatalog:
        return SyntheticCatalog(0, families=SMALL, image_size=48, cache_dir=tmp_path / "new")

    index = int(small.indices("test")[7])
    np.testing.assert_array_equal(pixels(cached(), index), pixels(small, index))
    (file,) = (tmp_path / "new").iterdir()
    photos = np.load(file)
    assert photos.shape == (
        len(small.indices("validation")) + len(small.indices("test")),
        48,
        48,
        3,
    )
    np.save(file, 255 - photos)  # what is read back is the file, not a new rendering
    np.testing.assert_array_equal(pixels(cached(), index), 255 - pixels(small, index))
    np.testing.assert_array_equal(pixels(cached(), index, draw=1), pixels(small, index, draw=1))
    np.testing.assert_array_equal(pixels(cached(), 0), pixels(small, 0))  # training: never cached


def test_there_is_one_photo_a_listing(small):
    assert small.listing(0).n_images == 1
    with pytest.raises(IndexError, match="one image"):
        small.image(0, which=1)


def test_a_split_that_is_left_out_is_empty():
    catalog = SyntheticCatalog(0, families={"test": 2}, image_size=32)
    assert len(catalog.indices("train")) == 0
    np.testing.assert_array_equal(catalog.indices("test"), catalog.indices("all"))
    assert {field.name for field in dataclasses.fields(catalog.listing(0))} >= {"split", "title"}


def test_neither_words_nor_colours_alone_find_the_product_and_together_they_find_more():
    catalog = SyntheticCatalog(0, families={"test": 52}, image_size=64)
    indices = catalog.indices("test")
    listings = [catalog.listing(index) for index in indices]
    texts = [f"{listing.title} {listing.description} {listing.category}" for listing in listings]
    tokens = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\s,|/.]+").fit_transform(texts)
    by_words = (tokens @ tokens.T).toarray()

    photos = np.stack([pixels(catalog, index)[16:48, 16:48] // 43 for index in indices])
    codes = (photos.astype(np.int64) @ [36, 6, 1]).reshape(len(indices), -1)
    histograms = np.stack([np.bincount(code, minlength=216) for code in codes])
    histograms = np.sqrt(histograms / codes.shape[1])
    by_colours = histograms @ histograms.T

    def recall_at_1(scores: np.ndarray) -> float:
        scores = scores.copy()
        np.fill_diagonal(scores, -np.inf)
        return float(np.mean(catalog.products[scores.argmax(1)] == catalog.products))

    words_alone, colours_alone = recall_at_1(by_words), recall_at_1(by_colours)
    together = recall_at_1(by_words + by_colours)
    assert 0.15 < words_alone < 0.35
    assert 0.05 < colours_alone < 0.25
    assert together > max(words_alone, colours_alone) + 0.02


def essences(seed, families):
    """Category and attributes of each product, without the brand; and of each family."""
    products = make_products(seed, families)
    told = [
        (CATEGORIES[p.category].path, *[x for n, x in p.attributes.items() if n != "brand"])
        for p in products
    ]
    return told, [product.family for product in products]


def test_the_world_leaves_out_each_family_with_a_judged_product_and_no_other():
    families = {"train": 400, "test": 12}
    world = SyntheticCatalog(5, families=families, judged={"train": 1000})
    told, of_family = essences(5, families)
    judged = set(essences(0, {"train": 1000})[0])
    bad = {family for product, family in zip(told, of_family) if product in judged}
    assert 0 < len(bad) < 100
    kept = {world.family(index) for index in range(len(world))}
    assert kept == set(of_family) - bad
    plain = SyntheticCatalog(5, families=families)
    assert world.fingerprint != plain.fingerprint and world.name != plain.name
    assert not {*world.product_ids.to_pylist()} & {*plain.product_ids.to_pylist()}


def test_no_product_of_the_world_is_in_the_built_in_catalogue():
    world, built_in = open_world(), set(essences(0, FAMILIES)[0])
    splits = {split: world.indices(split) for split in FAMILIES}
    assert len(splits["train"]) > 200_000 and len(splits["test"]) > 2_000
    of_products = {int(world.products[index]): int(index) for index in range(len(world))}
    for index in of_products.values():
        listing = world.listing(index)
        values = [x for name, x in listing.attributes.items() if name != "brand"]
        assert (listing.category, *values) not in built_in
