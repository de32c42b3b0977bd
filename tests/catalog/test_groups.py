"""Products of a catalogue: whole ones drawn, and who can be found."""

import itertools
import math
from types import SimpleNamespace

import numpy as np

from afmrl_jax.catalog.groups import (
    Members,
    askers,
    has_another,
    share_of_products,
    whole_products,
)
from afmrl_jax.catalog.synthetic import SyntheticCatalog

# Listings 2 and 3 are one listing that stands in two catalogues.
TWICE = SimpleNamespace(
    products=np.array([0, 0, 1, 1, 2]),
    identities=np.array([0, 1, 2, 2, 4]),
    indices=lambda split: np.arange(5),
)


def test_a_share_is_of_whole_products_and_a_larger_one_holds_it():
    catalog = SyntheticCatalog(families={"train": 3, "test": 2})
    train = catalog.indices("train")
    shares = [share_of_products(catalog, train, share) for share in (1e-9, 0.4, 0.7, 1.0)]
    counts = [len(set(catalog.products[chosen])) for chosen in shares]
    total = len(set(catalog.products[train]))
    assert counts == [1, math.ceil(0.4 * total), math.ceil(0.7 * total), total]
    for chosen, larger in itertools.pairwise(shares):
        assert set(chosen) < set(larger) and sorted(chosen) == list(chosen)
        assert set(chosen) == set(train[np.isin(catalog.products[train], catalog.products[chosen])])
    assert list(shares[-1]) == list(train)


def test_products_are_drawn_whole_until_there_are_as_many_listings_as_asked_for():
    for limit in (1, 2, 3):
        listings = whole_products(TWICE, np.arange(5), limit)
        assert len(listings) >= limit and (np.diff(listings) > 0).all()
        assert np.isin(TWICE.products, TWICE.products[listings]).sum() == len(listings)
    assert whole_products(TWICE, np.arange(5), 9).tolist() == [0, 1, 2, 3, 4]
    assert whole_products(TWICE, np.arange(5), 9, several=True).tolist() == [0, 1, 2, 3]
    assert whole_products(TWICE, np.array([0, 4]), 9, several=True).tolist() == [0, 4]
    assert not len(whole_products(TWICE, np.arange(0), 9))


def test_a_listing_is_no_other_listing_though_it_stands_in_two_catalogues():
    everything = np.arange(5)
    assert has_another(TWICE, everything, everything).tolist() == [True] * 4 + [False]
    assert has_another(TWICE, everything, everything[:3]).tolist() == [True] * 2 + [False] * 3
    itself = has_another(TWICE, everything, everything[:3], exclude_self=False)
    assert itself.tolist() == [True] * 4 + [False]
    assert askers(TWICE, "train", everything[1:3]).tolist() == [0]


def test_members_are_the_rows_of_a_value_in_order():
    members = Members(np.array([7, 3, 7, 7, 5]))
    assert members.counts(np.array([7, 4, 5])).tolist() == [3, 0, 1]
    assert members.rows(np.array([7, 4, 5])).tolist() == [[0, 2, 3], [-1] * 3, [4, -1, -1]]
    padded = members.rows(np.array([7]), powers_of_two=True)
    assert padded.tolist() == [[0, 2, 3, -1]]
