"""GRPO and Dr. GRPO: numbers worked by hand, gradients, micro-batches, and a policy that learns."""

import dataclasses
import functools
from dataclasses import replace
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.losses.language import token_log_probs
from afmrl_jax.losses.policy import PolicyGradient, policy_loss, policy_metrics
from afmrl_jax.rl.advantages import group_advantages

GRPO = PolicyGradient(objective="grpo", clip=0.2, kl=0.0, mask_truncated=False)
JITTED = jax.jit(policy_loss, static_argnames="options")


def answers_of(log_probs, advantages, **given):
    """On-policy answers that use every slot, unless told otherwise. advantages: [B]."""
    log_probs = np.asarray(log_probs, np.float64 if jax.config.jax_enable_x64 else np.float32)
    n = len(log_probs)
    answers = {
        "mask": np.ones(log_probs.shape, bool),
        "advantages": np.repeat(
            np.asarray(advantages, log_probs.dtype)[:, None], len(log_probs[0]), 1
        ),
        "zero_variance": np.zeros(n, bool),
        "truncated": np.zeros(n, bool),
        "old_log_probs": log_probs,
        "reference_log_probs": log_probs,
    }
    return log_probs, answers | {name: np.asarray(value) for name, value in given.items()}


def loss_of(log_probs, answers, options, entropy=None):
    entropy = np.zeros(log_probs.shape, np.float32) if entropy is None else entropy
    total, count, totals = JITTED(log_probs, entropy, answers, options)
    metrics = {name: float(x) for name, x in policy_metrics(totals).items()}
    return float(total), float(count), metrics


# Ratios 1.5 and .5, of an answer with advantage 2; 1.5 and .5 of one with -1, whose second token
# is the last. The lower of both sides counts: min(3, 2.4) and min(1, 1.6); min(-1.5, -1.2) and
# min(-.5, -.8).
RATIOS = [[1.5, 0.5, 9.0], [1.5, 0.5, 1.0]]
MASK = [[True, True, False], [True, True, True]]


def clipped_case():
    return answers_of(np.log(RATIOS), [2, -1], mask=MASK, old_log_probs=np.zeros((2, 3), "f4"))


def test_grpo_clips_the_ratio_and_averages_over_tokens_then_answers():
    total, count, metrics = loss_of(*clipped_case(), GRPO)
    assert total == pytest.approx(-(2.4 + 1.0) / 2 - (-1.5 - 0.8 - 1.0) / 3, rel=1e-6)
    assert count == 2
    assert metrics["clip_share"] == pytest.approx(2 / 5)
    assert metrics["ratio_mean"] == pytest.approx((1.5 + 0.5 + 1.5 + 0.5 + 1) / 5)
    assert metrics["ratio_max"] == pytest.approx(1.5)  # the unused slot's 9 is not seen
    assert metrics["answer_tokens"] == 2.5


def test_each_token_has_its_own_advantage_where_pairs_have():
    """The ratios as above; the first answer has 2 and -1: min(3, 2.4) and min(-.5, -.8)."""
    log_probs, answers = clipped_case()
    own = answers["advantages"].copy()
    own[0, 1] = -1
    total, count, metrics = loss_of(log_probs, answers | {"advantages": own}, GRPO)
    assert total == pytest.approx(-(2.4 - 0.8) / 2 - (-1.5 - 0.8 - 1.0) / 3, rel=1e-6)
    assert count == 2 and metrics["clip_share"] == pytest.approx(3 / 5)


def test_dr_grpo_divides_by_one_constant_length():
    total, count, _ = loss_of(*clipped_case(), dataclasses.replace(GRPO, objective="dr_grpo"))
    assert total == pytest.approx(-(2.4 + 1.0) - (-1.5 - 0.8 - 1.0), rel=1e-5)
    assert count == 2 * 3


def test_kl_is_the_k3_estimate_of_the_divergence_from_the_reference():
    reference = [[log(0.5), log(0.25)]]
    log_probs, answers = answers_of(np.log([[0.25, 0.5]]), [0], reference_log_probs=reference)
    total, count, metrics = loss_of(log_probs, answers, replace(GRPO, kl=0.1))
    k3 = (exp(log(2)) - log(2) - 1 + exp(-log(2)) + log(2) - 1) / 2
    assert metrics["kl"] == pytest.approx(k3, rel=1e-5)
    assert total / count == pytest.approx(0.1 * k3, rel=1e-5)


