"""Credit to single pairs: how much of an answer's reward each of its attributes earned.

Axes: Q queries · G answers of a query, a group · B = Q G · P distinct pairs of a group ·
T tokens of an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from afmrl_jax.assembly.description import pairs_of_tokens
from afmrl_jax.assembly.generator import Answer
from afmrl_jax.attributes.comparison import fold
from afmrl_jax.core.options import Options, among, between
from afmrl_jax.rl.advantages import Advantages

PairNumbers = list[dict[str, float]]  # of each of B answers, name -> a number of that pair


@dataclass(frozen=True)
class PairCredit(Options, section="policy"):
    """What the tokens of an answer's pairs get as their advantage."""

    # answer: the answer's, as all its tokens. pairs: each pair its own, by `pair_worths`.
    credit: str = among("answer", "pairs")
    credit_ridge: float = between(1e-6, 1e6)  # answers' worth of doubt in each pair
    credit_checks: int = between(0)  # answers of a step; each of their pairs costs an embedding


def pair_worths(
    attributes: Sequence[Mapping[str, str]], rewards: np.ndarray, ridge: float
) -> PairNumbers:
    """What holding each pair adds to the reward of an answer of its group, in units of the reward.

    A ridge regression of a group's rewards on which answers hold which pair. With X[g, p] = 1 where
    answer g holds pair p, both centred,
        w = argmin |r - X w|^2 + ridge |w|^2 = X' (X X' + ridge I)^-1 r.
    Where pairs come and go independently, and a share f of the G answers holds one, its w is the
    mean reward of those that do less that of those that don't, times G f (1 - f) /
    (G f (1 - f) + ridge). A pair that all answers hold is worth 0: nothing tells its worth. Pairs
    that come together share what they are worth.

    attributes: of B answers, {} of an invalid one, which is left out. rewards: float[Q, G]. Pairs
    are equal where both are when folded. Returns {name: w} of each answer.
    """
    samples, worths = rewards.shape[1], []
    for first, group in zip(range(0, len(attributes), samples), rewards.astype(np.float64)):
        held = [
            {name: (fold(name), fold(value)) for name, value in answer.items()}
            for answer in attributes[first : first + samples]
        ]
        of_pair = _regressed([set(pairs.values()) for pairs in held], group, ridge)
        worths += [{name: of_pair[pair] for name, pair in pairs.items()} for pairs in held]
    return worths


def _regressed(
    held: Sequence[set[tuple[str, str]]], rewards: np.ndarray, ridge: float
) -> dict[tuple[str, str], float]:
    """The worth of each pair that is held in a group. held, rewards: of G answers."""
    valid = [g for g, pairs in enumerate(held) if pairs]
    pairs = sorted(set().union(*held))
    if not pairs:
        return {}
    indicators = np.array([[pair in held[g] for pair in pairs] for g in valid], np.float64)
    indicators -= indicators.mean(axis=0)
    centred = rewards[valid] - rewards[valid].mean()
    # As many equations as answers, of which there are mostly fewer than pairs.
    products = indicators @ indicators.T + ridge * np.eye(len(valid))
    return dict(zip(pairs, (indicators.T @ np.linalg.solve(products, centred)).tolist()))


def pair_advantages(
    worths: PairNumbers, rewards: np.ndarray, advantages: Advantages
) -> PairNumbers:
    """The advantages of the tokens of each pair: what it is worth, in the units of the answers'.

    Where some answers of a group are invalid, a valid one is better by that alone: its pairs get
    the mean reward of valid answers less the group's as well, as the rest of it does.
    worths: of B answers, {} of an invalid one. rewards: float[Q, G], advantages: of them.
    """
    valid = np.array([bool(pairs) for pairs in worths]).reshape(rewards.shape)
    counts = np.maximum(valid.sum(axis=1), 1)
    means = np.where(valid, rewards, 0).sum(axis=1, dtype=np.float64) / counts
    shifts = means - rewards.mean(axis=1, dtype=np.float64)
    groups = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    return [
        {name: float((shifts[q] + worth) / advantages.scales[q]) for name, worth in pairs.items()}
        for q, pairs in zip(groups, worths)
    ]


def token_advantages(
    of_answers: np.ndarray,
    of_pairs: PairNumbers,
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    length: int,
) -> np.ndarray:
    """float32[Q, G, T]: of tokens that write a pair that of the pair, of all others that of the
    answer. of_answers: float32[Q, G]. of_pairs: {} where an answer's pairs have none of their own.
    length: T."""
    values = np.repeat(of_answers[..., None], length, axis=-1)
    for place, answer, own in zip(np.ndindex(of_answers.shape), answers, of_pairs):
        names = pairs_of_tokens(answer, tokenizer) if own else ()
        for token, name in enumerate(names):
            if name is not None:
                values[place][token] = own[name]
    return values


def checked_pairs(worths: PairNumbers, answers: int) -> list[tuple[int, str]]:
    """The number of the answer and the name of each pair whose worth is checked: all pairs of so
    many valid answers, spread evenly over the step's."""
    valid = [i for i, pairs in enumerate(worths) if pairs]
    places = np.linspace(0, len(valid) - 1, min(answers, len(valid))).round().astype(int)
    return [(valid[place], name) for place in places for name in worths[valid[place]]]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, of float[n]; 0 where either has no variance."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
