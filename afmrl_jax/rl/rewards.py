"""Rewards of answers, by the search results of the queries that they enrich.

Every answer is searched for: its attributes are appended to its query, or nothing where its format
is invalid. The results come in as arrays; all functions are pure numpy on the host.
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
    """The reward of an answer."""

    kind: str = among("recall", "mrr", "ndcg", "margin")  # from coarse (the paper's) to smooth
    k: int = between(1, 1_000_000)  # of recall and ndcg
    gain: bool  # whether the measure of the query without attributes is subtracted
    invalid: float = between(-100, 0)  # of an answer in an invalid format
    length_cost: float = between(0, 100)  # a token

    @property
    def measure(self) -> str:
        """The name of the rewarded measure, among `measures`."""
        return measure_at(self.kind, self.k)


@dataclass(frozen=True)
class Retrieved:
    """The search results of n queries, and the relevant listings.

    ids: int64[n, K], best first, -1 where the ranking is short; scores: float32[n, K], their
    cosines. relevant: int64[n, R], gallery ids of the same product; relevant_scores:
    float32[n, R], the cosines of all of them, ranked or not. self_ids: int64[n], the gallery id of
    the query's listing, -1 where it has none: the measures leave it out of all of these.
    """

    ids: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray
    relevant_scores: np.ndarray
    self_ids: np.ndarray


def measure_at(kind: str, k: int) -> str:
    """The name among `measures` of a kind of reward at k."""
    return f"{kind}@{k}" if kind in ("recall", "ndcg") else kind


def bounded_k(k: int, gallery: int) -> int:
    """k, or less where the gallery is small. gallery: its number of listings.

    Among 100 listings nearly every query finds its product in the first 50, so that the reward
    would be constant: k is at most a 20th of the gallery, so that a random ranking has a right
    listing among the first k in one of 20 cases.
    """
    return max(1, min(k, gallery // GALLERY_SHARE))


def rewards(
    answers: Retrieved,
    plain: Retrieved | None,
    valid: np.ndarray,
    lengths: np.ndarray,
    samples: int,
    options: Reward,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards of B answers, and their parts.

    answers: results of the B enriched queries, K > options.k + 1. plain: results of the Q queries
    without attributes; None unless the gain is measured. valid: bool[B], whether the format is
    kept. lengths: int[B], tokens. samples: G.

    The reward of a valid answer is its measure, less that of the plain query under `gain`, less the
    cost of its length. The reward of an invalid answer is `invalid` plus the lower of 0 and the
    worst valid reward of its group: breaking the format never pays, also where measures are
    negative. `gain` shifts all valid answers of a group by one number: it makes rewards comparable
    between queries, and changes advantages only where some answers of the group are invalid.

    Returns float32[B], and float32[B] for each of recall@1, recall@K, mrr, ndcg@K, margin (of
    valid and invalid answers), gain (with `plain`), valid.
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


def measures(retrieved: Retrieved, k: int) -> dict[str, np.ndarray]:
    """recall@1, recall@k, mrr, ndcg@k and margin of n searches, float64[n] each.

    A tie counts against a right listing, as in evaluation (`metrics.relevant_ranks`). The margin is
    the best right cosine less the best wrong cosine; it is above 0 where the first rank is right.
    It differs between nearly any two answers, while Recall@k has two values only.
    Raises ValueError as `rewards` does.
    """
    is_self = retrieved.relevant == retrieved.self_ids[:, None]
    relevant = np.where(is_self, -1, retrieved.relevant)
    right = relevant >= 0
    if not right.any(axis=1).all():
        rows = np.flatnonzero(~right.any(axis=1))
        raise ValueError(
            f"{len(rows)} queries (the first: row {rows[0]}) have no other listing of their "
            "product in the gallery: leave them out before sampling"
        )
    # The query's listing goes last and is cut off; the others move up.
    is_self = retrieved.ids == retrieved.self_ids[:, None]
    order = np.argsort(is_self, axis=1, kind="stable")[:, :-1]
    ids, scores = (np.take_along_axis(x, order, axis=1) for x in (retrieved.ids, retrieved.scores))
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
    best_right = np.where(right, retrieved.relevant_scores, -np.inf).max(axis=1)
    best_wrong = np.where(wrong, scores, -np.inf).max(axis=1)
    ranks = relevant_ranks(ids, scores, relevant)
    return {
        "recall@1": recall_at_k(ranks, 1).astype(np.float64),
        f"recall@{k}": recall_at_k(ranks, k).astype(np.float64),
        "mrr": reciprocal_rank(ranks),
        f"ndcg@{k}": ndcg_at_k(ranks, right.sum(axis=1), k),
        "margin": best_right.astype(np.float64) - best_wrong,
    }
