import numpy as np
import pytest

from afmrl_jax.catalog.listings import Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.feed import Feed, KnownByIds
from afmrl_jax.data.pairs import Composition, PairSampler


class Listings:
    """A catalogue of texts: product p has `counts[p]` listings."""

    name, fingerprint = "texts", "0"

    def __init__(self, counts):
        self.products = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self):
        return len(self.products)

    def listing(self, index, draw=0):
        product = str(self.products[index])
        return Listing(str(index), product, f"title {index}", "", "", {}, 0, "train")

    def indices(self, split):
        return np.arange(len(self) if split in ("train", "all") else 0)


COMPOSITION = Composition(0.0, 2, 0, 1, "keep")
NEIGHBOURS = (np.arange(40)[:, None] + [1, 2, 3, 4]) % 40


def sampler(counts=None, seed=0, **changes):
    composition = {
        "lookalike_share": 0.5,
        "lookalike_group": 3,
        "hard_negatives": 2,
        "neighbours": 4,
        "agreeing_neighbours": "keep",
    }
    return PairSampler(
        Listings([2] * 40 if counts is None else counts),
        "train",
        changes.pop("batch", 12),
        Composition(**composition | changes),
        seed,
        NEIGHBOURS,
    )


def test_a_batch_is_a_pure_function_of_seed_and_step():
    one, other = sampler(), sampler()
    other.draw(7)
    np.testing.assert_array_equal(one.draw(3), other.draw(3))
    assert (one.draw(3) != one.draw(4)).any()
    assert (one.draw(3) != sampler(seed=1).draw(3)).any()


def test_query_and_target_are_two_listings_of_one_product_and_negatives_are_of_others():
    pairs = sampler()
    products = pairs_products = Listings([2] * 40).products
    for step in range(20):
        listings = pairs.draw(step)
        query, target = listings[:, 0], listings[:, 1]
        assert (query != target).all()
        assert (products[query] == products[target]).all()
        assert (products[listings[:, 2:]] != products[query][:, None]).all()
        assert len(set(pairs_products[query])) == 12  # no product twice


def test_a_product_with_one_listing_is_paired_with_itself():
    listings = sampler(counts=[1] * 40).draw(0)
    np.testing.assert_array_equal(listings[:, 0], listings[:, 1])


def test_the_pairs_of_a_feed_without_ids_are_single_listings_each_once_an_epoch():
    catalog = KnownByIds(Listings([2, 3, 7]), Feed("listing", 0.5, 2, 1.0), 0)
    pairs = PairSampler(catalog, "train", 6, COMPOSITION, 0, None)
    listings = np.concatenate([pairs.draw(step) for step in range(2)])
    np.testing.assert_array_equal(listings[:, 0], listings[:, 1])
    np.testing.assert_array_equal(np.sort(listings[:, 0]), np.arange(12))


def test_the_pairs_of_a_mixed_feed_are_of_one_id():
    catalog = KnownByIds(Listings([4, 4, 4]), Feed("mixed", 1.0, 2, 1.0), 0)
    pairs = PairSampler(catalog, "train", 6, COMPOSITION, 0, None)
    found = set()
    for step in range(20):
        listings = pairs.draw(step)
        found |= {tuple(sorted(pair)) for pair in listings.tolist()}
    assert len(found) == 6  # of each product two ids of two listings
    for query, target in found:
        assert query != target
        assert catalog.products[query] == catalog.products[target]
        assert catalog.truth[query] == catalog.truth[target]


def test_an_epoch_visits_every_product_once_where_nothing_is_added():
    pairs = sampler(lookalike_share=0.0, batch=8)
    seen = np.concatenate([pairs.products(step) for step in range(5)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(40))
    again = np.concatenate([pairs.products(step) for step in range(5, 10)])
    assert (seen != again).any()  # shuffled anew


def test_look_alikes_stand_beside_their_leader():
    products = sampler(lookalike_share=1.0, batch=12).products(0)
    for leader in range(0, 12, 3):
        group = products[leader : leader + 3]
        assert set(group[1:]) <= set(NEIGHBOURS[group[0]])


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"batch": 41}, "set batch to 40 or less"),
        ({"lookalike_share": 1.5}, "give 0 to 1"),
        ({"lookalike_group": 1}, "2 or more"),
        ({"hard_negatives": 5}, "raise data.neighbours"),
    ],
)
def test_a_composition_that_cannot_be_says_what_to_change(changes, told):
    with pytest.raises(UserError, match=told):
        sampler(**changes)
