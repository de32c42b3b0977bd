"""Held-out listings that ask for the others of their product, with different attributes in their
texts, and what the difference makes: paired, query by query.

Axes: Q queries.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afmrl_jax.attributes.agreement import agreement
from afmrl_jax.attributes.text import parse
from afmrl_jax.core.writer import write_atomically
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.retrieval.metrics import interval95
from afmrl_jax.rl.environment import valid_attributes
from afmrl_jax.rl.gallery import Gallery, askers
from afmrl_jax.rl.rewards import Options, bounded_k, measures
from afmrl_jax.rl.rollout import Query, QueryEmbedder
from afmrl_jax.rl.watch import Rollout

Measures = Mapping[str, np.ndarray]  # of `rl.rewards.measures`, float64[Q] each


@dataclass(frozen=True)
class Outcome:
    """What queries found with a generator's answers. answers: f1 with the true attributes, share of
    valid ones, their mean number of pairs."""

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

    def find(self, attributes: Sequence[Mapping[str, str]] | None) -> Measures:
        """What the queries find with these attributes in their texts, one a query; None: plain."""
        given = attributes or [{}] * len(self)
        asked = [Query(int(i), 0, own) for i, own in zip(self.queries, given)]
        found = self._gallery.find(self._embedder(asked), self.queries, self.k)
        return measures(found, self.k)

    def judge(self, answers: Sequence[tuple[str, bool]]) -> Outcome:
        """answers: each query's, text and whether it ended by itself."""
        given = [valid_attributes(parse(text, closed)) for text, closed in answers]
        found = self.find(given)
        return Outcome(
            found,
            {
                "f1": agreement(given, self.true)["f1"],
                "valid": float(np.mean([bool(one) for one in given])),
                "pairs": float(np.mean([len(one) for one in given])),
            },
            [
                Rollout(
                    q,
                    listing.title,
                    (listing.listing_id, listing.product_id),
                    text,
                    own,
                    float(found[self.measure][q]),
                )
                for q, (listing, (text, _), own) in enumerate(zip(self._listings, answers, given))
            ],
        )


def write_arms(path: Path, arms: Mapping[str, Mapping[str, Measures]]) -> None:
    """Keeps what was found, by split and arm, so that later arms can be paired with it."""
    plain = {
        split: {
            arm: {name: x.tolist() for name, x in found.items()} for arm, found in of_split.items()
        }
        for split, of_split in arms.items()
    }
    write_atomically(path, json.dumps(plain))


def read_arms(path: Path) -> dict[str, dict[str, Measures]]:
    return {
        split: {
            arm: {name: np.array(x) for name, x in found.items()} for arm, found in arms.items()
        }
        for split, arms in json.loads(path.read_text(encoding="utf-8")).items()
    }


def compare(arms: Mapping[str, Measures]) -> dict[str, Any]:
    """{"arms": {arm: means}, "differences": {"b - a": means}} of the same queries, for each pair of
    arms as they stand; each mean with half the width of its 95% interval beside it, as NAME_ci95.
    """
    names = list(arms)
    differences = {
        f"{later} - {earlier}": {
            name: arms[later][name] - arms[earlier][name] for name in arms[later]
        }
        for i, earlier in enumerate(names)
        for later in names[i + 1 :]
    }
    return {
        "arms": {name: _means(one) for name, one in arms.items()},
        "differences": {name: _means(one) for name, one in differences.items()},
    }


def _means(values: Measures) -> dict[str, float]:
    means = {}
    for name, x in values.items():
        means[name] = float(np.mean(x))
        if len(x) > 1:
            means[f"{name}_ci95"] = interval95(x)
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
