"""Held-out retrieval with a generator's attributes: before, during and after training.

Held-out listings search for the other listings of their product, with different attributes in their
texts. All arms are judged on the same queries, and compared query by query:
  plain     no attributes
  sft       the answers of the generator before training
  sft_sure  the same without pairs of low confidence: the baseline to beat
  rar       the answers of the generator after training; rar_sure, without pairs of low confidence
  oracle    the catalogue's attributes, the ceiling

The least confidence is chosen for either generator by the scores of validation queries. Where a
catalogue has no test split, the arms are judged on those same queries, which flatters the two
`_sure` arms.
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
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.processes import first_says
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.core.types import Params
from afmrl_jax.data.views import AttributeCuts
from afmrl_jax.retrieval.metrics import interval95, normal95, paired
from afmrl_jax.rl.changes import count_changes
from afmrl_jax.rl.environment import Rollout, none_is_read
from afmrl_jax.rl.gallery import Gallery
from afmrl_jax.rl.rewards import Reward, bounded_k, measure_at, measures
from afmrl_jax.rl.watch import WatchLimits, stopped, watch

log = logging.getLogger(__name__)

CONFIDENCES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DIFFERENCES = (
    *(("sft", "plain"), ("sft_sure", "sft")),
    *(("rar", "sft"), ("rar", "sft_sure"), ("rar_sure", "sft_sure")),
    *(("oracle", "sft"), ("oracle", "rar")),
)
ROOM = 0.05  # R@1 that true attributes must win over the generator's for training to pay

Measures = Mapping[str, np.ndarray]  # of `rl.rewards.measures`, float64[Q] each
ArmAttributes = Sequence[Mapping[str, str]]  # of each of Q queries


class QueryAnswer(NamedTuple):
    """A generator's answer to a query, valid or not."""

    text: str
    sure: Callable[[float], dict[str, str]]  # least confidence -> the valid attributes that have it


@dataclass(frozen=True)
class Outcome:
    """The scores of queries with a generator's answers.

    answers: `f1` against the true attributes; `valid`, the share of valid answers; `pairs`, their
    mean number; `attributes_cut`, the share of answers whose pairs the encoder does not all read.
    """

    measures: Measures
    answers: dict[str, float]
    rollouts: list[Rollout]  # their reward is the measure


class HeldOut:
    """The queries of a split: at most `limit` listings whose product has others in the gallery."""

    def __init__(
        self,
        catalog: Catalog,
        split: str,
        gallery: Gallery,
        encoder: LoadedEncoder,
        options: Reward,
        limit: int,
    ):
        """options: the reward; its k is bounded by the gallery's size."""
        candidates = askers(catalog, split, gallery.listings)
        self.queries = np.sort(np.random.default_rng(0).permutation(candidates)[:limit])
        self.k = bounded_k(options.k, len(gallery))
        # Named after this k, which may differ from that of the training gallery.
        self.measure = measure_at(options.kind, self.k)
        self.split, self._gallery = split, gallery
        self._catalog, self._encoder = catalog, encoder
        self._listings = [catalog.listing(int(index)) for index in self.queries]
        self.true = [listing.attributes for listing in self._listings]

    def __len__(self) -> int:
        return len(self.queries)

    def find(self, arms: Sequence[ArmAttributes]) -> tuple[list[Measures], AttributeCuts]:
        """Scores of the queries with each arm's attributes in their texts ({}: none), and which
        attributes the encoder does not read.

        A text that several arms have in common is embedded and searched for once.
        """
        texts = [
            [(q, tuple(attributes.items())) for q, attributes in enumerate(arm)] for arm in arms
        ]
        # The texts of a query side by side: its photos are prepared once.
        distinct = sorted(dict.fromkeys(itertools.chain(*texts)), key=lambda text: text[0])
        listings = self.queries[[q for q, _ in distinct]]
        carried = [dict(attributes) for _, attributes in distinct]
        vectors, cuts = self._encoder.embed_listings(
            self._catalog,
            listings,
            attributes=carried.__getitem__,
            where=f"{self.split} queries",
        )
        scores = measures(self._gallery.find(vectors, listings, self.k), self.k)
        row = {text: n for n, text in enumerate(distinct)}
        rows = [[row[text] for text in arm] for arm in texts]
        return [{name: x[of_arm] for name, x in scores.items()} for of_arm in rows], cuts

    def judge(self, answers: Sequence[QueryAnswer]) -> Outcome:
        """Scores of the queries with the attributes of their answers, one answer a query."""
        attributes = [answer.sure(0.0) for answer in answers]
        (scores,), cuts = self.find([attributes])
        return Outcome(
            scores,
            {
                "f1": agreement(attributes, self.true)["f1"],
                "valid": float(np.mean([bool(pairs) for pairs in attributes])),
                "pairs": float(np.mean([len(pairs) for pairs in attributes])),
                "attributes_cut": cuts.share,
            },
            [
                Rollout.of(q, listing, answer.text, pairs, float(scores[self.measure][q]))
                for q, (listing, answer, pairs) in enumerate(
                    zip(self._listings, answers, attributes)
                )
            ],
        )


