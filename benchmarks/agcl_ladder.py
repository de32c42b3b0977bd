"""AGCL over VLM2Vec, part by part, both fine-tuned from the base without attributes in any text.

python benchmarks/agcl_ladder.py --out DIR --phase parts    # which parts of a listing make a pair
python benchmarks/agcl_ladder.py --out DIR --phase choose   # all arms, one seed
python benchmarks/agcl_ladder.py --out DIR --phase table --arms vlm2vec mined all   # five seeds

The phases parts and choose judge on the validation split, and table on the test split: nothing is
chosen on test. All are judged on one catalogue with 84 validation and 252 test families; an arm
differs from VLM2Vec in what ARMS says. --arms also takes NAME:FIELD=VALUE,..., an arm of your own
on top of mined batches; --set changes fields of every run.

Batches are of --batch pairs times each of --times, in as many micro-batches (GradCache). Such a
batch takes `times` times the work a step, so it is trained --steps / sqrt(times) steps: arms are
compared at equal batch and equal steps alone.

Each run is kept in DIR/runs, under a name that says its fields. A call does what is not done yet,
a run that was stopped goes on from its checkpoint, and phases share runs whose fields are equal. A
changed base needs another DIR. DIR/PHASE/table.md and results.json are written after each arm, so
that they can be read at any time; the times there are of the runs that they show, whichever call
made them. Copy the results of the phase table to benchmarks/results/agcl_ladder.json.

Differences of an arm are paired and have two intervals of 95%:
  over queries   each query's value is its mean over the seeds; Agresti and Min's interval of these
                 paired differences (retrieval.metrics.paired). It tells what other queries would
                 give with these trained encoders.
  over seeds     each seed has one difference, the mean over all queries between two runs of that
                 seed; Student's t of these. It tells what other seeds would give on these queries,
                 and needs two.

False negatives are the candidates of a query that truly are its product. A batch holds an id once,
so the mask of equal ids (same_product) has no work but where mined hard negatives are of other
queries' ids: hence the arms `hard` and `hard_ids`.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from running import evaluation, metrics, train, training_flops, write
from scipy import stats

from afmrl_jax.core.tables import markdown_table
from afmrl_jax.retrieval.metrics import paired

TASK = "image+text->image+text"
JUDGED = {"data.builtin.validation_families": 84, "data.builtin.test_families": 252}
# The smallest catalogue beside the training listings: its scores are not read.
UNJUDGED = {"data.builtin.validation_families": 1, "data.builtin.test_families": 1}
SHOWN = {"R@1": "recall@1", "R@10": "recall@10", "MRR": "mrr"}
BASELINE, MINED = "vlm2vec", "mined"
BM25 = {"loss.negative_weight": "bm25"}
# Fields on top of VLM2Vec. All but the first have mined batches; see `arm_fields`.
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    MINED: {},
    "mined_differing": {"data.agreeing_neighbours": "drop"},
    "mask_target": {"loss.mask_target_similarity": 0.95},
    "mask_margin": {"loss.mask_margin": 0.1},
    "mask_attributes": {"loss.mask_attributes": 0.95},
    "hard": {"data.hard_negatives": 1},
    "hard_ids": {"data.hard_negatives": 1, "loss.same_product": "drop"},
    "weight_raw": BM25 | {"loss.weight_scale": "raw"},  # the paper's
    "weight_scaled": BM25,
    "weight_strong": BM25 | {"loss.weight_strength": 3},
    "weight_plain_positive": BM25 | {"loss.boost_positive": False},
    "weight_similarity": {"loss.negative_weight": "similarity"},  # LLaVE's
    "all": BM25 | {"loss.mask_attributes": 0.95, "loss.same_product": "drop"},
}
CROPPED = {"data.crop_area": 0.3}
PARTS: dict[str, dict[str, Any]] = {
    "modalities": {"data.parts": "modalities 1"},
    "photo": {"data.parts": "photo 1"},
    "modalities_photo": {"data.parts": "modalities 0.5, photo 0.5"},
    "halves": CROPPED | {"data.parts": "halves 1"},
    "words": CROPPED | {"data.parts": "words 1"},
    "photo_words": CROPPED | {"data.parts": "photo 0.5, words 0.5"},
}
BEFORE = "before"  # the base itself: a step at a learning rate of 0 makes a checkpoint of it
STILL = {"steps": 1, "optimizer.learning_rate": 0}


@dataclass(frozen=True)
class Cell:
    """What arms are compared in: an identity and a size of batch."""

    identity: str
    times: int

    def __str__(self) -> str:
        return f"{self.identity}-x{self.times}"


@dataclass(frozen=True)
class Done:
    """A run: its folder and the seconds that it took."""

    workdir: Path
    seconds: float


class Runs:
    """The trained and judged runs of a call."""

    def __init__(self, args: argparse.Namespace, arms: dict[str, dict[str, Any]]):
        self.args, self.arms = args, arms | {BEFORE: STILL}
        self.folder = (args.out / "runs").absolute()
        self.split = "test" if args.phase == "table" else "validation"
        self.set = dict(field.split("=", 1) for field in args.set)
        self._trained: dict[tuple[Cell, str, int], Done] = {}
        self._judged: dict[tuple[Cell, str, int], Done] = {}
        self._values: dict[Path, dict[str, np.ndarray]] = {}

    def steps(self, cell: Cell) -> int:
        return max(1, round(self.args.steps / math.sqrt(cell.times)))

    def judge(self, cell: Cell, arm: str, seed: int) -> None:
        """Trains an arm and judges it, unless that is done."""
        steps = self.steps(cell)
        fields = UNJUDGED | {
            "init_from": self.args.base,
            "seed": seed,
            "steps": steps,
            "batch": self.args.batch * cell.times,
            "micro_batches": cell.times,
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": max(1, steps // 4),
            "eval.tasks": TASK,
            "data.identity": cell.identity,
            "data.attribute_share": 0,
            "loss.same_product": "keep",
        }
        if cell.identity != "product" and self.args.phase != "parts":
            fields |= PARTS[self.args.parts]
        fields |= self.set | self.arms[arm]
        key, name = (cell, arm, seed), f"{cell}-{arm}-{seed}"
        self._trained[key] = self._run("configs/agcl.py:vlm2vec", name, fields)
        fields = {"checkpoint": self._trained[key].workdir, "eval.tasks": TASK} | JUDGED
        fields |= {"eval.query_split": self.split, "eval.gallery_split": self.split}
        self._judged[key] = self._run("configs/evaluate.py", f"{name}-{self.split}", fields)

    def _run(self, config: str, name: str, fields: dict[str, Any]) -> Done:
        """Runs a program to its end, unless it was. Its time stands in WORKDIR.json."""
        digest = hashlib.blake2b(repr(sorted(fields.items())).encode(), digest_size=4).hexdigest()
        workdir = self.folder / f"{name}-{digest}"
        note = Path(f"{workdir}.json")
        run = json.loads(note.read_text()) if note.exists() else {"seconds": 0.0, "done": False}
        if not run["done"]:
            began = time.monotonic()
            try:
                train(config, workdir, fields)
                run["done"] = True
            finally:
                run["seconds"] += time.monotonic() - began
                note.write_text(json.dumps(run))
            print(f"{workdir.name}: {run['seconds']:.0f} s", flush=True)
        return Done(workdir, run["seconds"])

    def workdir(self, cell: Cell, arm: str, seed: int) -> Path:
        return self._trained[cell, arm, seed].workdir

    def seconds(self, cell: Cell, arm: str, seed: int) -> float:
        """Seconds to train and judge a run."""
        key = cell, arm, seed
        return self._trained[key].seconds + self._judged[key].seconds

    def values(self, cell: Cell, arm: str, seed: int) -> dict[str, np.ndarray]:
        """Each query's value of each metric. The base itself has the same with any seed."""
        key = before(self.args) if arm == BEFORE else (cell, arm, seed)
        workdir = self._judged[key].workdir
        if workdir not in self._values:
            task = evaluation(workdir, "evaluation_queries.json")[TASK]
            self._values[workdir] = {name: np.array(v) for name, v in task["values"].items()}
        return self._values[workdir]

    @property
    def compared(self) -> dict[str, str]:
        """The arms with which the others are compared, and their names in the table."""
        if self.args.phase == "parts":
            return {BEFORE: "the base"}
        return {BASELINE: "VLM2Vec", MINED: "mined"}


