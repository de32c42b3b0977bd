"""Credit to single pairs: numbers worked by hand, on tokens, and through the search."""

from dataclasses import replace

import numpy as np
import pytest
from words import BY_ANSWER, CATALOG, ENCODER, gallery_in

from afmrl_jax.assembly.generator import Answer
from afmrl_jax.data.tokenizer import train_tokenizer
from afmrl_jax.rl.advantages import group_advantages
from afmrl_jax.rl.credit import (
    checked_pairs,
    correlation,
    pair_advantages,
    pair_worths,
    token_advantages,
)
from afmrl_jax.rl.environment import Environment, Laps
from afmrl_jax.rl.rewards import Reward

MUG = {"type": "mug"}
RED = {"type": "mug", "color": "red"}
NONE = 1e-6  # a ridge that is as good as none
MARGIN = Reward(kind="margin", function="", k=1, gain=False, invalid=-0.1, length_cost=0.0)


def test_a_pair_is_worth_the_reward_with_it_less_that_without_it_shrunk_by_the_ridge():
    """Two of four hold it, so that G f (1 - f) is 1: a ridge of 1 leaves a half. All hold the type,
    of which nothing can be said."""
    rewards = np.array([[0.9, 0.7, 0.3, 0.1]], np.float32)
    for ridge, color in ((NONE, 0.6), (1.0, 0.3)):
        worths = pair_worths([RED, RED, MUG, MUG], rewards, ridge)
        assert worths[0] == worths[1] == pytest.approx({"type": 0, "color": color}, abs=1e-5)
        assert worths[2] == worths[3] == pytest.approx({"type": 0}, abs=1e-5)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("holders", [1, 2, 5, 7])
def test_where_one_pair_alone_differs_its_credit_is_the_answer_s_over_the_share_without_it(
    scale, holders
):
    rewards = np.where(np.arange(8) < holders, 0.75, 0.25).astype(np.float32)[None]
    answers = [RED if i < holders else MUG for i in range(8)]
    advantages = group_advantages(rewards, scale)
    of_pairs = pair_advantages(pair_worths(answers, rewards, NONE), rewards, advantages)
    known = advantages.values[0, 0] / (1 - holders / 8)
    assert of_pairs[0] == pytest.approx({"type": 0, "color": known}, abs=1e-4)


def test_what_always_comes_with_reward_is_credited_and_what_came_beside_it_is_not():
    """Red earns 1, whatever the size: an answer's credit would blame the sizes that had no red."""
    sizes = ["s", "m", "l", "xl"] * 2
    answers = [{"size": size} | ({"color": "red"} if i < 4 else {}) for i, size in enumerate(sizes)]
    rewards = (np.arange(8) < 4).astype(np.float32)[None]
    worths = pair_worths(answers, rewards, 0.1)
    # G f (1 - f) is 2, of one of the group's columns that are at right angles to all others.
    assert worths[0] == pytest.approx({"size": 0, "color": 2 / 2.1}, abs=1e-6)
    assert worths[5] == pytest.approx({"size": 0}, abs=1e-6)


def test_pairs_that_come_together_share_what_they_are_worth():
    both = {"color": "red", "size": "s"}
    answers = [both | MUG, both | MUG, MUG, MUG]
    [worth, *_] = pair_worths(answers, np.array([[1, 1, 0, 0]], np.float32), NONE)
    assert worth == pytest.approx({"color": 0.5, "size": 0.5, "type": 0}, abs=1e-5)


def test_pairs_are_equal_when_folded_and_groups_are_apart():
    answers = [{"Color": "RED"}, {"color": "red"}, {"color": "blue"}, {"color": "red"}]
    worths = pair_worths(answers, np.array([[1, 0], [1, 0]], np.float32), NONE)
    assert worths[:2] == [{"Color": 0}, {"color": 0}]
    # Of two values, of which each answer holds one, either has half of the difference.
    assert [w["color"] for w in worths[2:]] == pytest.approx([0.5, -0.5], abs=1e-5)


def test_invalid_answers_say_nothing_of_pairs_and_valid_ones_are_better_by_being_valid():
    rewards = np.array([[0.8, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]], np.float32)
    answers = [RED, MUG, {}, {}, {}, {}, {}, MUG]
    worths = pair_worths(answers, rewards, NONE)
    assert worths[0] == pytest.approx({"type": 0, "color": 0.4}, abs=1e-5) and worths[2] == {}
    of_pairs = pair_advantages(worths, rewards, group_advantages(rewards, scale=False))
    # The valid ones' mean is .6, all answers' .3; in the second group .5 and .125.
    assert of_pairs[0] == pytest.approx({"type": 0.3, "color": 0.7}, abs=1e-5)
    assert of_pairs[1] == pytest.approx({"type": 0.3}, abs=1e-5) and of_pairs[2] == {}
    assert of_pairs[7] == pytest.approx({"type": 0.375})
    assert pair_worths([{}] * 2, np.zeros((1, 2)), 1.0) == [{}, {}]


