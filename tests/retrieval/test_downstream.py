"""Categories from embeddings: agreement worked by hand, and a catalogue of points on a line."""

import dataclasses

import numpy as np
import pytest

from afmrl_jax.catalog.listings import Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval import downstream
from afmrl_jax.retrieval.downstream import CategoryTask, Unlabelled, agreement


def test_agreement_of_two_categories_in_two_clusters_as_worked_by_hand():
    found = agreement(np.array([*"aaabbb"]), np.array([0, 0, 1, 1, 1, 1]))
    assert found["purity"] == pytest.approx((2 + 3) / 6)
    # Shares of the table: a 1/3 and 1/6, b 0 and 1/2; entropies ln 2 and ln 3 - 2/3 ln 2.
    information = np.log(2) / 3 + np.log(1 / 2) / 6 + np.log(3 / 2) / 2
    entropies = np.log(2), np.log(3) - 2 / 3 * np.log(2)
    assert found["nmi"] == pytest.approx(information / np.mean(entropies))
    # Pairs together in both 1 + 3, of 6 and 7 in each, by chance 6 * 7 / 15.
    assert found["ari"] == pytest.approx((4 - 2.8) / (6.5 - 2.8))


def test_clusters_need_no_names_and_one_cluster_says_nothing():
    categories = np.array([*"aabbbc"])
    same = agreement(categories, np.array([2, 2, 0, 0, 0, 1]))
    assert same == {"nmi": pytest.approx(1), "ari": 1, "purity": 1}
    one = agreement(categories, np.zeros(6, int))
    assert one == {"nmi": pytest.approx(0), "ari": 0, "purity": 3 / 6}


def test_a_listing_without_its_label_is_the_same_otherwise():
    catalog = Line("ab")
    bare = Unlabelled(catalog)
    assert bare.listing(1) == dataclasses.replace(catalog.listing(1), category="")
    assert bare.name == "line" and catalog.listing(1).category == "b"


class Line:
    """A catalogue whose listings' categories are given by one letter each, "-" for none."""

    name = fingerprint = "line"

    def __init__(self, categories):
        self.categories = categories

    def listing(self, index, draw=0):
        category = self.categories[index].replace("-", "")
        return Listing(f"l{index}", "p", "thing", "", category, {}, 0, None)


def points(*places):
    """Embeddings of listings: where each lies on the line."""
    vectors = np.stack([places, np.ones(len(places))], axis=1)
    return lambda listings: vectors[listings].astype(np.float32)


def test_the_probe_learns_from_training_listings_alone_and_judges_the_others():
    # Training listings 0-3; judged 4-9, of which 8 has no category and 9 lies on the wrong side.
    catalog = Line("aabb" + "aabb-a")
    task = CategoryTask(catalog, np.arange(6), np.arange(4, 10), "text", limit=9, seed=0)
    assert task.probe.tolist() == [0, 1, 2, 3]  # 4 and 5 are judged
    scores = task.scores(points(-1, -1.1, 1, 1.1, -1, -0.9, 0.9, 1, -1, 1.05))
    assert scores.queries.tolist() == [0, 1, 2, 3, 5]
    assert scores.values["accuracy"].tolist() == [1, 1, 1, 1, 0]
    found = scores.means()
    assert found["accuracy"] == 0.8 and found["purity"] == pytest.approx(4 / 5)
    assert (found["n_queries"], found["n_probe"], found["n_categories"]) == (5, 4, 2)
    again = task.scores(points(-1, -1.1, 1, 1.1, -1, -0.9, 0.9, 1, -1, 1.05))
    assert again.means() == found


def test_no_more_listings_are_learned_from_than_asked_for():
    catalog = Line("ab" * 50)
    task = CategoryTask(catalog, np.arange(80), np.arange(80, 100), "text", limit=10, seed=0)
    other = CategoryTask(catalog, np.arange(80), np.arange(80, 100), "text", limit=10, seed=1)
    assert len(task.probe) == 10 and task.probe.tolist() != other.probe.tolist()


def test_intervals_of_many_listings_are_near_the_normal_ones():
    catalog = Line("ab" * 2 + "ab" * 100)
    places = np.tile([-1.0, 1.0], 102)
    places[4:84:2] *= -1  # 40 of 200 on the other's side
    task = CategoryTask(catalog, np.arange(4), np.arange(4, 204), "text", limit=9, seed=0)
    found = task.scores(points(*places)).means()
    assert found["accuracy"] == 0.8
    assert found["accuracy_ci95"] == pytest.approx(1.96 * np.sqrt(0.8 * 0.2 / 200), rel=0.15)
    assert 0 < found["ari_ci95"] < 0.2


def test_few_listings_that_are_all_right_have_a_real_interval_or_none(monkeypatch):
    monkeypatch.setattr(downstream, "RESAMPLES", 20)
    task = CategoryTask(Line("ab" * 5), np.arange(4), np.arange(4, 10), "text", limit=9, seed=0)
    found = task.scores(points(*np.tile([-1.0, 1.0], 5))).means()
    assert found["accuracy"] == found["nmi"] == 1
    assert found["accuracy_ci95"] == pytest.approx((1 - 6 / (6 + 1.96**2)) / 2)
    assert not {"nmi_ci95", "ari_ci95", "purity_ci95"} & found.keys()  # clusters are categories


@pytest.mark.parametrize(
    "categories, told",
    [
        ("abab" + "aaaa", "4 queries with a category, of 1 categories"),
        ("aa--" + "abab", "2 training listings beside the queries with a category, of 1"),
        ("----" + "----", "line has 0 training listings"),
    ],
)
def test_a_catalogue_with_nothing_to_tell_apart_is_refused(categories, told):
    with pytest.raises(UserError, match=told):
        CategoryTask(Line(categories), np.arange(4), np.arange(4, 8), "text", limit=9, seed=0)
