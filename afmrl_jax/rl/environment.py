"""Rewards of answers: each is parsed, appended to its query, embedded and searched for.

Axes: Q queries · G answers of a query · B = Q G answers, those of a query adjacent · E embedding.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.attributes.text import Verdict, parse
from afmrl_jax.catalog.listings import Catalog, Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.views import AttributeCuts, sampled_cuts
from afmrl_jax.rl.advantages import Advantages, group_advantages
from afmrl_jax.rl.credit import (
    PairCredit,
    PairNumbers,
    checked_pairs,
    correlation,
    pair_advantages,
    pair_worths,
)
from afmrl_jax.rl.gallery import Gallery
from afmrl_jax.rl.rewards import Completion, Reward, measures, rewards

COMPARED = 8  # answers of a step whose approximate search is compared with an exact one


class Laps:
    """Seconds of the parts of a step: `laps(name)` ends the part `name` and begins the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[f"seconds_{part}"] = now - self._began
        self._began = now


@dataclass(frozen=True)
class Rollout:
    """An answer to a query, with its reward. attributes: {} where the format is invalid."""

    query: int  # number of the query in the batch
    title: str
    ids: tuple[str, ...]  # the listing_id and product_id of the query's listing
    answer: str
    attributes: Mapping[str, str]
    reward: float

    @classmethod
    def of(
        cls, query: int, listing: Listing, answer: str, attributes: Mapping[str, str], reward: float
    ) -> Self:
        ids = listing.listing_id, listing.product_id
        return cls(query, listing.title, ids, answer, attributes, reward)


@dataclass(frozen=True)
class RewardedAnswers:
    """The answers of a step and their rewards.

    rewards: float32[Q, G]. pair_advantages: of each answer those of its pairs, {} where they have
    the answer's. parts: the measures of `rl.rewards`, float32[B] each, and those of the whole step,
    [1].
    """

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    rewards: np.ndarray
    advantages: Advantages
    pair_advantages: PairNumbers
    parts: dict[str, np.ndarray]

    def metrics(self) -> dict[str, float]:
        """Metrics for the log: means over the answers, and shares of the verdicts."""
        shares = Counter(self.verdicts)
        return {
            "reward": float(self.rewards.mean()),
            "reward_std": float(self.advantages.std.mean()),  # within a group
            "zero_variance": float(self.advantages.zero_variance.mean()),  # share of the groups
            "valid_zero_variance": self._valid_zero_variance(),
            **{name: float(part.mean()) for name, part in self.parts.items()},
            **{f"verdict_{v.value}": shares[v] / len(self.verdicts) for v in Verdict},
        }

    def _valid_zero_variance(self) -> float:
        """The share of the groups whose valid answers have equal rewards: from them the format
        can be learned, but nothing about attributes."""
        valid = self.parts["valid"].reshape(self.rewards.shape) > 0
        most = np.where(valid, self.rewards, -np.inf).max(axis=1)
        least = np.where(valid, self.rewards, np.inf).min(axis=1)
        return float(np.mean(most <= least))

    def _of_pairs(self, answer: int) -> dict[str, dict[str, float]]:
        of_pairs = self.pair_advantages[answer]
        rounded = {name: round(value, 6) for name, value in of_pairs.items()}
        return {"pair_advantages": rounded} if rounded else {}

    def groups(self) -> list[dict[str, Any]]:
        """Each query with its answers, as rollouts.jsonl has it."""
        samples = self.rewards.shape[1]
        return [
            {
                "listing_id": self.rollouts[start].ids[0],
                "title": self.rollouts[start].title,
                "answers": [
                    {
                        "answer": self.rollouts[i].answer,
                        "verdict": self.verdicts[i].value,
                        "reward": round(self.rollouts[i].reward, 6),
                        "advantage": round(float(self.advantages.values.flat[i]), 6),
                        **self._of_pairs(i),
                    }
                    for i in range(start, start + samples)
                ],
            }
            for start in range(0, len(self.rollouts), samples)
        ]


def none_is_read(cuts: AttributeCuts, where: str) -> UserError:
    """The error that ends a run whose encoder reads no attribute. where: the enriched texts."""
    return UserError(
        f"{where}: {cuts}. Every answer would be worth the same: train the encoder with "
        f"--config.data.max_tokens={cuts.needed}, or with a smaller data.max_patches"
    )


def check_attributes_are_read(catalog: Catalog, encoder: LoadedEncoder, name: str) -> None:
    """Warns where the encoder's rows are too short for true attributes of some training listings;
    raises UserError where it reads none of them. name: of the encoder."""
    cuts = sampled_cuts(catalog, "train", encoder.processor, encoder.processor.max_images)
    where = f"true attributes, as {name} reads them"
    if cuts.none_is_read:
        raise none_is_read(cuts, where)
    cuts.tell(where)