def test_the_k3_estimate_averages_to_the_true_divergence():
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    log_probs, answers = answers_of(
        np.log(policy)[:, None], [0, 0, 0], reference_log_probs=np.log(reference)[:, None]
    )
    options = replace(GRPO, kl=1.0)
    alone = [answers | {"mask": np.arange(3)[:, None] == i} for i in range(3)]
    values = [loss_of(log_probs, one, options)[0] for one in alone]
    assert policy @ values == pytest.approx(policy @ np.log(policy / reference), rel=1e-5)
    # d k3 / d log pi = 1 - exp(d): below the reference it pulls up, above it down.
    pulls = jax.jit(jax.grad(lambda x: policy_loss(x, x, answers, options)[0]))(log_probs)
    np.testing.assert_allclose(pulls[:, 0], 1 - reference / policy, rtol=1e-5)


def test_groups_without_variance_and_filling_are_left_out_and_counted():
    log_probs, answers = answers_of(
        np.log(np.full((4, 2), 0.5)),
        [1, -1, 0, 0],
        reference_log_probs=np.log(np.full((4, 2), 0.25)),
        mask=[[True] * 2] * 3 + [[False] * 2],
        zero_variance=[False, False, True, False],
    )
    total, count, metrics = loss_of(log_probs, answers, replace(GRPO, kl=1.0))
    assert count == 2
    assert total == pytest.approx(2 * (0.5 + log(2) - 1), rel=1e-5)  # KL of two answers, not three
    assert metrics["skipped"] == pytest.approx(1 / 3)
    assert metrics["kl"] == pytest.approx(0.5 + log(2) - 1, rel=1e-5)


def test_truncated_answers_count_unless_they_are_to_be_left_out():
    log_probs, answers = answers_of(np.zeros((2, 2)), [1, -1], truncated=[False, True])
    total, count, metrics = loss_of(log_probs, answers, GRPO)
    assert (total, count, metrics["truncated"]) == (0, 2, 0.5)
    masked = dataclasses.replace(GRPO, mask_truncated=True)
    assert loss_of(log_probs, answers, masked)[:2] == (-1, 1)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("why", ["zero variance", "no tokens"])
def test_a_batch_that_is_left_out_whole_gives_exactly_nothing(objective, why):
    log_probs, answers = answers_of(
        np.full((2, 3), -200.0),
        [0, 0],
        zero_variance=[why == "zero variance"] * 2,
        mask=np.full((2, 3), why == "zero variance"),
        # As far from the old policy and the reference as to overflow where it was computed.
        old_log_probs=np.zeros((2, 3), "f4"),
        reference_log_probs=np.zeros((2, 3), "f4"),
    )
    options = replace(GRPO, objective=objective, kl=0.01)
    run = jax.jit(jax.value_and_grad(lambda x: policy_loss(x, x, answers, options)[:2], has_aux=1))
    (total, count), gradient = run(log_probs)
    assert float(total) == float(count) == 0
    np.testing.assert_array_equal(gradient, 0)


def random_case(n=8, slots=6):
    rng = np.random.default_rng(0)
    near = rng.normal(size=(3, n, slots)) * 0.3
    log_probs = -1 + near[0]
    return answers_of(
        log_probs,
        rng.normal(size=n),
        mask=np.arange(slots) < rng.integers(1, slots + 1, (n, 1)),
        zero_variance=np.arange(n) // 2 == 1,
        truncated=np.arange(n) == 5,
        old_log_probs=log_probs + near[1],
        reference_log_probs=log_probs + near[2],
        sampler_log_probs=log_probs + near[1] + 0.01,
    )


ARMS = [
    replace(GRPO, kl=0.3),
    replace(GRPO, objective="dr_grpo", clip=0.1, kl=0.3, mask_truncated=True),
]


@pytest.mark.parametrize("options", ARMS, ids=lambda options: options.objective)
def test_gradients_are_those_of_finite_differences(options):
    with jax.enable_x64(True):
        log_probs, answers = random_case()
        loss = jax.jit(lambda x: policy_loss(x, 0 * x, answers, options)[0])
        gradient, rng = jax.jit(jax.grad(loss))(log_probs), np.random.default_rng(1)
        for _ in range(4):
            step = rng.normal(size=log_probs.shape) * 1e-6
            difference = float(loss(log_probs + step) - loss(log_probs - step)) / 2
            assert difference == pytest.approx(float((gradient * step).sum()), rel=1e-6)


