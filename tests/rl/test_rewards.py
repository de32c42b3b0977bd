"""Rewards of two queries with two answers each, worked by hand.

Query 0 is gallery listing 0 of the product {0, 1, 2}, query 1 is no gallery listing; its product is
{5}. K is 5, so that 4 ranks are left when the query's own listing has been taken out.
"""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.rl.rewards import Retrieved, Reward, bounded_k, measures, rewards

SELF_IDS = np.array([0, 0, -1, -1])
RELEVANT = np.array([[0, 1, 2], [0, 1, 2], [5, -1, -1], [5, -1, -1]])
ANSWERS = Retrieved(
    # Right at ranks 1 and 3 once 0 is out; at rank 2; at rank 3; not within the 4 ranks kept.
    ids=np.array([[0, 1, 7, 2, 8], [8, 0, 2, 7, 9], [7, 8, 5, 9, 6], [7, 8, 9, 6, 5]]),
    scores=np.array(
        [[1.0, 0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.6, 0.5, 0.4], [0.5, 0.4, 0.3, 0.2, 0.1], [0.4] * 5]
    ),
    relevant=RELEVANT,
    relevant_scores=np.array([[1, 0.9, 0.7], [0.8, 0.2, 0.6], [0.3, 9, 9], [-0.1, 9, 9]]),
    self_ids=SELF_IDS,
)
PLAIN = Retrieved(
    ids=np.array([[0, 7, 1, 8, 9], [5, 7, 8, 9, 6]]),
    scores=np.array([[1.0, 0.8, 0.6, 0.5, 0.4], [0.7, 0.6, 0.5, 0.4, 0.3]]),
    relevant=RELEVANT[::2],
    relevant_scores=np.array([[1.0, 0.6, 0.1], [0.7, 9, 9]]),
    self_ids=SELF_IDS[::2],
)
VALID, LENGTHS = np.ones(4, bool), np.array([10, 20, 30, 40])
RECALL = Reward(kind="recall", k=2, gain=False, invalid=-0.1, length_cost=0.0)
LOG = np.log2([2, 3, 4])  # the discounts of ranks 1, 2, 3


def reward_of(options, valid=VALID, plain=PLAIN):
    values, parts = rewards(ANSWERS, plain, np.asarray(valid), LENGTHS, 2, options)
    assert values.dtype == np.float32 and values.shape == (4,)
    return values, parts


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("recall", [1, 1, 0, 0]),  # among the first 2
        ("mrr", [1, 1 / 2, 1 / 3, 0]),
        ("ndcg", [1 / (1 + 1 / LOG[1]), (1 / LOG[1]) / (1 + 1 / LOG[1]), 0, 0]),
        ("margin", [0.9 - 0.8, 0.6 - 0.9, 0.3 - 0.5, -0.1 - 0.4]),
    ],
)
def test_measures_of_what_was_found_without_the_query_listing(kind, expected):
    values, parts = reward_of(replace(RECALL, kind=kind))
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)
    assert parts["recall@1"].tolist() == [1, 0, 0, 0]
    assert sorted(parts) == sorted([*measures(ANSWERS, 2), "gain", "valid"])


def test_the_query_listing_itself_never_counts_as_found():
    only_itself = dataclasses.replace(ANSWERS, ids=np.array([[0, 7, 8, 9, 6]] * 4))
    assert measures(only_itself, 3)["mrr"][:2].tolist() == [0, 0]
    # Nor does its own cosine of 1 count as the best right one.
    assert measures(only_itself, 3)["margin"][0] == pytest.approx(0.9 - 0.9)


def test_a_tie_counts_against_an_answer_wherever_the_right_listing_stands_in_the_gallery():
    for ids in ([[5, 7, 8, 9, 6]], [[7, 5, 8, 9, 6]], [[7, 8, 5, 9, 6]]):
        tied = Retrieved(
            ids=np.array(ids),
            scores=np.array([[0.7, 0.7, 0.7, 0.4, 0.3]], np.float32),
            relevant=RELEVANT[2:3],
            relevant_scores=np.array([[0.7, 9, 9]]),
            self_ids=SELF_IDS[2:3],
        )
        found = measures(tied, 2)
        assert found["mrr"][0] == pytest.approx(1 / 3) and found["recall@2"][0] == 0


def test_the_gain_is_what_the_attributes_add_to_the_same_query():
    # Alone: 1/2 and 1.
    options = replace(RECALL, kind="mrr", gain=True)
    values, parts = reward_of(options)
    np.testing.assert_allclose(values, [1 / 2, 0, 1 / 3 - 1, -1], rtol=1e-6)
    np.testing.assert_allclose(parts["gain"], values)
    with pytest.raises(ValueError, match="give `plain`"):
        reward_of(options, plain=None)
    assert "gain" not in reward_of(RECALL, plain=None)[1]


def test_an_invalid_format_costs_a_tenth():
    values, parts = reward_of(RECALL, valid=[True, False, False, False])
    np.testing.assert_allclose(values, [1, -0.1, -0.1, -0.1])
    assert parts["valid"].tolist() == [1, 0, 0, 0]
    assert parts["recall@2"].tolist() == [1, 1, 0, 0]  # of what was searched


@pytest.mark.parametrize(
    "options", [replace(RECALL, kind="margin"), replace(RECALL, kind="mrr", gain=True)]
)
def test_breaking_the_format_is_never_better_than_the_worst_valid_answer(options):
    plain, _ = reward_of(options)
    values, _ = reward_of(options, valid=[True, False, True, False])
    worst = np.minimum(plain[[0, 2]], 0)
    np.testing.assert_allclose(values[[1, 3]], worst - 0.1, rtol=1e-6)


def test_length_costs_a_little_a_token_where_asked():
    values, _ = reward_of(replace(RECALL, kind="mrr", length_cost=0.001))
    np.testing.assert_allclose(values, [1 - 0.01, 1 / 2 - 0.02, 1 / 3 - 0.03, -0.04], rtol=1e-6)


def test_k_is_bounded_by_the_gallery():
    assert [bounded_k(50, gallery) for gallery in (10_000, 1000, 300, 7)] == [50, 50, 15, 1]


def test_a_ranking_too_short_to_judge_is_refused():
    with pytest.raises(ValueError, match="search with k=6"):
        measures(ANSWERS, 4)  # 4 ranks are left without the query's own
    with pytest.raises(ValueError, match="holds no wrong listing"):
        measures(dataclasses.replace(ANSWERS, ids=np.array([[0, 1, 2, -1, -1]] * 4)), 1)


def test_a_query_whose_product_has_no_other_listing_is_refused():
    alone = dataclasses.replace(ANSWERS, relevant=np.array([[0, -1, -1]] * 2 + [[5, -1, -1]] * 2))
    with pytest.raises(ValueError, match=r"2 queries .*first: row 0"):
        measures(alone, 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": "recal"}, 'did you mean "recall"'),
        ({"k": 0}, r"reward\.k is 0"),
        ({"invalid": 0.1}, "give -100 to 0"),
        ({"length_cost": -1.0}, "length_cost is -1.0"),
    ],
)
def test_a_wrong_reward_option_is_named_with_what_was_expected(wrong, says):
    with pytest.raises(UserError, match=says):
        replace(RECALL, **wrong)
