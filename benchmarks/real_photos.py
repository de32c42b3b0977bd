"""Retrieval on real photos: trains on fashion and half of luma, tests on luma's other garments.

python benchmarks/real_photos.py --data ../shared/data --out /tmp/real_photos [--seeds 0 1 2]

luma is split by garment: a style is in the test split if int(sha256(style_id), 16) % 2 == 1. The
queries are the test listings whose product has another listing. The gallery is all of luma and
fashion without the query. The texts are title, description and category, never the structured
attributes.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from running import evaluation, spread, train, write

TASKS = {"image+text": "image+text->image+text", "image alone": "image->image"}
METRICS = ("recall@1", "recall@5", "recall@10")
# Photos are resized to some 80 px: at most 100 patches, or 25 tokens, per image.
FIELDS = {
    "data.max_patches": 100,
    "data.max_tokens": 72,
    "data.min_pixels": 4096,
    "data.max_pixels": 6400,
    "data.crop_area": 0.5,
    "data.flip_share": 0.5,
    "data.attribute_share": 0,
    "eval.tasks": "image->text, text->image",
    "eval_every": 0,
    "checkpoint_every": 50,
}


def split_luma(source: Path, target: Path, *, validation: bool = False) -> None:
    """Writes luma with `split` set by garment. validation: True puts a fifth of the training
    garments into a validation split."""
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "images").exists():
        shutil.copytree(source / "images", target / "images")
    lines = []
    for line in (source / "products.jsonl").read_text().splitlines():
        listing = json.loads(line)
        number = int(hashlib.sha256(listing["style_id"].encode()).hexdigest(), 16)
        listing["split"] = "test" if number % 2 == 1 else "train"
        if validation and number % 10 == 0:
            listing["split"] = "validation"
        lines.append(json.dumps(listing) + "\n")
    (target / "products.jsonl").write_text("".join(lines))


def judge(checkpoint: Path, workdir: Path, luma: Path, fashion: Path) -> dict:
    fields = {
        "checkpoint": checkpoint,
        "eval.queries": luma,
        "eval.gallery": f"{luma},{fashion}",
        "eval.query_split": "test",
        "eval.gallery_split": "all",
        "eval.tasks": ",".join(TASKS.values()),
    }
    if not (workdir / "evaluation.json").exists():
        train("configs/evaluate.py", workdir, fields)
    return evaluation(workdir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds luma/ and fashion/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE for every run")
    args = parser.parse_args()
    luma, fashion = (args.out / "luma").absolute(), (args.data / "fashion").absolute()
    split_luma(args.data / "luma", luma)
    changes = dict(field.split("=", 1) for field in args.set)
    scores = {}
    for seed in args.seeds:
        fields = FIELDS | {"data.path": f"{fashion},{luma}", "seed": seed} | changes
        for arm in ("untrained", "vlm2vec", "agcl"):
            config = "configs/agcl.py" + (":vlm2vec" if arm == "vlm2vec" else "")
            workdir = (args.out / f"{arm}-{seed}").absolute()
            # A step at a learning rate of 0 makes a checkpoint of the untrained parameters.
            steps = {"steps": args.steps}
            if arm == "untrained":
                steps = {"steps": 1, "optimizer.learning_rate": 0}
            if not (workdir / "evaluation.json").exists():
                train(config, workdir, fields | steps)
            tasks = judge(workdir, args.out / f"{arm}-{seed}-luma", luma, fashion)
            scores.setdefault(arm, {})[seed] = tasks
            recalls = {name: round(tasks[task]["recall@1"], 3) for name, task in TASKS.items()}
            print(f"{arm} seed {seed}: R@1 {recalls}", flush=True)
    print("\n| arm | view | " + " | ".join(METRICS) + " |\n|---|---|" + "---|" * len(METRICS))
    for arm, by_seed in scores.items():
        for name, task in TASKS.items():
            cells = [spread([tasks[task][m] for tasks in by_seed.values()]) for m in METRICS]
            print(f"| {arm} | {name} | " + " | ".join(cells) + " |")
    write("real_photos", {"steps": args.steps, "fields": FIELDS | changes, "scores": scores})


if __name__ == "__main__":
    main()
