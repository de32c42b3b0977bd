"""Advantages: how much better an answer was than the others to the same query.

Axes: Q queries · G answers of a query, a group.
"""

from typing import NamedTuple

import numpy as np


class Advantages(NamedTuple):
    """Advantages of a step's answers.

    values: float32[Q, G]. std: float32[Q], of the rewards of a group. scales: float64[Q], by which
    a difference of rewards was divided, 1 where by nothing. zero_variance: bool[Q], True where all
    rewards of a group are equal: such a group teaches nothing and is left out of the loss.
    """

    values: np.ndarray
    std: np.ndarray
    scales: np.ndarray
    zero_variance: np.ndarray


def group_advantages(rewards: np.ndarray, scale: bool, epsilon: float = 1e-4) -> Advantages:
    """(r - mean) / (std + epsilon) within each group (GRPO, arXiv 2402.03300, section 4.1.2).

    rewards: float32[Q, G], finite. scale: False leaves the division out (Dr. GRPO, 2503.20783: the
    division gives more weight to queries that are nearly always, or nearly never, answered well).
    The std is the population's. epsilon keeps rounding differences from becoming advantages of
    size 1.
    Raises ValueError where a reward is not finite or a group has fewer than 2 answers.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards are {list(rewards.shape)}: expected [queries, 2 or more answers]"
        )
    if not np.isfinite(rewards).all():
        raise ValueError(f"{(~np.isfinite(rewards)).sum()} rewards are not finite")
    # In float32 the mean of equal rewards may differ from them, and their std be 1e-8 instead of 0.
    exact = rewards.astype(np.float64)
    zero_variance = exact.max(axis=1) == exact.min(axis=1)
    std = np.where(zero_variance, 0.0, exact.std(axis=1))
    values = exact - exact.mean(axis=1, keepdims=True)
    values[zero_variance] = 0.0
    scales = np.where(zero_variance | (not scale), 1.0, std + epsilon)
    values /= scales[:, None]
    return Advantages(values.astype(np.float32), std.astype(np.float32), scales, zero_variance)