def choose_confidence(held_out: HeldOut, answers: Sequence[QueryAnswer]) -> float:
    """The least confidence of pairs that gives the best R@1; of equals, the best MRR, then the
    lowest.

    answers: one a query.
    """
    arms, _ = held_out.find([[answer.sure(least) for answer in answers] for least in CONFIDENCES])
    scores = [(float(x["recall@1"].mean()), float(x["mrr"].mean())) for x in arms]
    recalls = (f"{least:g}: {recall:.3f}" for least, (recall, _) in zip(CONFIDENCES, scores))
    log.info("R@1 on %s by least confidence: %s", held_out.split, ", ".join(recalls))
    return CONFIDENCES[max(range(len(scores)), key=scores.__getitem__)]


class Arms:
    """Judges a run by its arms; called with a state it is the evaluator `held_out`. All processes
    call it together, and the first writes the files."""

    def __init__(
        self,
        workdir: Path,
        held_out: Mapping[str, HeldOut],
        answer: Callable[[Params, np.ndarray], list[QueryAnswer]],
        limits: WatchLimits,
    ):
        """held_out: validation and test, as far as there are any. answer: (trained parameters,
        listings int64[Q]) -> the generator's answers. limits: figures at which `validate` stops the
        run."""
        self._workdir, self._limits, self._answer = workdir, limits, answer
        self._validation = held_out.get("validation")
        self._last = held_out.get("test") or self._validation
        self._before = workdir / "evaluation_before.json"
        self.path = workdir / "evaluation.json"
        if self._validation is None:
            log.warning(
                "no validation listing has another to find: the last checkpoint is the best"
            )

    def has_begun(self) -> bool:
        """Whether the file of `begin` exists, by the first process; all call it together."""
        return first_says(self._before.exists())

    def begin(self, trained: Params) -> None:
        """Writes evaluation_before.json: each query's scores in each arm that needs no training,
        and the generator's attributes, so that later ones can be paired with them. Raises UserError
        where the encoder reads none of the attributes."""
        self.path.unlink(missing_ok=True)  # left by a run that saved no checkpoint
        least, arms, said = None, {}, {}
        for held_out in (self._validation, self._last):
            if held_out is None or held_out.split in arms:
                continue
            log.info(
                "judging the generator as it begins on %d %s listings",
                len(held_out),
                held_out.split,
            )
            answers = self._answer(trained, held_out.queries)
            if held_out is self._validation:
                least = choose_confidence(held_out, answers)
            attributes = {
                "plain": [{}] * len(held_out),
                "sft": [answer.sure(0.0) for answer in answers],
                "oracle": held_out.true,
            }
            if least is not None:
                attributes["sft_sure"] = [answer.sure(least) for answer in answers]
            scores, cuts = held_out.find(list(attributes.values()))
            _check_read(cuts, held_out.split)
            arms[held_out.split] = dict(zip(attributes, scores))
            said[held_out.split] = attributes["sft"]
            _log_recall(arms[held_out.split])
        if jax.process_index() == 0:
            write_atomically(self._before, _to_json({"sft_sure": least}, arms, said))

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The scores of `validate`."""
        return self.validate(state.params, int(state.step))

    def validate(self, trained: Params, step: int) -> dict[str, float]:
        """Scores on validation queries. Raises UserError where the watch sees reward hacking."""
        held_out = self._validation
        _, before = self._arms(held_out)
        outcome = held_out.judge(self._answer(trained, held_out.queries))
        scores = outcome.measures
        gain, first = (
            float(np.mean(x[held_out.measure] - before["plain"][held_out.measure]))
            for x in (scores, before["sft"])
        )
        # A loss that was there before training is no hacking: an encoder may not know attributes.
        verdict = watch(outcome.rollouts, self._limits, gain - min(first, 0))
        if verdict.sentence:
            raise stopped(step, verdict, self._workdir / "rollouts.jsonl")
        return {
            "recall@1": float(scores["recall@1"].mean()),
            "mrr": float(scores["mrr"].mean()),
            "gain": gain,
            **{
                f"over_{arm}": float(np.mean(scores["recall@1"] - x["recall@1"]))
                for arm, x in before.items()
                if arm in ("sft", "sft_sure")
            },
            **outcome.answers,
        }

    def end(self, trained: Params, step: int) -> None:
        """Writes evaluation.json, once: all arms on the test queries, or on validation's where
        there are none. trained: the parameters of the step."""
        held_out = self._last
        if held_out is None or first_says(self.path.exists()):
            return
        confidence, before = self._arms(held_out)
        said = self._read_before()["attributes"][held_out.split]
        answers = self._answer(trained, held_out.queries)
        outcome = held_out.judge(answers)
        arms = {name: before[name] for name in ("plain", "sft", "sft_sure") if name in before}
        arms["rar"] = outcome.measures
        if self._validation:
            validation = answers
            if held_out is not self._validation:
                validation = self._answer(trained, self._validation.queries)
            least = choose_confidence(self._validation, validation)
            (arms["rar_sure"],), _ = held_out.find([[answer.sure(least) for answer in answers]])
            confidence["rar_sure"] = least
        arms["oracle"] = before["oracle"]
        results = compare(arms, DIFFERENCES) | {
            "least_confidence": confidence,
            "answers": outcome.answers,
            "changes": count_changes(
                (said, [answer.sure(0.0) for answer in answers]),
                held_out.true,
                (before["sft"]["recall@1"], outcome.measures["recall@1"]),
            ),
            "split": held_out.split,
            "step": step,
        }
        if jax.process_index() == 0:
            write_atomically(self.path, json.dumps(results, indent=2))

    def _arms(self, held_out: HeldOut) -> tuple[dict[str, float], dict[str, Measures]]:
        """The least confidences and the arms of a split, from the file of `begin`."""
        before = self._read_before()
        arms = {
            arm: {name: np.array(x) for name, x in scores.items()}
            for arm, scores in before["arms"][held_out.split].items()
        }
        return before["least_confidence"], arms

    def _read_before(self) -> dict[str, Any]:
        """What `begin` wrote."""
        return json.loads(self._before.read_text(encoding="utf-8"))


def _to_json(
    confidence: Mapping[str, float | None],
    arms: Mapping[str, Mapping],
    said: Mapping[str, ArmAttributes],
) -> str:
    plain = {
        split: {
            arm: {name: x.tolist() for name, x in scores.items()}
            for arm, scores in of_split.items()
        }
        for split, of_split in arms.items()
    }
    chosen = {arm: least for arm, least in confidence.items() if least is not None}
    return json.dumps({"least_confidence": chosen, "arms": plain, "attributes": said})


def _check_read(cuts: AttributeCuts, split: str) -> None:
    """Raises UserError where the encoder reads no attribute of any query: all answers would get
    equal rewards."""
    if first_says(cuts.none_is_read):
        raise none_is_read(cuts, f"{split} queries")


def _log_recall(arms: Mapping[str, Measures]) -> None:
    recall = {arm: float(values["recall@1"].mean()) for arm, values in arms.items()}
    log.info("R@1 %s", ", ".join(f"{arm} {share:.3f}" for arm, share in recall.items()))
    if recall["oracle"] - recall["sft"] < ROOM:
        log.warning(
            "True attributes would find hardly more than the generator's do: there is little "
            "to gain. Has the encoder seen attributes in training (data.attribute_share)?"
        )


def compare(arms: Mapping[str, Measures], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """{"arms": {arm: means}, "differences": {"a - b": means}} over the same queries, for the pairs
    (a, b) of existing arms. NAME_ci95 is half the width of the 95% interval of the mean NAME.
    """
    differences = {
        f"{a} - {b}": _with_intervals(
            {name: _gain(name, arms[b][name], x) for name, x in arms[a].items()}
        )
        for a, b in pairs
        if a in arms and b in arms
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


def _with_intervals(intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    means = {}
    for name, (mean, half) in intervals.items():
        means[name] = mean
        if not np.isnan(half):
            means[f"{name}_ci95"] = half
    return means


def comparison_table(result: Mapping[str, Any]) -> str:
    """A Markdown table of the result of `compare`, the measures in columns."""
    head, rows = ["attributes"], []
    for part in ("arms", "differences"):
        for arm, means in result[part].items():
            names = [name for name in means if not name.endswith("_ci95")]
            head[1:] = names
            cells = [f"{means[n]:.3f} ± {means.get(f'{n}_ci95', float('nan')):.3f}" for n in names]
            rows.append([arm, *cells])
    return markdown_table(head, rows)
