"""Rewards of answers, by the search results of the queries that they enrich.

Every answer is searched for: its attributes are appended to its query, or nothing where its format
is invalid. A reward is a function (completions, queries, retrieved) -> float32[B], a measure or of
a user's module; what it gives, an answer's format and its length make up what an answer is worth.
All functions are pure numpy on the host.
Axes: B = Q x G answers, the G of a query adjacent · Q queries · n rows of one search, B or Q
· K ranks · R relevant gallery listings, padded with -1.
"""

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from afmrl_jax.attributes.text import Parsed, Verdict
from afmrl_jax.catalog.listings import Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import load_named
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
class Completion:
    """An answer as a reward sees it. attributes: what it adds to its query; {} where it breaks the
    format. tokens: its length, the stop token included."""

    text: str
    attributes: Mapping[str, str]
    verdict: Verdict
    tokens: int

    @classmethod
    def of(cls, text: str, parsed: Parsed, tokens: int) -> Self:
        valid = parsed.verdict is Verdict.VALID
        return cls(text, parsed.attributes if valid else {}, parsed.verdict, tokens)

    @property
    def valid(self) -> bool:
        return self.verdict is Verdict.VALID


NOTHING = Completion("", {}, Verdict.EMPTY, 0)  # the answer of a query without attributes


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

    def repeat(self, times: int) -> "Retrieved":
        """Each query's results so many times, adjacent."""
        return Retrieved(*(np.repeat(x, times, axis=0) for x in vars(self).values()))


class RewardFunction(Protocol):
    """What an answer earns: `reward.function`, or the measure of `reward.kind`."""

    def __call__(
        self, completions: Sequence[Completion], queries: Sequence[Listing], retrieved: Retrieved
    ) -> np.ndarray:
        """float32[B], finite; of a completion that is not valid the number is not used.

        completions: the G answers of a query adjacent. queries: of each completion, the listing
        that asks. retrieved: of each completion, what its query finds with its attributes.

        It must be pure: every process calls it with the same arguments and goes on with its own
        result. With `reward.gain` it is called a second time, of completions that add nothing.
        """


@dataclass(frozen=True)
class Reward(Options, section="reward"):
    """The reward of an answer. Raises UserError where `function` names no function."""

    kind: str = among("recall", "mrr", "ndcg", "margin")  # from coarse (the paper's) to smooth
    function: str  # module:NAME of a RewardFunction; "" = the measure of `kind`
    k: int = between(1, 1_000_000)  # of recall and ndcg
    gain: bool  # whether the reward of the query without attributes is subtracted
    invalid: float = between(-100, 0)  # of an answer in an invalid format
    length_cost: float = between(0, 100)  # a token

    def __post_init__(self) -> None:
        super().__post_init__()
        self.find_function()

    @property
    def measure(self) -> str:
        """The name of the measure of `kind`, among `measures`."""
        return measure_at(self.kind, self.k)

    def find_function(self) -> RewardFunction:
        """What `function` names, or the measure of `kind`."""
        if not self.function:
            return functools.partial(_measured, self.measure, self.k)
        function = load_named(self.function, {}, "reward.function")
        if not callable(function):
            raise UserError(f"{self._label}, which is no function, but {_form(function)}")
        with contextlib.suppress(ValueError):  # not everything that is compiled has a signature
            signature = inspect.signature(function)
            try:
                signature.bind("completions", "queries", "retrieved")
            except TypeError:
                raise UserError(
                    f"{self._label}, which takes {signature}: expected (completions, queries, "
                    "retrieved)"
                ) from None
        return function

    def earned(
        self, completions: Sequence[Completion], queries: Sequence[Listing], retrieved: Retrieved
    ) -> np.ndarray:
        """The function's rewards. Raises UserError where they are not float32[B] and finite."""
        values = self.find_function()(completions, queries, retrieved)
        expected = f"float32[{len(completions)}]"
        if _form(values) != expected:
            raise UserError(
                f"{self._label}, which returned {_form(values)}: expected {expected}, a reward for "
                "each completion"
            )
        values = np.asarray(values)
        if len(wrong := np.flatnonzero(~np.isfinite(values))):
            raise UserError(
                f"{self._label}, {len(wrong)} of whose {len(values)} rewards are not finite: the "
                f"first is {values[wrong[0]]}, of the answer {completions[wrong[0]].text!r}"
            )
        return values

    @property
    def _label(self) -> str:
        return f"reward.function is {self.function!r}"


def _measured(
    name: str,
    k: int,
    completions: Sequence[Completion],
    queries: Sequence[Listing],
    retrieved: Retrieved,
) -> np.ndarray:
    """A measure as a RewardFunction."""
    return measures(retrieved, k)[name].astype(np.float32)


def _form(values: Any) -> str:
    """As float32[8] of an array; the type of anything else."""
    if not (hasattr(values, "dtype") and hasattr(values, "shape")):
        return type(values).__name__
    return f"{values.dtype}[{', '.join(map(str, values.shape))}]"


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
    completions: Sequence[Completion],
    queries: Sequence[Listing],
    answers: Retrieved,
    plain: Retrieved,
    options: Reward,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards of B answers, and their parts.

    queries: of each answer, the listing that asks. answers: results of the B enriched queries,
    K > options.k + 1. plain: results of the Q queries without attributes.

    The reward of a valid answer is what the function gives, less the cost of its length and, under
    `gain`, less what the function gives the query without attributes. The reward of an invalid
    answer is `invalid` plus the lower of 0 and the worst valid reward of its group: breaking the
    format never pays, also where rewards are negative. Where a function looks at what was found
    alone, `gain` shifts all valid answers of a group by one number: it makes rewards comparable
    between queries, and changes advantages only where some answers of the group are invalid.

    Returns float32[B], and float32[B] for each of recall@1, recall@K, mrr, ndcg@K, margin (of
    valid and invalid answers), gain (of the measure of `kind`, whatever the function), valid.
    Raises ValueError where a ranking is too short or a query has nothing relevant to find, and
    UserError as `Reward` does.
    """
    samples = len(completions) // len(plain.ids)
    parts, alone = measures(answers, options.k), measures(plain, options.k)
    parts["gain"] = parts[options.measure] - np.repeat(alone[options.measure], samples)
    parts["valid"] = valid = np.array([answer.valid for answer in completions])
    lengths = np.array([answer.tokens for answer in completions])
    worth = options.earned(completions, queries, answers) - options.length_cost * lengths
    if options.gain:
        worth -= options.earned([NOTHING] * len(completions), queries, plain.repeat(samples))
    groups = np.where(valid, worth, np.inf).reshape(-1, samples)
    worst = np.minimum(groups.min(axis=1), 0.0)
    worth = np.where(valid, worth, np.repeat(worst, samples) + options.invalid)
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