@dataclass(frozen=True)
class Environment:
    """Rewards answers by searching a gallery. samples: G. scale: as in `group_advantages`. credit:
    whether pairs get advantages of their own, and how many are checked."""

    catalog: Catalog
    encoder: LoadedEncoder  # frozen
    gallery: Gallery
    options: Reward
    samples: int
    scale: bool
    credit: PairCredit

    def judge(
        self,
        listings: np.ndarray,
        draws: np.ndarray,
        texts: Sequence[str],
        closed: Sequence[bool],
        lengths: np.ndarray,
        laps: Laps,
    ) -> RewardedAnswers:
        """The rewards of answers, the same on every process; all processes call it together.

        listings, draws: int64[Q], the queries. texts: B answers; closed: whether each ended by
        itself; lengths: int[B], tokens. laps: times the parts parse, embed and search.
        Raises UserError where the reward's function fails `RewardFunction`.
        """
        completions = [
            Completion.of(text, parse(text, bool(ended)), int(tokens))
            for text, ended, tokens in zip(texts, closed, lengths)
        ]
        laps("parse")
        carried = [answer.attributes for answer in completions]
        # Each query without attributes, then with those of each of its answers.
        asked: list[Mapping[str, str]] = []
        for first in range(0, len(carried), self.samples):
            asked += [{}, *carried[first : first + self.samples]]
        vectors, cuts = self.encoder.embed_listings(
            self.catalog,
            np.repeat(listings, self.samples + 1),
            attributes=asked.__getitem__,
            draws=np.repeat(draws, self.samples + 1),
            where="queries with the answers' attributes",
        )
        vectors = vectors.reshape(len(listings), self.samples + 1, -1)
        laps("embed")
        asking = [self.catalog.listing(int(i), int(draw)) for i, draw in zip(listings, draws)]
        queries = [listing for listing in asking for _ in range(self.samples)]
        values, parts = self._search(listings, vectors, completions, queries)
        parts["attributes_cut"] = np.array([cuts.share])  # of the answers with attributes
        laps("search")
        rollouts = [
            Rollout.of(i // self.samples, query, answer.text, answer.attributes, float(values[i]))
            for i, (answer, query) in enumerate(zip(completions, queries))
        ]
        verdicts = [answer.verdict for answer in completions]
        grouped = values.reshape(-1, self.samples)
        advantages = group_advantages(grouped, self.scale)
        worths = pair_worths(carried, grouped, self.credit.credit_ridge)
        of_pairs: PairNumbers = [{}] * len(completions)
        if self.credit.credit == "pairs":
            of_pairs = pair_advantages(worths, grouped, advantages)
        if self.credit.credit_checks:
            parts["credit_correlation"] = self._check(
                listings, draws, carried, worths, parts[self.options.measure]
            )
            laps("check")
        return RewardedAnswers(rollouts, verdicts, grouped, advantages, of_pairs, parts)

    def _search(
        self,
        listings: np.ndarray,
        vectors: np.ndarray,
        completions: Sequence[Completion],
        queries: Sequence[Listing],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards of B answers and their parts. vectors: float32[Q, G + 1, E]; the first of a query
        is that without attributes. queries: B, of each answer the listing that asks."""
        plain, enriched = vectors[:, 0], vectors[:, 1:].reshape(len(completions), -1)
        answer_listings = np.repeat(listings, self.samples)
        k = self.options.k
        values, parts = rewards(
            completions,
            queries,
            self.gallery.find(enriched, answer_listings, k),
            self.gallery.find(plain, listings, k),
            self.options,
        )
        if self.gallery.approximate:
            some = slice(COMPARED)
            parts["index_agreement"] = np.array(
                [self.gallery.agreement(enriched[some], answer_listings[some], self.options)]
            )
        return values, parts

    def _check(
        self,
        listings: np.ndarray,
        draws: np.ndarray,
        carried: Sequence[Mapping[str, str]],
        worths: PairNumbers,
        found: np.ndarray,
    ) -> np.ndarray:
        """[1]: the correlation of what pairs are held to be worth with what is lost without them.

        Some answers' queries are searched for again with each pair left out. found: float32[B], the
        measure of `kind` with all pairs; a reward's function and the cost of length are not asked.
        """
        checked = checked_pairs(worths, self.credit.credit_checks)
        if not checked:
            return np.zeros(1)
        answers = np.array([answer for answer, _ in checked])
        queries = answers // self.samples
        left = [
            {other: value for other, value in carried[answer].items() if other != name}
            for answer, name in checked
        ]
        vectors, _ = self.encoder.embed_listings(
            self.catalog,
            listings[queries],
            attributes=left.__getitem__,
            draws=draws[queries],
            where="queries with an attribute left out",
        )
        k = self.options.k
        without = measures(self.gallery.find(vectors, listings[queries], k), k)
        # In the precision of `found`: rounding alone would have a correlation.
        losses = found[answers] - without[self.options.measure].astype(found.dtype)
        estimates = np.array([worths[answer][name] for answer, name in checked])
        return np.array([correlation(estimates, losses)])
