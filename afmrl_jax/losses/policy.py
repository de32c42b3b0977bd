"""The policy gradient of groups of answers: GRPO (arXiv 2402.03300) and Dr. GRPO (2503.20783).

For token t of answer b, with ratio r = exp(log pi - log pi_old), advantage A_bt, of the answer or
of the pair in it that the token writes, and d = log pi_ref - log pi,
    L_bt = -min(r A_bt, clip(r, 1 - c, 1 + c) A_bt) + beta (exp(d) - d - 1).
GRPO averages L over the tokens of each answer, then over answers. Dr. GRPO sums over the tokens and
divides by a constant length, so that a long wrong answer is no better than a short one.

All log-probs must be of the same distribution: either tokens are drawn at temperature 1, without
top-k and top-p, or the trainer's logits are divided by the sampler's temperature too. In the first
inner epoch r is 1 and the loss about 0 by construction: watch rewards and gradients, not the loss.
Axes: B answers, the samples of a query adjacent · T token slots of an answer · A micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from afmrl_jax.core.options import Options, among, between
from afmrl_jax.core.types import Metrics


@dataclass(frozen=True)
class PolicyGradient(Options, section="policy"):
    """Which policy gradient. Dr. GRPO's advantages are not divided by the std either."""

    objective: str = among("grpo", "dr_grpo")
    clip: float = between(0, 1)  # c of the clipped ratio
    kl: float = between(0, 100)  # beta, weight of the divergence from the reference
    # Leave answers that were cut at the token limit out of the loss: DAPO's overlong filtering
    # (arXiv 2503.14476), TRL's mask_truncated_completions. Their rewards stay in the group's mean.
    # False: their rewards count, which teaches answers to end in time where cut ones are invalid.
    mask_truncated: bool


def policy_loss(
    log_probs: jax.Array,
    entropy: jax.Array,
    answers: Mapping[str, jax.Array],
    options: PolicyGradient,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of B answers, with gradient to log_probs alone.

    log_probs, entropy: float32[B, T], of `token_log_probs` under the policy. answers:
      mask                bool[B, T], the answers' tokens, the stop token included; a row without
                          any token only fills the batch
      advantages          float32[B, T]; zero_variance: bool[B], of `rl.advantages`
      truncated           bool[B], no stop token within T
      old_log_probs       float32[B, T], of the policy before this step's first update
      reference_log_probs float32[B, T], of the reference; may be left out where kl is 0
      sampler_log_probs   float32[B, T], as the sampler saw them; may be left out
    T is Dr. GRPO's constant length: the sampler's max_new_tokens, the same in every step.

    Answers of zero-variance groups are left out with their KL, and so are truncated answers with
    mask_truncated. Returns (sum, denominator, totals), float32 scalars: the loss is the
    sums over micro-batches divided by max(the denominators' sum, 1). When all answers are left out
    both are 0 and so is every gradient, exactly. totals are for `policy_metrics`.
    """
    mask, old = answers["mask"], answers["old_log_probs"]
    advantages = answers["advantages"]
    is_answer = mask.any(axis=1)
    kept = is_answer & ~answers["zero_variance"]
    if options.mask_truncated:
        kept &= ~answers["truncated"]
    trained = mask & kept[:, None]
    # Unused slots are zeroed before the exponential, so that they can't become inf or NaN.
    ratio = jnp.exp(jnp.where(trained, log_probs - old, 0))
    clipped = jnp.clip(ratio, 1 - options.clip, 1 + options.clip)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    if options.kl:
        losses += options.kl * _k3(log_probs, answers["reference_log_probs"], trained)
    sums = jnp.sum(jnp.where(trained, losses, 0), axis=1)
    count = jnp.sum(kept, dtype=sums.dtype)
    if options.objective == "grpo":
        sums /= jnp.maximum(jnp.sum(mask, axis=1), 1)
        denominator = count
    else:
        denominator = count * mask.shape[1]
    totals = {
        "answers": is_answer,
        "skipped": is_answer & answers["zero_variance"],
        "truncated": is_answer & answers["truncated"],
        "tokens": mask,
        "trained_tokens": trained,
        # Where the clipped side is the smaller one, the token gets no gradient but KL's.
        "clipped": trained & (clipped * advantages < ratio * advantages),
        "ratio": jnp.where(trained, ratio, 0),
        "entropy": jnp.where(mask, entropy, 0),
    }
    totals |= _differences(log_probs, answers)
    with_maximum = totals.keys() & {"ratio", "sampler_difference"}
    maxima = {f"{name}_max": totals[name] for name in sorted(with_maximum)}
    totals = {name: jnp.sum(x, dtype=jnp.float32) for name, x in totals.items()}
    totals |= {name: jnp.max(x) for name, x in maxima.items()}
    return jnp.sum(sums), denominator, lax.stop_gradient(totals)


def _differences(log_probs: jax.Array, answers: Mapping[str, jax.Array]) -> Metrics:
    """float32[B, T]: the KL from the reference, and the sampler's difference, as far as known."""
    mask, differences = answers["mask"], {}
    if "reference_log_probs" in answers:
        differences["kl"] = _k3(log_probs, answers["reference_log_probs"], mask)
    if "sampler_log_probs" in answers:
        difference = jnp.abs(answers["old_log_probs"] - answers["sampler_log_probs"])
        differences["sampler_difference"] = jnp.where(mask, difference, 0)
    return differences


def policy_metrics(totals: Mapping[str, jax.Array]) -> Metrics:
    """Metrics to log, float32 scalars, of a batch or of A micro-batches.

    totals: `policy_loss`'s, float32[], or stacked, float32[A]. Returns
      clip_share, ratio_mean, ratio_max   over the tokens trained on
      kl, entropy                         over all tokens of answers, in nats
      sampler_difference(_max)            |old - sampler's| log-prob, over the same tokens
      answer_tokens                       mean length
      skipped, truncated                  shares of the answers
    0 where there is nothing to average.
    """
    whole = {
        name: jnp.max(x) if name.endswith("_max") else jnp.sum(x) for name, x in totals.items()
    }
    tokens, trained, answers = (
        jnp.maximum(whole[name], 1) for name in ("tokens", "trained_tokens", "answers")
    )
    metrics = {
        "clip_share": whole["clipped"] / trained,
        "ratio_mean": whole["ratio"] / trained,
        "answer_tokens": whole["tokens"] / answers,
        "skipped": whole["skipped"] / answers,
        "truncated": whole["truncated"] / answers,
    }
    averaged = {"kl", "entropy", "sampler_difference"} & whole.keys()
    metrics |= {name: whole[name] / tokens for name in sorted(averaged)}
    return metrics | {name: x for name, x in whole.items() if name.endswith("_max")}


def _k3(log_probs: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(d) - d - 1, d = log pi_ref - log pi: never negative, its mean the KL from the reference.

    (Schulman, "Approximating KL divergence", 2020.) 0 outside the mask.
    """
    d = jnp.where(mask, reference - log_probs, 0)
    return jnp.expm1(d) - d
