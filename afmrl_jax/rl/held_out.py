"""What a generator's attributes are worth to held-out queries: before training, on the way, after.

Held-out listings ask for the others of their product, with different attributes in their texts;
arms are judged on the same queries, and paired query by query:
  plain     no attributes
  sft       the answers of the generator as it begins
  sft_sure  the same, less the pairs that it is not sure of: the baseline to beat
  rar       the answers of the generator as it ends; rar_sure, less the pairs that it is not sure of
  oracle    the catalogue's attributes, the ceiling

How sure a pair must be is chosen anew for either generator, by what validation queries find. Where
a catalogue has no test split the arms are judged on those same queries, which flatters the two.
Axes: Q queries.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.attributes.agreement import agreement
from afmrl_jax.catalog.groups import askers
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.processes import first_says
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.data.views import AttributeCuts
from afmrl_jax.retrieval.metrics import interval95, normal95, paired
from afmrl_jax.rl.environment import none_is_read
from afmrl_jax.rl.gallery import Gallery
from afmrl_jax.rl.rewards import Reward, bounded_k, measure_at, measures
from afmrl_jax.rl.watch import Rollout, WatchLimits, stopped, watch

log = logging.getLogger(__name__)

CONFIDENCES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DIFFERENCES = (
    *(("sft", "plain"), ("sft_sure", "sft")),
    *(("rar", "sft"), ("rar", "sft_sure"), ("rar_sure", "sft_sure")),
    *(("oracle", "sft"), ("oracle", "rar")),
)
ROOM = 0.05  # R@1 between the generator's attributes and true ones, below which little is won

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
        gallery: Gallery,
        encoder: LoadedEncoder,
        options: Reward,
        limit: int,
    ):
        """options: whose k is bounded by the gallery's size."""
        asking = askers(catalog, split, gallery.listings)
        self.queries = np.sort(np.random.default_rng(0).permutation(asking)[:limit])
        self.k = bounded_k(options.k, len(gallery))
        # Under the names of its own k, which differs from that of training's gallery.
        self.measure = measure_at(options.kind, self.k)
        self.split, self._gallery = split, gallery
        self._catalog, self._encoder = catalog, encoder
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
        carried = [dict(own) for _, own in distinct]
        vectors, cuts = self._encoder.embed_listings(
            self._catalog,
            listings,
            attributes=carried.__getitem__,
            where=f"{self.split} queries",
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


def choose_confidence(where: HeldOut, said: Sequence[Said]) -> float:
    """The least confidence of a pair with which queries find most: R@1, then MRR, then the lowest.

    said: of each of the queries.
    """
    found, _ = where.find([[one.sure(least) for one in said] for least in CONFIDENCES])
    scores = [(float(x["recall@1"].mean()), float(x["mrr"].mean())) for x in found]
    told = (f"{least:g}: {recall:.3f}" for least, (recall, _) in zip(CONFIDENCES, scores))
    log.info("R@1 on %s by least confidence: %s", where.split, ", ".join(told))
    return CONFIDENCES[max(range(len(scores)), key=scores.__getitem__)]


class Arms:
    """Judges one run by its arms; all processes call it together, and the first writes."""

    def __init__(
        self,
        workdir: Path,
        held_out: Mapping[str, HeldOut],
        say: Callable[[Any, np.ndarray], list[Said]],
        limits: WatchLimits,
    ):
        """held_out: validation and test, as far as there are any. say: (trained parameters,
        listings int64[Q]) -> what the generator says of them. limits: where a validation stops the
        run."""
        self._workdir, self._limits, self._say = workdir, limits, say
        self._validation = held_out.get("validation")
        self._last = held_out.get("test") or self._validation
        self._before = workdir / "evaluation_before.json"
        self.path = workdir / "evaluation.json"
        if self._validation is None:
            log.warning(
                "no validation listing has another to find: the last checkpoint is the best"
            )

    def has_begun(self) -> bool:
        """Whether what `begin` writes is there; all processes ask together."""
        return first_says(self._before.exists())

    def begin(self, trained: Any) -> None:
        """Writes evaluation_before.json: what every query finds in each arm that needs no training,
        so that later arms can be paired with it. Raises UserError where the encoder does not read
        what the generator says."""
        self.path.unlink(missing_ok=True)  # of a run that never saved
        least, arms = None, {}
        for where in (self._validation, self._last):
            if where is None or where.split in arms:
                continue
            log.info(
                "judging the generator as it begins on %d %s listings", len(where), where.split
            )
            said = self._say(trained, where.queries)
            if where is self._validation:
                least = choose_confidence(where, said)
            given = {
                "plain": [{}] * len(where),
                "sft": [one.sure(0.0) for one in said],
                "oracle": where.true,
            }
            if least is not None:
                given["sft_sure"] = [one.sure(least) for one in said]
            found, cuts = where.find(list(given.values()))
            _check_read(cuts, where.split)
            arms[where.split] = dict(zip(given, found))
            _log_recall(arms[where.split])
        if jax.process_index() == 0:
            write_atomically(self._before, _to_json({"sft_sure": least}, arms))

    def validate(self, trained: Any, step: int) -> dict[str, float]:
        """Scores on validation listings, and the watch's look at them. Raises UserError where it
        sees cheating."""
        where = self._validation
        _, before = self._arms(where)
        outcome = where.judge(self._say(trained, where.queries))
        found = outcome.measures
        gain, first = (
            float(np.mean(x[where.measure] - before["plain"][where.measure]))
            for x in (found, before["sft"])
        )
        # Attributes that lose from the start, as to an encoder that knows none, are no cheating.
        verdict = watch(outcome.rollouts, self._limits, gain - min(first, 0))
        if verdict.sentence:
            raise stopped(step, verdict, self._workdir / "rollouts.jsonl")
        return {
            "recall@1": float(found["recall@1"].mean()),
            "mrr": float(found["mrr"].mean()),
            "gain": gain,
            **{
                f"over_{arm}": float(np.mean(found["recall@1"] - x["recall@1"]))
                for arm, x in before.items()
                if arm in ("sft", "sft_sure")
            },
            **outcome.answers,
        }

    def end(self, trained: Any, step: int) -> None:
        """Writes evaluation.json, once: all arms on test listings, or else validation's, with the
        parameters of a step."""
        where = self._last
        if where is None or first_says(self.path.exists()):
            return
        confidence, before = self._arms(where)
        said = self._say(trained, where.queries)
        outcome = where.judge(said)
        arms = {name: before[name] for name in ("plain", "sft", "sft_sure") if name in before}
        arms["rar"] = outcome.measures
        if self._validation:
            on_validation = self._validation
            asked = said if where is on_validation else self._say(trained, on_validation.queries)
            least = choose_confidence(on_validation, asked)
            (arms["rar_sure"],), _ = where.find([[one.sure(least) for one in said]])
            confidence["rar_sure"] = least
        arms["oracle"] = before["oracle"]
        results = compare(arms, DIFFERENCES) | {
            "least_confidence": confidence,
            "answers": outcome.answers,
            "split": where.split,
            "step": step,
        }
        if jax.process_index() == 0:
            write_atomically(self.path, json.dumps(results, indent=2))

    def _arms(self, where: HeldOut) -> tuple[dict[str, float], dict[str, Measures]]:
        """What `begin` wrote: the confidences that it chose, and its arms of a split."""
        kept = json.loads(self._before.read_text(encoding="utf-8"))
        arms = {
            arm: {name: np.array(x) for name, x in found.items()}
            for arm, found in kept["arms"][where.split].items()
        }
        return kept["least_confidence"], arms


def _to_json(confidence: Mapping[str, float | None], arms: Mapping[str, Mapping]) -> str:
    plain = {
        split: {
            arm: {name: x.tolist() for name, x in found.items()} for arm, found in of_split.items()
        }
        for split, of_split in arms.items()
    }
    chosen = {arm: least for arm, least in confidence.items() if least is not None}
    return json.dumps({"least_confidence": chosen, "arms": plain})


def _check_read(cuts: AttributeCuts, split: str) -> None:
    """Raises UserError where the encoder reads no attribute of any query: then all answers would be
    worth the same."""
    if first_says(cuts.none_is_read):
        raise none_is_read(cuts, f"{split} queries")


def _log_recall(arms: Mapping[str, Measures]) -> None:
    found = {arm: float(values["recall@1"].mean()) for arm, values in arms.items()}
    log.info("R@1 %s", ", ".join(f"{arm} {share:.3f}" for arm, share in found.items()))
    if found["oracle"] - found["sft"] < ROOM:
        log.warning(
            "True attributes would find hardly more than the generator's do: there is little "
            "to gain. Has the encoder seen attributes in training (data.attribute_share)?"
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
    head, rows = ["attributes"], []
    for part in ("arms", "differences"):
        for arm, means in result[part].items():
            names = [name for name in means if not name.endswith("_ci95")]
            head[1:] = names
            cells = [f"{means[n]:.3f} ± {means.get(f'{n}_ci95', float('nan')):.3f}" for n in names]
            rows.append([arm, *cells])
    return markdown_table(head, rows)
