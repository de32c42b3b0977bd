"""Rewards of two queries with two answers each, worked by hand.

Query 0 is gallery listing 0 of the product {0, 1, 2}, query 1 is no gallery listing; its product is
{5}. K is 5, so that 4 ranks are left when the query's own listing has been taken out.
"""

import dataclasses
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afmrl_jax.attributes.text import Verdict
from afmrl_jax.catalog.listings import Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.rl.rewards import Completion, Retrieved, Reward, bounded_k, measures, rewards

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
MUG = Listing("0", "p", "mug", "", "", {"brand": "Acme"}, 0, None)
HAT = Listing("9", "q", "hat", "", "", {"brand": "Beta"}, 0, None)
QUERIES, BRANDS = [MUG, MUG, HAT, HAT], ["Acme", "Beta", "Acme", "Beta"]
LENGTHS = [10, 20, 30, 40]
RECALL = Reward(kind="recall", function="", k=2, gain=False, invalid=-0.1, length_cost=0.0)
LOG = np.log2([2, 3, 4])  # the discounts of ranks 1, 2, 3


def reward_of(options, valid=(True,) * 4):
    completions = [
        Completion(brand, {"brand": brand}, Verdict.VALID, length)
        if whole
        else Completion(brand, {}, Verdict.MALFORMED, length)
        for brand, whole, length in zip(BRANDS, valid, LENGTHS)
    ]
    values, parts = rewards(completions, QUERIES, ANSWERS, PLAIN, options)
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
    # It is measured in any case.
    np.testing.assert_allclose(reward_of(replace(options, gain=False))[1]["gain"], values)


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


MODULE = """
import jax.numpy as jnp
import numpy as np

NUMBER = 3


def brand_found(completions, queries, retrieved):
    pairs = zip(completions, queries)
    right = [a.attributes.get("brand") == q.attributes["brand"] for a, q in pairs]
    return np.array(right, np.float32) + retrieved.scores[:, 0].astype(np.float32)


def of_jax(completions, queries, retrieved):
    return jnp.array([float(len(answer.text)) for answer in completions])


def without_search(completions, queries):
    return np.zeros(len(completions), np.float32)


def double(completions, queries, retrieved):
    return np.zeros(len(completions))


def whole(completions, queries, retrieved):
    return np.zeros(len(completions), np.int32)


def one_a_query(completions, queries, retrieved):
    return np.zeros(len(completions) // 2, np.float32)


def column(completions, queries, retrieved):
    return np.zeros((len(completions), 1), np.float32)


def plain_list(completions, queries, retrieved):
    return [0.0] * len(completions)


def nothing(completions, queries, retrieved):
    pass


def infinite(completions, queries, retrieved):
    return np.array([0, np.nan, 0, np.inf], np.float32)
"""


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # A right brand, and the best cosine: the second and the third have another brand.
        ({}, [1 + 1.0, 0 + 0.9, 0 + 0.5, 1 + 0.4]),
        ({"length_cost": 0.01}, [2 - 0.1, 0.9 - 0.2, 0.5 - 0.3, 1.4 - 0.4]),
        # Without attributes there is no brand, and the best cosines are 1 and .7.
        ({"gain": True}, [2 - 1, 0.9 - 1, 0.5 - 0.7, 1.4 - 0.7]),
    ],
)
def test_a_function_of_a_user_s_module_is_a_reward(my_rewards, changes, expected):
    options = replace(RECALL, function="my_rewards:brand_found", **changes)
    values, parts = reward_of(options)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # What is found is measured as ever.
    assert parts["recall@2"].tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(parts["gain"], reward_of(RECALL)[1]["gain"])
    broken, _ = reward_of(options, valid=[True, False, False, True])
    assert broken[[0, 3]].tolist() == values[[0, 3]].tolist()
    np.testing.assert_allclose(broken[[1, 2]], -0.1)  # both groups' valid answers are above 0


def test_the_example_of_the_guide_is_a_reward(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = guide.partition("## Add a reward")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (tmp_path / "guide.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    values, _ = reward_of(replace(RECALL, function="guide:brand_found"))
    np.testing.assert_allclose(values, [1 + 0.9, 0.6, 0.3, 1 - 0.1], rtol=1e-6)


def test_a_function_may_return_an_array_of_jax(my_rewards):
    values, _ = reward_of(replace(RECALL, function="my_rewards:of_jax"))
    assert values.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("brand_found", "write it as module:NAME"),
        ("my_rewards:", "'my_rewards:': write it as module:NAME"),
        (":brand_found", "write it as module:NAME"),
        ("nowhere:brand_found", "there is no module nowhere: name one that Python finds"),
        ("my_rewards.deeper:brand_found", "there is no module my_rewards.deeper"),
        ("my_rewards:brand_fuond", "my_rewards has no brand_fuond"),
        ("my_rewards:NUMBER", "which is no function, but int"),
        ("my_rewards:without_search", r"takes \(completions, queries\): expected \(compl"),
    ],
)
def test_a_name_that_stands_for_no_reward_is_told_with_the_field(my_rewards, function, says):
    with pytest.raises(UserError, match=rf"^reward\.function is .*{says}"):
        replace(RECALL, function=function)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("double", r"returned float64\[4\]: expected float32\[4\], a reward for each completion"),
        ("whole", r"returned int32\[4\]: expected float32\[4\]"),
        ("one_a_query", r"returned float32\[2\]: expected float32\[4\]"),
        ("column", r"returned float32\[4, 1\]: expected float32\[4\]"),
        ("plain_list", r"returned list: expected float32\[4\]"),
        ("nothing", r"returned NoneType: expected float32\[4\]"),
        ("infinite", "2 of whose 4 rewards are not finite: the first is nan, of the answer 'Beta'"),
    ],
)
def test_what_is_no_reward_is_told_with_the_function(my_rewards, function, says):
    options = replace(RECALL, function=f"my_rewards:{function}")
    with pytest.raises(UserError, match=f"^reward.function is 'my_rewards:{function}', .*{says}"):
        reward_of(options)
