"""Rewards: what an answer's attributes are worth, judged by what the enriched query finds.

Every answer is searched for: its attributes are appended to its query, or nothing where its format
is invalid. What the searches found comes in as arrays; all here is pure numpy on the host.
Axes: B = Q x G answers, the G of a query adjacent · Q queries · n rows of one search, B or Q
· K ranks · R relevant gallery listings, padded with -1.
"""

from dataclasses import dataclass

import numpy as np

from afmrl_jax.core.options import Options, among, between
from afmrl_jax.retrieval.metrics import (
    ndcg_at_k,
    places_of,
    recall_at_k,
    reciprocal_rank,
    relevant_ranks,
)

GALLERY_SHARE = 20  # k is at most a 20th of the gallery


@dataclass(frozen=True)
class Reward(Options, section="reward"):
    """Which reward."""

    kind: str = among("recall", "mrr", "ndcg", "margin")  # from coarse (the paper's) to smooth
    k: int = between(1, 1_000_000)  # of recall and ndcg
    gain: bool  # less what the query finds without attributes
    invalid: float = between(-100, 0)  # of an answer in an invalid format
    length_cost: float = between(0, 100)  # a token

    @property
    def measure(self) -> str:
        """The name of what is rewarded, among `measures`."""
        return measure_at(self.kind, self.k)


@dataclass(frozen=True)
class Found:
    """What a search found for n rows, and where the right answers stand.

    ids: int64[n, K], best first, -1 where the ranking is short; scores: float32[n, K], their
    cosines. relevant: int64[n, R], gallery ids of the same product; relevant_scores:
    float32[n, R], the cosines of all of them, found or not. own: int64[n], the query listing's
    gallery id, -1 where it has none: it is taken out of all of these, so that it never counts.
    """

    ids: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray
    relevant_scores: np.ndarray
    own: np.ndarray


def measure_at(kind: str, k: int) -> str:
    """The name among `measures` of a kind of reward at k."""
    return f"{kind}@{k}" if kind in ("recall", "ndcg") else kind


def bounded_k(k: int, gallery: int) -> int:
    """k, or less where the gallery (its number of listings) is small.

    Among 100 listings nearly every query finds its product in the first 50, so that the reward
    is a constant: k is at most a 20th of the gallery, where chance finds one right listing in 20.
    """
    return max(1, min(k, gallery // GALLERY_SHARE))


def rewards(
    answers: Found,
    plain: Found | None,
    valid: np.ndarray,
    lengths: np.ndarray,
    samples: int,
    options: Reward,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards of B answers, and their parts.

    answers: the searches of the B enriched queries, K > options.k + 1. plain: the Q queries'
    searches without attributes; None unless the gain is wanted. valid: bool[B], the format's
    verdict. lengths: int[B], tokens. samples: G.

    A valid answer's reward is its measure, less the query's own under `gain`, less its length's
    cost. An invalid one gets `invalid` plus the worst valid reward of its group or 0, whichever is
    lower: breaking the format never pays, also where measures are negative. `gain` moves all valid
    answers of a group by one number: it makes rewards comparable between queries, and changes
    advantages only where some of the group are invalid.

    Returns float32[B], and float32[B] for each of recall@1, recall@K, mrr, ndcg@K, margin (of
    what was searched, valid or not), gain (where `plain` is given), valid.
    Raises ValueError where a ranking is too short or a query has nothing relevant to find.
    """
    parts = measures(answers, options.k)
    worth = parts[options.measure] - options.length_cost * lengths
    if plain is not None:
        alone = np.repeat(measures(plain, options.k)[options.measure], samples)
        parts["gain"] = parts[options.measure] - alone
        worth = worth - alone if options.gain else worth
    elif options.gain:
        raise ValueError("the gain needs what the queries find alone: give `plain`")
    groups = np.where(valid, worth, np.inf).reshape(-1, samples)
    worst = np.minimum(groups.min(axis=1), 0.0)
    worth = np.where(valid, worth, np.repeat(worst, samples) + options.invalid)
    parts["valid"] = valid
    return worth.astype(np.float32), {name: x.astype(np.float32) for name, x in parts.items()}


def measures(found: Found, k: int) -> dict[str, np.ndarray]:
    """recall@1, recall@k, mrr, ndcg@k and margin of n searches, float64[n] each.

    A tie counts against a right listing, as in evaluation (`metrics.relevant_ranks`). The margin is
    the best right cosine less the best wrong one, above 0 where the first rank is right: no two
    answers have quite the same, where Recall@k has two values.
    Raises ValueError as `rewards` does.
    """
    relevant = np.where(found.relevant == found.own[:, None], -1, found.relevant)
    right = relevant >= 0
    if not right.any(axis=1).all():
        rows = np.flatnonzero(~right.any(axis=1))
        raise ValueError(
            f"{len(rows)} queries (the first: row {rows[0]}) have no other listing of their "
            "product in the gallery: leave them out before sampling"
        )
    # The query's own listing goes last and is cut off; the rest close up.
    order = np.argsort(found.ids == found.own[:, None], axis=1, kind="stable")[:, :-1]
    ids, scores = (np.take_along_axis(x, order, axis=1) for x in (found.ids, found.scores))
    if ids.shape[1] <= k:
        raise ValueError(
            f"{ids.shape[1]} ranks are left without the query's own listing, a reward at {k} needs "
            f"one more than {k}, to see whether a tie goes on: search with k={k + 2}"
        )
    wrong = (ids >= 0) & (places_of(relevant, ids) < 0)
    if not wrong.any(axis=1).all():
        raise ValueError(
            f"a ranking of {ids.shape[1]} ranks holds no wrong listing: search deeper than the "
            f"{right.sum(axis=1).max()} that are relevant"
        )
    best_right = np.where(right, found.relevant_scores, -np.inf).max(axis=1)
    best_wrong = np.where(wrong, scores, -np.inf).max(axis=1)
    ranks = relevant_ranks(ids, scores, relevant)
    return {
        "recall@1": recall_at_k(ranks, 1).astype(np.float64),
        f"recall@{k}": recall_at_k(ranks, k).astype(np.float64),
        "mrr": reciprocal_rank(ranks),
        f"ndcg@{k}": ndcg_at_k(ranks, right.sum(axis=1), k),
        "margin": best_right.astype(np.float64) - best_wrong,
    }
