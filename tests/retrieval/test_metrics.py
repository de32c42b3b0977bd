"""Ranking metrics against numbers worked by hand, and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from afmrl_jax.retrieval import metrics

# Three queries over items 10..15. Relevant at ranks 1 and 3; at rank 2 only; nowhere.
RANKED = np.array([[10, 11, 12, 13], [13, 10, 11, 12], [11, 12, 13, 10]])
DOWNWARDS = np.tile([0.9, 0.8, 0.7, 0.6], (3, 1))
RELEVANT = np.array([[12, 10, -1], [10, -1, -1], [15, 14, -1]])
RANKS = np.array([[3, 1, 0], [2, 0, 0], [0, 0, 0]])
N_RELEVANT = np.array([2, 1, 2])


def test_ranks_count_from_one_and_are_zero_for_padding_and_for_what_was_not_found():
    assert metrics.relevant_ranks(RANKED, DOWNWARDS, RELEVANT).tolist() == RANKS.tolist()


def test_padding_of_a_short_ranking_is_never_relevant():
    nothing = np.full((1, 2), -np.inf)
    ranks = metrics.relevant_ranks(np.array([[-1, -1]]), nothing, np.array([[-1, 3]]))
    assert not metrics.recall_at_k(ranks, 2).any()


def test_recall_asks_for_any_relevant_item_among_the_first_k():
    assert metrics.recall_at_k(RANKS, 1).tolist() == [True, False, False]
    assert metrics.recall_at_k(RANKS, 2).tolist() == [True, True, False]


def test_reciprocal_rank_is_that_of_the_first_relevant_item():
    assert metrics.reciprocal_rank(RANKS).tolist() == [1.0, 0.5, 0.0]


def test_average_precision_divides_by_all_relevant_items_also_those_not_found():
    expected = [(1 / 1 + 2 / 3) / 2, 1 / 2, 0.0]
    np.testing.assert_allclose(metrics.average_precision(RANKS, N_RELEVANT), expected)
    half_found = metrics.average_precision(np.array([[1, 0]]), np.array([2]))
    assert half_found.tolist() == [0.5]


def test_ndcg_is_one_where_the_best_ranking_was_found_and_discounts_by_rank():
    # log2 of 2, 3, 4 for ranks 1, 2, 3: (1 + 1/2) / (1 + 1/log2(3)) and 1/log2(3).
    expected = [1.5 / (1 + 1 / np.log2(3)), 1 / np.log2(3), 0.0]
    np.testing.assert_allclose(metrics.ndcg_at_k(RANKS, N_RELEVANT, 4), expected)
    # More relevant items than k: the best ranking holds only k of them.
    ranks = np.array([[1, 2, 0]])
    np.testing.assert_allclose(metrics.ndcg_at_k(ranks, np.array([3]), 2), 1)


@pytest.mark.parametrize(("hits", "n"), [(6, 6), (0, 6), (1, 1), (3, 20), (700, 2000)])
def test_the_interval_of_a_share_is_wilsons_and_never_empty(hits, n):
    # Its ends are the shares p from which hits / n lies 1.96 of their own standard errors away.
    n_z, z = n + 1.96**2, 1.96
    ends = np.roots([n_z, -(2 * hits + z**2), hits**2 / n])
    half = metrics.interval95(np.arange(n) < hits)
    assert half == pytest.approx((ends[0] - ends[1]) / 2) and half > 0
    if (hits, n) == (6, 6):
        assert sorted(ends) == pytest.approx([0.610, 1], abs=5e-4)


def test_the_interval_of_many_values_between_0_and_1_is_that_of_the_normal_approximation():
    values = np.tile([0.1, 0.2, 0.6], 2000)
    assert metrics.interval95(values) == pytest.approx(metrics.normal95(values), rel=1e-2)
    assert metrics.normal95(np.array([1.0, 2, 3])) == pytest.approx(1.96 / np.sqrt(3))
    assert np.isnan(metrics.normal95(np.array([1.0])))


def test_queries_are_paired_by_their_differences():
    before, after = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0])
    # Differences 1, 0, 0, 0, and half a query each of 0, 0, 1, -1: of 6 the squares sum to 2, the
    # mean is 1/6.
    gain = 0.25, 1.96 * np.sqrt((2 / 6 - 1 / 6**2) / 6)
    assert metrics.paired(before, after) == pytest.approx(gain)
    # Where no query gains, 6 say little: (1 / 8) / 8 of variance.
    same = np.ones(6)
    assert metrics.paired(same, same) == pytest.approx((0, 1.96 / 8))
    many = np.tile(before, 500), np.tile(after, 500)
    assert metrics.paired(*many)[1] == pytest.approx(metrics.normal95(many[1] - many[0]), rel=1e-2)
    with pytest.raises(ValueError, match="paired"):
        metrics.paired(before, after[:3])


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.data())
def test_metrics_of_a_whole_ranking_equal_scikit_learns(seed, n, data):
    n_relevant = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(seed)
    ranked, relevant = rng.permutation(n)[None], rng.choice(n, n_relevant, replace=False)[None]
    truth, score = np.isin(np.arange(n), relevant[0]), np.empty(n)
    score[ranked[0]] = -np.arange(n)
    ranked_to_the_end = np.append(ranked, [[-1]], axis=1)
    scores = np.append(np.linspace(1, 0, n), -np.inf)[None]
    ranks = metrics.relevant_ranks(ranked_to_the_end, scores, relevant)
    ours = metrics.score_ranks(ranks, np.array([n_relevant]), ks=(1, n))
    assert ours["map"][0] == pytest.approx(average_precision_score(truth, score))
    assert ours["ndcg@10"][0] == pytest.approx(ndcg_score(truth[None], score[None], k=10))
    assert ours["recall@1"][0] == truth[ranked[0, 0]]
    assert ours[f"recall@{n}"][0] == 1
    assert ours["mrr"][0] >= ours["recall@1"][0]
