"""Mined look-alikes against brute force, and within a budget."""

import numpy as np
import pytest

from afmrl_jax.attributes.bm25 import CorpusStatistics, bm25_matrix
from afmrl_jax.data import mining
from afmrl_jax.data.mining import mine_differing, mine_neighbours


def products(count: int, values: int, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    names = ("type", "color", "neck", "sleeve", "fit", "hem")
    return [{n: f"{n}{rng.integers(values)}" for n in names} for _ in range(count)]


def brute_force(catalogue, k: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = CorpusStatistics.from_documents(catalogue).encode(catalogue, mining.MAX_TERMS)
    terms = encoded["terms"]
    scores = bm25_matrix(terms, encoded["query_weights"], terms, encoded["document_weights"])
    scores = np.array(scores)
    np.fill_diagonal(scores, -1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def mined(catalogue, k: int, **options) -> tuple[np.ndarray, np.ndarray]:
    return mine_neighbours(catalogue, k, CorpusStatistics.from_documents(catalogue), **options)


def test_neighbours_are_those_of_brute_force():
    catalogue = products(300, values=6)
    neighbours, scores = mined(catalogue, 5)
    _, expected = brute_force(catalogue, 5)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert neighbours.dtype == np.int32 and scores.dtype == np.float32


def test_a_product_is_never_its_own_neighbour_and_missing_neighbours_are_minus_one():
    catalogue = [{"color": "red"}, {"color": "red"}, {"color": "blue"}, {}]
    neighbours, scores = mined(catalogue, 2)
    np.testing.assert_array_equal(neighbours, [[1, -1], [0, -1], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(scores > 0, neighbours >= 0)


def test_neighbours_that_differ_have_no_two_products_with_all_the_same_attributes():
    catalogue = [
        {"color": "red", "type": "mug"},
        {"type": "Mug", "color": "Red"},  # the same
        {"color": "red", "type": "mug", "size": "l"},
        {"color": "red"},
    ]
    np.testing.assert_array_equal(mined(catalogue, 3)[0][0], [1, 2, 3])
    neighbours = mine_differing(catalogue, 3, CorpusStatistics.from_documents(catalogue))
    np.testing.assert_array_equal(neighbours[:2], [[2, 3, -1], [2, 3, -1]])
    for product in (2, 3):
        assert neighbours[product, 0] in (0, 1)  # one of the two
        np.testing.assert_array_equal(neighbours[product, 1:], [5 - product, -1])


def test_every_one_of_the_products_that_agree_is_somebody_s_neighbour():
    catalogue = [{"color": "red", "type": "mug"}] * 3 + [{"color": "red"}] * 100
    neighbours = mine_differing(catalogue, 2, CorpusStatistics.from_documents(catalogue))
    assert set(neighbours[3:, 0]) == {0, 1, 2}
    assert (neighbours[:3, 0] >= 3).all() and (neighbours[:, 1] == -1).all()


def test_ties_go_to_the_lowest_index():
    neighbours, _ = mined([{"color": "red"}] * 5 + [{"color": "blue"}], 3)
    np.testing.assert_array_equal(neighbours[0], [1, 2, 3])
    np.testing.assert_array_equal(neighbours[4], [0, 1, 2])


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    catalogue = products(200, values=4)
    whole = mined(catalogue, 4)
    monkeypatch.setattr(mining, "BLOCK_ENTRIES", 3000)
    for left, right in zip(mined(catalogue, 4), whole):
        np.testing.assert_array_equal(left, right)


def test_a_search_on_a_budget_finds_nearly_as_good_neighbours_with_exact_scores():
    catalogue = products(6000, values=5)  # 1,200 products share each term: 2,000 postings are few
    neighbours, scores = mined(catalogue, 4, max_work=0)
    best = mined(catalogue, 4)[1]
    assert (neighbours >= 0).all()
    assert scores.sum() > 0.9 * best.sum() and (scores <= best + 1e-3).all()
    statistics = CorpusStatistics.from_documents(catalogue)
    query, found = (statistics.encode([catalogue[i]], 32) for i in (7, neighbours[7, 0]))
    exact = bm25_matrix(
        query["terms"], query["query_weights"], found["terms"], found["document_weights"]
    )
    assert scores[7, 0] == pytest.approx(float(exact[0, 0]), rel=1e-5)


def test_an_empty_catalogue_has_no_neighbours():
    neighbours, scores = mined([], 3)
    assert neighbours.shape == scores.shape == (0, 3)
    assert mine_differing([], 3, CorpusStatistics.from_documents([])).shape == (0, 3)
