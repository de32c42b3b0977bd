"""Which ids and attributes of the training listings are known, and that the rest stays as it is."""

import pickle

import numpy as np
import pytest

from afmrl_jax.catalog.groups import listings_by_product
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.data.answers import described
from afmrl_jax.data.feed import Feed, true_products


def feed(identity="product", unmerged=0.5, ids=2, described=1.0):
    return Feed(identity, unmerged, ids, described)


@pytest.fixture(scope="module")
def catalog():
    """4 families for training, 1 for test; a product has 2 to 6 listings."""
    return SyntheticCatalog(families={"train": 4, "test": 1})


def grouped(catalog, codes):
    """The training listings of each code, as sorted tuples."""
    listings = catalog.indices("train")
    return {tuple(listings[codes[listings] == code]) for code in np.unique(codes[listings])}


def test_with_product_the_catalogue_stays_as_it_is(catalog):
    assert feed().with_ids(catalog, 0) is feed().with_attributes(catalog, 0) is catalog
    assert true_products(catalog) is catalog.products


def test_with_listing_each_training_listing_is_a_product_of_its_own(catalog):
    known = pickle.loads(pickle.dumps(feed("listing").with_ids(catalog, 0)))
    train, test = catalog.indices("train"), catalog.indices("test")
    assert len(np.unique(known.products[train])) == len(train)
    # What is judged, and what statistics count by, are products as before.
    assert grouped_equal(known.products[test], catalog.products[test])
    np.testing.assert_array_equal(true_products(known), catalog.products)
    listings, starts = listings_by_product(known, "train")
    np.testing.assert_array_equal(np.diff(starts), 1)
    np.testing.assert_array_equal(listings, train)
    # The codes are dense, and each has a name.
    np.testing.assert_array_equal(np.unique(known.products), np.arange(len(known.product_ids)))
    assert known.products.dtype == np.int32 and known.listing(3) == catalog.listing(3)
    assert known.fingerprint != catalog.fingerprint


def grouped_equal(one, other):
    return ((one[:, None] == one) == (other[:, None] == other)).all()


def test_with_mixed_a_share_of_the_products_is_dealt_to_several_ids(catalog):
    """Products of 2, 3, 4, 5 or 6 listings become ids of 1+1, 2+1, 2+2, 3+2 or 3+3."""
    known = feed("mixed", unmerged=0.5, ids=2).with_ids(catalog, 0)
    products, ids = grouped(catalog, catalog.products), grouped(catalog, known.products)
    merged = products & ids
    assert len(products) - len(merged) == round(0.5 * len(products))
    for product in products - merged:
        parts = [part for part in ids if set(part) <= set(product)]
        assert sorted(map(len, parts)) == [len(product) // 2, (len(product) + 1) // 2]
        assert sorted(sum(parts, ())) == sorted(product)
    test = catalog.indices("test")
    assert grouped_equal(known.products[test], catalog.products[test])


def test_an_id_has_a_listing_at_least(catalog):
    known = feed("mixed", unmerged=1.0, ids=99).with_ids(catalog, 0)
    assert grouped(catalog, known.products) == {(i,) for i in catalog.indices("train")}


def test_a_mixed_feed_is_that_of_its_seed_and_a_larger_share_holds_the_smaller_ones(catalog):
    def made(share, seed):
        return feed("mixed", unmerged=share).with_ids(catalog, seed)

    np.testing.assert_array_equal(made(0.3, 5).products, made(0.3, 5).products)
    assert (made(0.3, 5).products != made(0.3, 6).products).any()
    prints = {made(share, seed).fingerprint for share, seed in ((0.3, 5), (0.3, 6), (0.6, 5))}
    assert len(prints) == 3
    merged = [
        grouped(catalog, catalog.products) & grouped(catalog, made(share, 5).products)
        for share in (0.3, 0.6)
    ]
    assert merged[1] < merged[0]


def test_a_share_of_the_training_listings_keeps_its_attributes(catalog, tmp_path):
    train, test = catalog.indices("train"), catalog.indices("test")
    some, most = (feed(described=share).with_attributes(catalog, 0) for share in (0.25, 0.75))
    kept = described(some, "train", tmp_path)
    assert len(kept) == round(0.25 * len(train))
    assert set(kept) < set(described(most, "train", tmp_path))
    np.testing.assert_array_equal(described(some, "test", tmp_path), test)
    assert some.listing(int(kept[0])) == catalog.listing(int(kept[0]))
    bare = next(i for i in train if i not in kept)
    assert some.listing(int(bare), draw=3).attributes == {}
    assert some.listing(int(bare)).title == catalog.listing(int(bare)).title