def test_credit_follows_the_worth_of_pairs_closer_than_the_advantage_of_their_answers():
    """Of 64 queries with 8 answers: of 6 attributes most are named, more often right than not;
    right ones add to the reward, wrong ones take from it, and noise does either."""
    rng, true, of_answers, of_pairs = np.random.default_rng(0), [], [], []
    for _ in range(64):
        worth = rng.exponential(1, (6, 4)) * [1, -1, -1, -1]
        values = np.where(rng.random((8, 6)) < 0.6, 0, rng.integers(0, 4, (8, 6)))
        answers = [
            {str(name): str(values[g, name]) for name in range(6) if rng.random() < 0.8}
            for g in range(8)
        ]
        rewards = [sum(worth[int(n), int(v)] for n, v in answer.items()) for answer in answers]
        rewards = (np.array([rewards]) + rng.normal(size=8)).astype(np.float32)
        advantages = group_advantages(rewards, scale=True)
        credits = pair_advantages(pair_worths(answers, rewards, 1.0), rewards, advantages)
        expected = worth @ [0.7, 0.1, 0.1, 0.1]
        for answer, credit, value in zip(answers, credits, advantages.values[0]):
            true += [worth[int(n), int(v)] - expected[int(n)] for n, v in answer.items()]
            of_pairs += [credit[name] for name in answer]
            of_answers += [value] * len(answer)
    true, of_answers, of_pairs = map(np.array, (true, of_answers, of_pairs))
    assert correlation(of_pairs, true) > 1.5 * correlation(of_answers, true) > 0.3
    assert np.square(of_pairs).mean() ** 0.5 == pytest.approx(1 / 3, abs=0.05)


def test_answers_are_checked_evenly_and_correlations_without_variance_are_none():
    worths = [{"a": 0.0, "b": 0.0}, {}, {"c": 0.0}, {"d": 0.0}]
    assert checked_pairs(worths, 2) == [(0, "a"), (0, "b"), (3, "d")]
    assert [i for i, _ in checked_pairs(worths, 9)] == [0, 0, 2, 3]
    assert checked_pairs([{}], 2) == []
    assert correlation(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert (
        correlation(np.array([1.0, 1]), np.array([2.0, 4])) == correlation(*[np.ones(1)] * 2) == 0
    )


def test_tokens_of_a_pair_have_its_advantage_and_all_others_that_of_the_answer():
    tokenizer = train_tokenizer(["color: red; type: mug 猫; " * 9], 330)
    texts = ["color: red; type: 猫", "; color:red"]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    answers = [Answer(text, True, np.array(i), np.zeros(len(i))) for text, i in zip(texts, ids)]
    own = [{"color": 2.0, "type": 3.0}, {"color": -1.0}]
    values = np.array([[0.5, -0.5]], np.float32)
    found = token_advantages(values, own, answers, tokenizer, 16)
    assert found.dtype == np.float32 and found.shape == (1, 2, 16)
    for row, i, number, of_answer in zip(found[0], ids, (0, 1), (0.5, -0.5)):
        written = {}
        for token, value in zip(i, row):
            written.setdefault(float(value), []).append(token)
        said = {value: tokenizer.decode(tokens) for value, tokens in written.items()}
        expected = [
            {2.0: "color: red", 3.0: " type: 猫", 0.5: ";"},
            {-1.0: " color:red", -0.5: ";"},
        ]
        assert said == expected[number] and (row[len(i) :] == of_answer).all()
    plain = token_advantages(values, [{}, {}], answers, tokenizer, 16)
    np.testing.assert_array_equal(plain, np.repeat(values[..., None], 16, -1))


def judged(folder, texts, **credit):
    options = replace(BY_ANSWER, **credit)
    gallery = gallery_in(folder)
    environment = Environment(CATALOG, ENCODER, gallery, MARGIN, len(texts), False, options)
    nothing = np.zeros(len(texts), int)
    return environment.judge(
        np.array([0]), np.array([0]), texts, [True] * len(texts), nothing, Laps()
    )


# By the margin "mug red" is worth .5, "mug green" -.5, "mug lamp" and "mug" 0, "mug red lamp" less
# than .5: its words are three.
TEXTS = ["color: red", "color: green", "type: lamp", "color: red; type: lamp", "no pair"]


def test_pairs_that_find_the_product_are_credited_and_the_file_of_rollouts_has_it(tmp_path):
    found = judged(tmp_path, TEXTS, credit="pairs", credit_ridge=0.1)
    right, wrong, other, both, invalid = found.pair_advantages
    assert right["color"] == both["color"] > 0.2 > 0 > wrong["color"] and invalid == {}
    assert other["type"] == both["type"] < right["color"]
    [group] = found.groups()
    told = [answer.get("pair_advantages") for answer in group["answers"]]
    assert told[0] == pytest.approx(right, abs=1e-6) and told[4] is None
    plain = judged(tmp_path, TEXTS)
    assert plain.pair_advantages == [{}] * 5
    np.testing.assert_array_equal(plain.advantages.values, found.advantages.values)
    assert "credit_correlation" not in plain.metrics()


def test_what_pairs_are_held_to_be_worth_is_compared_with_what_is_lost_without_them(tmp_path):
    """Left out of answers of one pair each, what is lost is the reward itself, as "mug" has 0:
    .5, -.5 and 0. Each answer's pair is its own, so that the ridge gives a multiple of it."""
    metrics = judged(tmp_path, TEXTS[:3], credit_checks=3).metrics()
    assert metrics["credit_correlation"] == pytest.approx(1, abs=1e-3)
    assert judged(tmp_path, ["no pair"] * 2, credit_checks=3).metrics()["credit_correlation"] == 0
