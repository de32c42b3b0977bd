"""Metrics of rankings: ranks of the relevant items, recall, MRR, mAP, nDCG, and intervals.

Axes: Q queries · K ranks · R relevant items, padded with -1.

A query without any relevant item scores 0 everywhere: drop such queries before taking means.
"""

from collections.abc import Sequence

import numpy as np

# Cosines closer than this count as equal: float32's rounding (some 1e-7) differs between blocks of
# a matrix product, so that of two equal vectors the place in the gallery would decide.
TIE = 1e-6
Z = 1.96  # standard deviations around the mean that hold 95% of a normal distribution


def relevant_ranks(ranked: np.ndarray, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The rank of each relevant item in its query's ranking; a tie counts against the item.

    ranked: int[Q, K], best first, an item at most once, -1 where the ranking is short. scores:
    float[Q, K], descending, -inf there. relevant: int[Q, R], an item at most once.

    Returns int32[Q, R]: ranks counted from 1; 0 for padding and for items that are not in the
    ranking. A wrong item is ranked before a relevant one unless its score is lower by more than
    `TIE`. Where such a tie reaches the end of a ranking that is not short, tied items may follow:
    the relevant item then gets rank 0. Hence search one rank deeper than the last that matters.
    """
    places = places_of(ranked, relevant)
    is_ranked = places >= 0
    rows, at = np.arange(len(ranked))[:, None], np.maximum(places, 0)
    right = np.zeros(ranked.shape, bool)
    right[np.nonzero(is_ranked)[0], places[is_ranked]] = True
    descending = scores.astype(np.float64)
    least = descending[rows, at] - TIE
    ends = np.array([np.searchsorted(-s, -t, side="right") for s, t in zip(descending, least)])
    ends = ends.reshape(relevant.shape)  # np.array of no rows has no second axis
    wrong_before = np.pad(np.cumsum((ranked >= 0) & ~right, axis=1), ((0, 0), (1, 0)))
    right_until = np.cumsum(right, axis=1)
    is_short = (ranked < 0).any(axis=1, keepdims=True)
    has_rank = is_ranked & (is_short | (ends < ranked.shape[1]))
    return np.where(has_rank, wrong_before[rows, ends] + right_until[rows, at], 0).astype(np.int32)


def places_of(ranked: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The column of ranked: int[Q, K] that holds each of items: int[Q, R], -1 where none does.

    A row of either holds an item at most once, and -1 as padding. Returns int[Q, R].
    """
    both = np.concatenate([ranked, items], axis=1)
    order = np.argsort(both, axis=1, kind="stable")  # equal items adjacent, ranked before items
    both = np.take_along_axis(both, order, axis=1)
    rows, at = np.nonzero((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0))
    places = np.full(items.shape, -1)
    places[rows, order[rows, at + 1] - ranked.shape[1]] = order[rows, at]
    return places


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """Whether any of a query's relevant items is among its first k ranks (R@k, instance retrieval).

    ranks: int[Q, R], as `relevant_ranks` gives them. Returns bool[Q].
    """
    return ((ranks > 0) & (ranks <= k)).any(axis=1)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """1 / rank of the first relevant item, 0 where none is in the ranking. Its mean is the MRR.

    ranks: int[Q, R]. Returns float64[Q].
    """
    return np.divide(1.0, ranks, out=np.zeros(ranks.shape), where=ranks > 0).max(axis=1, initial=0)


def average_precision(ranks: np.ndarray, n_relevant: np.ndarray) -> np.ndarray:
    """Precision at each relevant item's rank, averaged over *all* of them; its mean is the mAP.

    The divisor is the number of relevant items in the gallery, and an unranked item adds 0: with a
    ranking shorter than the gallery this is a lower bound.

    ranks: int[Q, R]. n_relevant: int[Q]. Returns float64[Q].
    """
    last = np.iinfo(np.int32).max
    in_order = np.sort(np.where(ranks > 0, ranks, last), axis=1)  # unranked items go last
    found_so_far = np.arange(1, ranks.shape[1] + 1)
    precision = np.where(in_order < last, found_so_far / in_order, 0.0)
    return precision.sum(axis=1) / np.maximum(n_relevant, 1)


def ndcg_at_k(ranks: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Discounted gain of the first k ranks, divided by that of the best possible ranking (nDCG@k).

    Binary relevance: gain 1, discount log2(1 + rank) (Jarvelin and Kekalainen, 2002).

    ranks: int[Q, R]. n_relevant: int[Q]. Returns float64[Q].
    """
    counted = (ranks > 0) & (ranks <= k)
    gain = np.where(counted, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0).sum(axis=1)
    best = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))])
    return gain / np.maximum(best[np.minimum(n_relevant, k)], best[1])


def score_ranks(
    ranks: np.ndarray, n_relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """All metrics of queries whose relevant items' ranks are known.

    ranks: int[Q, R], as `relevant_ranks` gives them. n_relevant: int[Q], all relevant items in the
    gallery. Returns float64[Q] for each of `recall@K` (K in ks), `mrr`,
    `map` and `ndcg@10`.
    """
    scores = {f"recall@{k}": recall_at_k(ranks, k).astype(np.float64) for k in ks}
    scores["mrr"] = reciprocal_rank(ranks)
    scores["map"] = average_precision(ranks, n_relevant)
    scores["ndcg@10"] = ndcg_at_k(ranks, n_relevant, 10)
    return scores


def interval95(values: np.ndarray) -> float:
    """Half the width of Wilson's 95% interval of a mean over queries (Wilson, 1927).

    values: float[Q], Q > 0, each in [0, 1]. For values of 0 or 1 this is Wilson's formula; other
    values enter it by their sum of squares. Unlike 1.96 standard errors it is never 0 and holds for
    few queries. Near 0 and 1 the interval lies to one side of the mean: for six hits in six it
    spans .61 to 1, and half its width is .195.

    The formula assumes independent queries; those of one product are not quite independent, so the
    true interval is somewhat wider.
    """
    values = np.asarray(values, np.float64)
    squares = np.square(values - values.mean()).sum()
    return float(Z * np.sqrt(squares + Z**2 / 4) / (len(values) + Z**2))


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The mean gain of the same queries, after - before, and half the width of its 95% interval.

    The interval is Agresti and Min's (2005): it adds two queries, half of each of the gains 0, 0, 1
    and -1. It is never 0, also where all queries gain the same; and it is narrower than the
    intervals of the two means, because the difficulty of a query cancels.

    before, after: float[Q] in [0, 1], of the same queries in the same order. Raises ValueError
    where their shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"{before.shape} values cannot be paired with {after.shape}")
    gains = np.asarray(after, np.float64) - before
    n = len(gains) + 2
    squares = np.square(gains).sum() + 1 - gains.sum() ** 2 / n
    return float(gains.mean()), float(Z * np.sqrt(squares) / n)


def normal95(values: np.ndarray) -> float:
    """Half the width of the normal 95% interval, 1.96 standard errors, of a mean of values without
    bounds, such as margins. values: float[Q]. NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return float(Z * np.std(values, ddof=1) / np.sqrt(len(values)))
