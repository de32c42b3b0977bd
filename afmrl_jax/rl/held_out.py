"""Held-out listings that ask for the others of their product, with different attributes in their
texts, and what the difference makes: paired, query by query.

Axes: Q queries.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from afmrl_jax.attributes.agreement import agreement
from afmrl_jax.catalog.groups import askers
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.data.views import AttributeCuts
from afmrl_jax.retrieval.metrics import interval95, normal95, paired
from afmrl_jax.rl.gallery import Gallery
from afmrl_jax.rl.rewards import Options, bounded_k, measures
from afmrl_jax.rl.rollout import Query, QueryEmbedder
from afmrl_jax.rl.watch import Rollout

Measures = Mapping[str, np.ndarray]  # of `rl.rewards.measures`, float64[Q] each
Given = Sequence[Mapping[str, str]]  # attributes, of each of Q queries


class Said(NamedTuple):
    """What a generator says of a query, valid or not."""

    text: str
    sure: Callable[[float], dict[str, str]]  # its valid attributes of at least a confidence


@dataclass(frozen=True)
class Outcome:
    """What queries found with a generator's answers. answers: f1 with the true attributes, share of
    valid ones, their mean number of pairs, share of those whose pairs the encoder does not all
    read."""

    measures: Measures
    answers: dict[str, float]
    rollouts: list[Rollout]  # rewarded with what the measure is worth


class HeldOut:
    """A split's listings that have something to find in its gallery, at most `limit` of them."""

    def __init__(
        self,
        catalog: Catalog,
        split: str,
        listings: np.ndarray,
        gallery: Gallery,
        embedder: QueryEmbedder,
        options: Options,
        limit: int,
    ):
        """listings: int64[N], the gallery's. options: whose k is bounded by it."""
        asking = askers(catalog, split, listings)
        self.queries = np.sort(np.random.default_rng(0).permutation(asking)[:limit])
        self.k = bounded_k(options.k, len(gallery))
        # Under the names of its own k, which differs from that of training's gallery.
        self.measure = Options(options.kind, self.k).measure
        self.split, self._gallery = split, gallery
        self._catalog, self._embedder = catalog, embedder
        self._listings = [catalog.listing(int(index)) for index in self.queries]
        self.true = [listing.attributes for listing in self._listings]

    def __len__(self) -> int:
        return len(self.queries)

    def find(self, arms: Sequence[Given]) -> tuple[list[Measures], AttributeCuts]:
        """What the queries find with each arm's attributes in their texts; {} asks plain. And which
        attributes the encoder does not read.

        What several arms ask alike is embedded and searched for once.
        """
        asked = [[(q, tuple(own.items())) for q, own in enumerate(given)] for given in arms]
        # Those of one query side by side: its photos are prepared once.
        distinct = sorted(dict.fromkeys(itertools.chain(*asked)), key=lambda one: one[0])
        listings = self.queries[[q for q, _ in distinct]]
        vectors, cuts = self._embedder(
            [Query(int(i), 0, dict(own)) for i, (_, own) in zip(listings, distinct)]
        )
        found = measures(self._gallery.find(vectors, listings, self.k), self.k)
        row = {one: n for n, one in enumerate(distinct)}
        rows = [[row[one] for one in given] for given in asked]
        return [{name: x[of_arm] for name, x in found.items()} for of_arm in rows], cuts

    def judge(self, said: Sequence[Said]) -> Outcome:
        """said: of each query."""
        given = [one.sure(0.0) for one in said]
        (found,), cuts = self.find([given])
        return Outcome(
            found,
            {
                "f1": agreement(given, self.true)["f1"],
                "valid": float(np.mean([bool(one) for one in given])),
                "pairs": float(np.mean([len(one) for one in given])),
                "attributes_cut": cuts.share,
            },
            [
                Rollout(
                    q,
                    listing.title,
                    (listing.listing_id, listing.product_id),
                    one.text,
                    own,
                    float(found[self.measure][q]),
                )
                for q, (listing, one, own) in enumerate(zip(self._listings, said, given))
            ],
        )


def compare(arms: Mapping[str, Measures], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """{"arms": {arm: means}, "differences": {"a - b": means}} of the same queries, for those of the
    pairs (a, b) whose arms are there; each mean with half the width of its 95% interval beside it,
    as NAME_ci95.
    """
    differences = {
        f"{one} - {other}": _with_intervals(
            {name: _gain(name, arms[other][name], x) for name, x in arms[one].items()}
        )
        for one, other in pairs
        if one in arms and other in arms
    }
    of_arms = {
        arm: _with_intervals({name: _mean(name, x) for name, x in values.items()})
        for arm, values in arms.items()
    }
    return {"arms": of_arms, "differences": differences}


def _mean(name: str, values: np.ndarray) -> tuple[float, float]:
    half = normal95(values) if name == "margin" else interval95(values)  # the rest are in [0, 1]
    return float(np.mean(values)), half


def _gain(name: str, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    return _mean(name, after - before) if name == "margin" else paired(before, after)


def _with_intervals(found: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    means = {}
    for name, (mean, half) in found.items():
        means[name] = mean
        if not np.isnan(half):
            means[f"{name}_ci95"] = half
    return means


def comparison_table(result: Mapping[str, Any]) -> str:
    """A Markdown table of what `compare` found, the measures in columns."""
    lines = []
    for part in ("arms", "differences"):
        for arm, means in result[part].items():
            names = [name for name in means if not name.endswith("_ci95")]
            if not lines:
                lines += [["attributes", *names], ["---"] * (len(names) + 1)]
            cells = [f"{means[n]:.3f} ± {means.get(f'{n}_ci95', float('nan')):.3f}" for n in names]
            lines.append([arm, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
