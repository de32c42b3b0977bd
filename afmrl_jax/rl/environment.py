"""Rewards of answers: each is parsed, appended to its query, embedded and searched for.

Axes: Q queries · G answers of a query · B = Q G answers, those of a query adjacent · E embedding.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.attributes.text import Verdict, parse
from afmrl_jax.catalog.listings import Catalog, Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.views import AttributeCuts, sampled_cuts
from afmrl_jax.rl.advantages import Advantages, group_advantages
from afmrl_jax.rl.gallery import Gallery
from afmrl_jax.rl.rewards import Completion, Reward, rewards

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


@dataclass(frozen=True)
class RewardedAnswers:
    """The answers of a step and their rewards.

    rewards: float32[Q, G]. parts: the measures of `rl.rewards`, float32[B] each, and those of the
    whole step, [1].
    """

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    rewards: np.ndarray
    advantages: Advantages
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
    """Rewards answers by searching a gallery. samples: G. scale: as in `group_advantages`."""

    catalog: Catalog
    encoder: LoadedEncoder  # frozen
    gallery: Gallery
    options: Reward
    samples: int
    scale: bool

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
        # Each query without attributes, then with those of each of its answers.
        carried: list[Mapping[str, str]] = []
        for first in range(0, len(completions), self.samples):
            group = completions[first : first + self.samples]
            carried += [{}, *(answer.attributes for answer in group)]
        vectors, cuts = self.encoder.embed_listings(
            self.catalog,
            np.repeat(listings, self.samples + 1),
            attributes=carried.__getitem__,
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
            Rollout(
                i // self.samples,
                query.title,
                (query.listing_id, query.product_id),
                answer.text,
                answer.attributes,
                float(values[i]),
            )
            for i, (answer, query) in enumerate(zip(completions, queries))
        ]
        verdicts = [answer.verdict for answer in completions]
        grouped = values.reshape(-1, self.samples)
        advantages = group_advantages(grouped, self.scale)
        return RewardedAnswers(rollouts, verdicts, grouped, advantages, parts)

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
