"""What a generator's attributes are worth to held-out queries: before training, on the way, after.

Arms, each judged on the same queries:
  plain     no attributes
  sft       the answers of the generator as it begins
  sft_sure  the same, less the pairs that it is not sure of: the baseline to beat
  rar       the answers of the generator as it ends; rar_sure, less the pairs that it is not sure of
  oracle    the catalogue's attributes, the ceiling

How sure a pair must be is chosen anew for either generator, by what validation queries find. Where
a catalogue has no test split the arms are judged on those same queries, which flatters the two.
Axes: Q queries.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.processes import first_says
from afmrl_jax.data.views import AttributeCuts
from afmrl_jax.rl.held_out import HeldOut, Measures, Said, compare
from afmrl_jax.rl.rollout import none_is_read
from afmrl_jax.rl.watch import WatchLimits, stopped, watch

log = logging.getLogger(__name__)

CONFIDENCES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DIFFERENCES = (
    *(("sft", "plain"), ("sft_sure", "sft")),
    *(("rar", "sft"), ("rar", "sft_sure"), ("rar_sure", "sft_sure")),
    *(("oracle", "sft"), ("oracle", "rar")),
)
ROOM = 0.05  # R@1 between the generator's attributes and true ones, below which little is won


def choose_confidence(where: HeldOut, said: Sequence[Said]) -> float:
    """The least confidence of a pair with which queries find most: R@1, then MRR, then the lowest.

    said: of each of the queries.
    """
    found, _ = where.find([[one.sure(least) for one in said] for least in CONFIDENCES])
    scores = [(float(x["recall@1"].mean()), float(x["mrr"].mean())) for x in found]
    told = (f"{least:g}: {recall:.3f}" for least, (recall, _) in zip(CONFIDENCES, scores))
    log.info("R@1 on %s by least confidence: %s", where.split, ", ".join(told))
    return CONFIDENCES[max(range(len(scores)), key=scores.__getitem__)]


class Judge:
    """Judges one run; all processes call it together, and the first writes."""

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
            _tell(arms[where.split])
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
        if where is None or self.path.exists():
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
    cuts.tell(f"{split} queries")


def _tell(arms: Mapping[str, Measures]) -> None:
    found = {arm: float(values["recall@1"].mean()) for arm, values in arms.items()}
    log.info("R@1 %s", ", ".join(f"{arm} {share:.3f}" for arm, share in found.items()))
    if found["oracle"] - found["sft"] < ROOM:
        log.warning(
            "True attributes would find hardly more than the generator's do: there is little "
            "to gain. Has the encoder seen attributes in training (data.attribute_share)?"
        )
