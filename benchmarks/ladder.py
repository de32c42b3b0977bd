"""Evaluates the method rung by rung: the gain of each stage over the one before it.

python benchmarks/ladder.py --out DIR                              # the built-in catalogue
python benchmarks/ladder.py --out DIR --photos ../shared/data      # fashion and garment photos
python benchmarks/ladder.py --out DIR --smoke                      # some minutes; means nothing

To save time, --columns queries --leave-out small annotate again skips the most expensive stages.

Every stage is a separate run in DIR/SEED-STAGE. Finished stages are kept, so a call continues where
the last one stopped, and rungs share stages: one SFT, one RAR and one AGCL per seed. Two calls with
different --seeds may run at the same time; a later call with all seeds prints the tables. All
encoders see attributes in most of their training texts, so that rungs differ only in what their
names say. agcl_ladder.py compares the parts of AGCL.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from real_photos import split_luma
from running import evaluation, train, training_flops, write

from afmrl_jax.core.tables import markdown_table
from afmrl_jax.retrieval.metrics import interval95, paired

TASK = "image+text->image+text"
COLUMNS = {"queries": "queries alone", "both": "queries and gallery"}
METRICS = {"R@1": "recall@1", "R@5": "recall@5", "R@10": "recall@10", "mAP": "map"}
CLASSES = {"Acc": "accuracy", "NMI": "nmi", "ARI": "ari", "purity": "purity"}


@dataclass(frozen=True)
class Rung:
    """A row of the table."""

    name: str
    encoder: str  # the stage that trained the encoder
    # Origin of the attributes in the texts: none | oracle | a stage that trained a generator.
    attributes: str = "none"
    sure: bool = False  # leaves out attributes below the confidence that RAR chose on validation
    needs: tuple[str, ...] = ()  # further stages that count for its training FLOPs

    def stands_on(self) -> set[str]:
        """The stages that the rung needs: --leave-out of one of them leaves out the rung."""
        return {self.encoder, self.attributes, *self.needs} | ({"sure"} if self.sure else set())


RUNGS = (
    Rung("untrained", "untrained"),
    Rung("VLM2Vec", "vlm2vec"),
    Rung("+ attribute-label head", "head"),
    Rung("+ AGCL", "agcl"),
    Rung("+ SFT's attributes", "agcl", "sft", needs=("sft",)),
    Rung("+ SFT's, the sure ones", "agcl", "sft", True, needs=("sft",)),
    Rung("+ RAR's", "agcl", "rar", needs=("sft", "rar")),
    Rung("+ RAR's, the sure ones", "agcl", "rar", True, needs=("sft", "rar")),
    Rung(
        "+ RAR's, by a distilled generator",
        "agcl",
        "small",
        needs=("sft", "rar", "annotate", "small"),
    ),
    Rung("+ CIT", "again", "rar", needs=("agcl", "sft", "rar", "annotate")),
    Rung("oracle's attributes", "agcl", "oracle"),
)


@dataclass(frozen=True)
class Size:
    """The length of each stage, and other fields of its configuration."""

    steps: int  # steps of an encoder
    stages: dict[str, dict[str, Any]]  # sft, rar, annotate or small -> fields
    encoder: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


BUILT_IN = Size(
    steps=240,
    stages={
        "sft": {"steps": 1500},
        "rar": {"steps": 80},
        "annotate": {"share": 0.4},
        "small": {"steps": 400},
    },
    evaluate={"eval.probe_listings": 1000},
)
# Photos are resized to some 80 px, 25 tokens. Descriptions are long, and come after the attributes.
PHOTO = {"data.max_patches": 100, "data.min_pixels": 4096, "data.max_pixels": 6400}
PHOTOS = Size(
    steps=60,
    stages={
        "sft": {"steps": 300} | PHOTO,
        # With the default kl, RAR's watch stops the run at step 20, when all answers have become
        # "style: Tank".
        "rar": {"steps": 10, "eval_every": 5, "policy.kl": 0.1},
        "annotate": {"share": 0.4},
        "small": {"steps": 150} | PHOTO,
    },
    encoder=PHOTO
    | {
        "data.max_tokens": 84,
        "data.crop_area": 0.5,
        "data.flip_share": 0.5,
        "data.lookalike_share": 0.0,  # since most products have one listing
    },
    evaluate={"eval.probe_listings": 1000},
)
SMOKE = Size(
    steps=4,
    stages={
        "sft": {"steps": 8, "eval.listings": 32},
        "rar": {"steps": 2, "reward.gallery": 200, "eval.listings": 32},
        "annotate": {"share": 0.01},
        "small": {"steps": 8, "eval.listings": 32},
    },
    evaluate={"eval.probe_listings": 200},
    seeds=(0,),
)


class Ladder:
    """The stages and evaluations of one seed."""

    def __init__(self, out: Path, size: Size, seed: int, photos: Path | None, left_out: set[str]):
        self.out, self.size, self.seed, self.left_out = out.absolute(), size, seed, left_out
        self.rungs = [r for r in RUNGS if not r.stands_on() & left_out]
        self.data: dict[str, Any] = {}
        self.judged: dict[str, Any] = dict(size.evaluate)
        if photos:
            luma, fashion = (out / "luma").absolute(), (photos / "fashion").absolute()
            split_luma(photos / "luma", luma, validation=True)
            self.data = {"data.path": f"{fashion},{luma}"}
            self.judged |= {
                "eval.queries": luma,
                "eval.gallery": f"{luma},{fashion}",
                "eval.query_split": "test",
                "eval.gallery_split": "all",
            }

    def workdir(self, stage: str) -> Path:
        return self.out / f"{self.seed}-{stage}"

    def run(self, stage: str, config: str, fields: dict[str, Any]) -> None:
        """Runs a stage unless it is done."""
        workdir = self.workdir(stage)
        if (self.out / f"{workdir.name}.done").exists():
            return
        began = time.monotonic()
        train(config, workdir, fields)
        (self.out / f"{workdir.name}.done").touch()
        print(f"{workdir.name}: {time.monotonic() - began:.0f} s", flush=True)

    def encoder(self, stage: str, arm: str = "", **fields: Any) -> None:
        config = f"configs/agcl.py{arm and ':' + arm}"
        shared = {"steps": self.size.steps, "eval_every": 0, "eval.tasks": TASK, "seed": self.seed}
        self.run(stage, config, shared | self.data | self.size.encoder | fields)

    def train_all(self) -> None:
        """Trains the stages of all rungs, in the order of their dependencies."""
        if "untrained" not in self.left_out:
            self.encoder("untrained", "vlm2vec", **{"steps": 1, "optimizer.learning_rate": 0})
        for stage, arm in (("vlm2vec", "vlm2vec"), ("head", "head"), ("agcl", "")):
            if stage not in self.left_out:
                self.encoder(stage, arm)
        self.train_generators()

    def train_generators(self) -> None:
        """Trains SFT and RAR, and the stages that depend on them."""
        stages, shared = self.size.stages, {"seed": self.seed}
        self.run("sft", "configs/sft.py", shared | self.data | stages["sft"])
        models = {"generator": self.workdir("sft"), "encoder": self.workdir("agcl")}
        self.run("rar", "configs/rar.py", shared | models | self.data | stages["rar"])
        if "annotate" in self.left_out:
            return
        source = {"generator": self.workdir("rar"), "split": "train"}
        self.run("annotate", "configs/annotate.py", source | self.data | stages["annotate"])
        written = {"data.attributes": self.workdir("annotate") / "attributes.jsonl"}
        if "small" not in self.left_out:
            self.run("small", "configs/sft.py", shared | self.data | written | stages["small"])
        if "again" not in self.left_out:
            cit = {"data.described_only": True, "data.attribute_noise": 0}  # as in configs/cit.py
            self.encoder("again", **written | cit)

    def judge(self, rung: Rung, enrich: str, *, classes: bool = True) -> dict[str, Any]:
        """A rung's scores. enrich: "queries" or "both", the texts that get its attributes."""
        fields = {"eval.tasks": TASK, "eval.downstream": classes, "seed": self.seed} | self.judged
        fields |= {"checkpoint": self.workdir(rung.encoder)} | self.data
        stage = f"judged-{rung.encoder}"
        if rung.attributes != "none":
            source = rung.attributes
            fields |= {"eval.enrich": enrich}
            fields["eval.attributes"] = source if source == "oracle" else self.workdir(source)
            stage += f"-{source}-{enrich}"
        if rung.sure:
            chosen = evaluation(self.workdir("rar"))["least_confidence"]
            fields["eval.min_confidence"] = chosen[f"{rung.attributes}_sure"]
            stage += "-sure"
        self.run(stage, "configs/evaluate.py", fields)
        queries = evaluation(self.workdir(stage), "evaluation_queries.json")
        return evaluation(self.workdir(stage)) | {"queries": queries[TASK]}

    def flops(self, rung: Rung) -> float:
        """Useful FLOPs of all training that a rung needs."""
        return sum(training_flops(self.workdir(stage)) for stage in {rung.encoder, *rung.needs})