def before(args: argparse.Namespace) -> tuple[Cell, str, int]:
    return Cell("product", 1), BEFORE, args.seeds[0]


def arm_fields(text: str, mined: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and fields of an arm of --arms. mined: the fields of mined batches."""
    name, colon, changes = text.partition(":")
    if not colon and name not in ARMS:
        raise SystemExit(
            f"there is no arm {name!r}: give one of {', '.join(ARMS)}, or fields to it"
        )
    fields = dict(change.split("=", 1) for change in changes.split(",")) if colon else ARMS[name]
    return name, fields if name == BASELINE else mined | fields


def student95(values: list[float]) -> float | None:
    """Half the width of Student's 95% interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * error)


def gains(others: list[dict], judged: list[dict]) -> dict[str, dict[str, Any]]:
    """Metric -> the mean difference of two arms and its intervals. others, judged: the values of
    queries, of each seed."""
    found = {}
    for metric in SHOWN.values():
        pairs = [(b[metric], a[metric]) for b, a in zip(others, judged, strict=True)]
        mean, half = paired(*np.mean(pairs, axis=0))
        by_seed = [float(np.mean(a - b)) for b, a in pairs]
        found[metric] = {"mean": mean, "over_queries": half, "over_seeds": student95(by_seed)}
        found[metric]["by_seed"] = by_seed
    return found


def masks(workdirs: list[Path]) -> dict[str, Any]:
    """The false negatives of a run's batches, and what each mask did, over all steps and seeds.

    caught: share of the false negatives that it drops; None where there are none. wrongly: share of
    the true negatives that it drops.
    """
    rows = [row for workdir in workdirs for row in metrics(workdir)]
    duplicates = sum(row["duplicates"] for row in rows)
    prefix = "masked_by_"
    rules = [name.removeprefix(prefix) for name in rows[0] if name.startswith(prefix)]
    found: dict[str, Any] = {"false_negatives": duplicates / len(rows), "rules": {}}
    for rule in rules:
        caught = sum(row[f"duplicates_masked_by_{rule}"] for row in rows)
        masked = sum(row[f"masked_by_{rule}"] for row in rows)
        found["rules"][rule] = {
            "caught": caught / duplicates if duplicates else None,
            "wrongly": (masked - caught) / (len(rows) - duplicates),
        }
    return found


def collect(runs: Runs, cell: Cell, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Arm -> its scores, its gains over the arms of `Runs.compared`, and what masks did."""
    found = {}
    for arm in arms:
        judged = [runs.values(cell, arm, seed) for seed in seeds]
        workdirs = [runs.workdir(cell, arm, seed) for seed in seeds]
        row = {
            "fields": runs.arms[arm],
            "by_seed": {m: [float(v[m].mean()) for v in judged] for m in SHOWN.values()},
            "tflop": float(np.mean([training_flops(workdir) for workdir in workdirs])) / 1e12,
            "seconds": [runs.seconds(cell, arm, seed) for seed in seeds],
            **masks(workdirs),
        }
        for name in runs.compared:
            if name == BEFORE or (name in arms and name != arm):
                others = [runs.values(cell, name, seed) for seed in seeds]
                row[f"over_{name}"] = gains(others, judged)
        found[arm] = row
    return found


def shown(gain: dict[str, dict[str, Any]] | None) -> str:
    """The gain at R@1, its interval over queries, and over seeds: "+.012 ± .008 ± .017"."""
    if not gain:
        return ""
    first = gain[SHOWN["R@1"]]
    text = f"{first['mean']:+.3f} ± {first['over_queries']:.3f}"
    return text + (f" ± {first['over_seeds']:.3f}" if first["over_seeds"] is not None else "")


def scores_table(rows: dict[str, Any], compared: dict[str, str]) -> str:
    lines = []
    for arm, row in rows.items():
        cells = [f"{np.mean(row['by_seed'][metric]):.3f}" for metric in SHOWN.values()]
        first = row["by_seed"][SHOWN["R@1"]]
        if len(first) > 1:
            cells[0] += f" ({min(first):.3f}-{max(first):.3f})"
        over = [shown(row.get(f"over_{name}")) for name in compared]
        lines.append([arm, *cells, *over, f"{row['tflop']:.2f}", f"{np.mean(row['seconds']):.0f}"])
    over = [f"R@1 over {name}" for name in compared.values()]
    head = ["arm", *SHOWN, *over, "training, TFLOP", "seconds a seed"]
    return markdown_table(head, lines)


def masks_table(rows: dict[str, Any]) -> str:
    lines = []
    for arm, row in rows.items():
        false = f"{row['false_negatives']:.3%}"
        for rule, did in row["rules"].items() or [("", None)]:
            caught = wrongly = ""
            if did:
                caught = "none to catch" if did["caught"] is None else f"{did['caught']:.1%}"
                wrongly = f"{did['wrongly']:.3%}"
            lines.append([arm, false, rule, caught, wrongly])
    return markdown_table(["arm", "false negatives", "mask", "caught", "wrongly dropped"], lines)


def report(runs: Runs, done: dict[Cell, list[str]], seeds: list[int]) -> None:
    """Writes table.md and results.json of what is done."""
    args = runs.args
    folder = args.out / args.phase
    cells = {cell: collect(runs, cell, arms, seeds) for cell, arms in done.items()}
    total = sum(sum(row["seconds"]) for rows in cells.values() for row in rows.values())
    total += runs.seconds(*before(args))
    start = runs.values(*before(args))
    n_queries = len(start[SHOWN["R@1"]])
    scores = {name: float(start[metric].mean()) for name, metric in SHOWN.items()}
    lines = [
        f"{n_queries:,} queries of the {runs.split} split, seeds {seeds}. "
        f"All runs together: {total / 60:.0f} minutes.",
        f"Before training: {', '.join(f'{name} {value:.3f}' for name, value in scores.items())}.",
        "A difference is followed by its interval over queries, then by that over seeds.",
    ]
    for cell, rows in cells.items():
        pairs, steps = args.batch * cell.times, runs.steps(cell)
        lines.append(f"\n## {cell.identity}: {pairs} pairs, {steps} steps\n")
        lines += [scores_table(rows, runs.compared), "", masks_table(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    result = {
        "options": {name: str(value) for name, value in vars(args).items()},
        "set": runs.set,
        "seconds": total,
        "before": scores,
        "cells": {str(cell): rows for cell, rows in cells.items()},
    }
    write("results", result, folder)


def parsed() -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The options, and the fields of each arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--phase", choices=("parts", "choose", "table"), required=True)
    add("--base", default="base", help='init_from of all runs, paths absolute; "" = from scratch')
    add("--arms", nargs="+", help="of the phases choose and table; default: all")
    add("--identity", nargs="+", choices=("product", "listing", "mixed"))
    add("--times", type=int, nargs="+", help="sizes of the batch, as multiples of --batch")
    add("--seeds", type=int, nargs="+", help="default: 0; for the table 0 to 4")
    add("--steps", type=int, default=60, help="of the smallest batch")
    add("--batch", type=int, default=64, help="pairs of the smallest batch")
    add("--parts", choices=PARTS, default="photo_words", help="of pairs of one listing")
    add("--lookalike-share", type=float, default=0.5, help="of mined batches")
    add("--lookalike-group", type=int, default=8, help="twice a product's listings, or more")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for every run")
    args = parser.parse_args()
    parts = args.phase == "parts"
    args.seeds = args.seeds or (list(range(5)) if args.phase == "table" else [0])
    args.times = args.times or ([1] if parts else [1, 4, 16])
    args.identity = args.identity or (["listing"] if parts else ["product", "listing", "mixed"])
    mined = {
        "data.lookalike_share": args.lookalike_share,
        "data.lookalike_group": args.lookalike_group,
        "data.neighbours": 2 * args.lookalike_group,
    }
    arms = PARTS if parts else dict(arm_fields(arm, mined) for arm in args.arms or ARMS)
    return args, arms


def main() -> None:
    args, arms = parsed()
    runs = Runs(args, arms)
    runs.judge(*before(args))
    cells = [Cell(identity, times) for times in args.times for identity in args.identity]
    print(f"{len(cells) * len(arms) * len(args.seeds)} runs, those that are done among them")
    done: dict[Cell, list[str]] = {}
    for cell in cells:
        for arm in arms:
            for seed in args.seeds:
                runs.judge(cell, arm, seed)
            done.setdefault(cell, []).append(arm)
            report(runs, done, args.seeds)
    print((args.out / args.phase / "table.md").read_text())


if __name__ == "__main__":
    main()