@pytest.mark.parametrize("options", ARMS, ids=lambda options: options.objective)
def test_micro_batches_give_the_loss_gradient_and_metrics_of_the_whole_batch(options):
    log_probs, answers = jax.tree.map(
        lambda x: x.astype("f4") if x.dtype == "f8" else x, random_case()
    )

    def run(log_probs, answers):
        loss = lambda x: (lambda total, *rest: (total, rest))(  # noqa: E731
            *policy_loss(x, -log_probs, answers, options)
        )
        return jax.value_and_grad(loss, has_aux=True)(log_probs)

    (total, (count, totals)), gradient = jax.jit(run)(log_probs, answers)
    # Answers of one group may be apart: what they share is already in their advantages.
    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (log_probs, answers))
    (parts, (counts, parts_totals)), gradients = jax.jit(jax.vmap(run))(*split)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    close(parts.sum() / counts.sum(), total / count)
    close(gradients.reshape(gradient.shape) / counts.sum(), gradient / count)
    jax.tree.map(close, policy_metrics(parts_totals), policy_metrics(totals))


def test_the_samplers_log_probs_are_compared_with_the_trainers():
    log_probs, answers = answers_of(
        [[-1, -2, -3]],
        [1],
        mask=[[True, True, False]],
        sampler_log_probs=np.array([[-1.5, -2.1, 5]]),
    )
    entropy = np.array([[2.0, 1.0, 7.0]], np.float32)
    _, _, metrics = loss_of(log_probs, answers, GRPO, entropy)
    assert metrics["sampler_difference"] == pytest.approx(0.3)
    assert metrics["sampler_difference_max"] == pytest.approx(0.5)
    assert metrics["entropy"] == pytest.approx(1.5)


# ---- a policy that learns: two tokens an answer, of 6 ids each, from a table of logits

SLOTS, IDS, QUERIES, SAMPLES = 2, 6, 4, 8


def log_probs_of(table, tokens):
    slots = jnp.broadcast_to(jnp.eye(SLOTS), (len(tokens), SLOTS, SLOTS))
    return token_log_probs(slots, lambda hidden: hidden @ table, tokens, 1)


@jax.jit
def sample(table, start, key):
    """Tokens, and their log-probs under the policy and the reference."""
    tokens = jax.random.categorical(key, table, shape=(QUERIES * SAMPLES, SLOTS))
    return tokens, log_probs_of(table, tokens)[0], log_probs_of(start, tokens)[0]


@functools.partial(jax.jit, static_argnames="options")
def gradient_of(table, tokens, answers, options):
    def loss(table):
        total, count, _ = policy_loss(*log_probs_of(table, tokens), answers, options)
        return total / jnp.maximum(count, 1)

    return jax.grad(loss)(table)


def train(reward, options, steps, inner_epochs=1, learning_rate=1.0):
    """The mean reward of each step, and the table before and after."""
    table = start = jnp.asarray(np.random.default_rng(0).normal(size=(SLOTS, IDS)), jnp.float32)
    means = []
    for step in range(steps):
        tokens, old, reference = sample(table, start, jax.random.key(step))
        rewards = reward(np.asarray(tokens)).astype(np.float32)
        means.append(rewards.mean())
        groups = group_advantages(rewards.reshape(QUERIES, SAMPLES), options.objective == "grpo")
        _, answers = answers_of(old, groups.values.ravel(), reference_log_probs=reference)
        answers["zero_variance"] = np.repeat(groups.zero_variance, SAMPLES)
        for _ in range(inner_epochs):
            table -= learning_rate * gradient_of(table, tokens, answers, options)
    return means, start, table


@pytest.mark.parametrize(
    ("options", "inner_epochs"),
    [
        (replace(GRPO, kl=0.001), 1),
        (replace(GRPO, kl=0.001), 3),
        (replace(GRPO, objective="dr_grpo"), 1),
    ],
)
def test_a_policy_learns_to_prefer_what_is_rewarded(options, inner_epochs):
    prefers = lambda tokens: tokens[:, 0] == 3  # noqa: E731
    rate = 4.0 if options.objective == "dr_grpo" else 1.0  # its advantages are not scaled up
    means, *_ = train(prefers, options, 60, inner_epochs, rate)
    assert np.mean(means[:3]) < 0.4
    assert np.mean(means[-10:]) > 0.95


def test_a_constant_reward_moves_no_parameter():
    means, start, table = train(lambda tokens: np.full(len(tokens), 0.7), replace(GRPO, kl=0.5), 5)
    assert means[-1] == pytest.approx(0.7)
    np.testing.assert_array_equal(start, table)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"objective": "dr-grpo"}, 'did you mean "dr_grpo"'),
        ({"clip": 2.0}, "give 0 to 1"),
        ({"kl": float("nan")}, "policy.kl is nan"),
    ],
)
def test_a_wrong_policy_option_is_named_with_what_was_expected(wrong, says):
    with pytest.raises(UserError, match=says):
        replace(GRPO, **wrong)