def summary(seed_values: list[np.ndarray]) -> dict[str, Any]:
    """The mean, half of its 95% interval over queries (of each query's mean over the seeds), and
    the mean by seed. seed_values: each seed's values of the same queries."""
    return {
        "mean": float(np.mean(seed_values)),
        "half": interval95(np.mean(seed_values, axis=0)),
        "by_seed": [float(np.mean(values)) for values in seed_values],
    }


def collect(ladders: list[Ladder], rung: Rung, enrich: str) -> dict[str, Any]:
    # Categories are scored with the queries' attributes in both columns, so that they are equal.
    classed = [ladder.judge(rung, "queries") for ladder in ladders]
    judged = [ladder.judge(rung, enrich, classes=False) for ladder in ladders]
    query_ids = [scores["queries"]["listing_ids"] for scores in judged]
    assert all(ids == query_ids[0] for ids in query_ids), "seeds were judged on different queries"
    cells = {
        name: summary([np.array(scores["queries"]["values"][metric]) for scores in judged])
        for name, metric in METRICS.items()
    }
    for name, metric in CLASSES.items():
        values = [scores["category"][metric] for scores in classed]
        halves = [scores["category"].get(f"{metric}_ci95", np.nan) for scores in classed]
        cells[name] = {"mean": float(np.mean(values)), "half": float(np.mean(halves))}
        cells[name]["by_seed"] = values
    recalls = [scores["queries"]["values"][METRICS["R@1"]] for scores in judged]
    return {"cells": cells, "recalls": np.mean(recalls, axis=0)}


def table(rows: dict[str, dict[str, Any]], names: list[str]) -> str:
    lines = []
    for name, row in rows.items():
        cells = [f"{row['cells'][n]['mean']:.3f} ± {row['cells'][n]['half']:.3f}" for n in names]
        by_seed = row["cells"][names[0]]["by_seed"]
        cells[0] += f" ({min(by_seed):.3f}-{max(by_seed):.3f})"
        lines.append([name, *cells, row["gain"], row["tflops"]])
    head = ["", *names, "R@1 over the rung above", "training, TFLOP"]
    return markdown_table(head, lines) + "\n"


def climb(ladders: list[Ladder], enrich: str) -> dict[str, dict[str, Any]]:
    """Rung -> its cells, its gain over the rung above (paired by query), and its training FLOPs."""
    rows, above = {}, None
    for rung in ladders[0].rungs:
        row = collect(ladders, rung, enrich)
        recalls, gain = row.pop("recalls"), ""
        if above is not None:
            mean, half = paired(above, recalls)
            gain = f"{mean:+.3f} ± {half:.3f}"
        flops = np.mean([ladder.flops(rung) for ladder in ladders])
        rows[rung.name] = row | {"gain": gain, "tflops": f"{flops / 1e12:,.1f}"}
        above = recalls
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="holds luma/ and fashion/")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="STAGE", help="or sure")
    parser.add_argument("--smoke", action="store_true", help="four steps a stage, one seed")
    args = parser.parse_args()
    size = SMOKE if args.smoke else PHOTOS if args.photos else BUILT_IN
    left_out = set(args.leave_out)
    seeds = args.seeds or size.seeds
    ladders = [Ladder(args.out, size, seed, args.photos, left_out) for seed in seeds]
    for ladder in ladders:
        ladder.train_all()
    columns = {enrich: climb(ladders, enrich) for enrich in args.columns}
    for enrich in args.columns:
        print(f"\nAttributes in the texts of {COLUMNS[enrich]}:\n")
        print(table(columns[enrich], [*METRICS, *CLASSES]), flush=True)
    result = {"size": dataclasses.asdict(size), "columns": columns}
    name = "ladder_photos" if args.photos else "ladder_built_in"
    if not args.smoke:
        write(name, result)


if __name__ == "__main__":
    main()
