"""R@1 on the built-in catalogue: untrained, VLM2Vec and AGCL (or other arms), several seeds.

python benchmarks/built_in.py --out /tmp/built_in [--seeds 0 1 2] [--arm NAME:FIELD=VALUE,... ...]

Each arm is configs/agcl.py with changed fields; `agcl` and `vlm2vec` are arms of that file.
Finished runs are kept, so a call continues where the last call stopped. To choose among arms use
--validation: it shows only the validation split's scores.
"""

import argparse
import json
from pathlib import Path

from running import evaluation, spread, train, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", nargs="+", default=["vlm2vec", "agcl"])
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE for every arm")
    parser.add_argument("--validation", action="store_true", help="no test score is shown or kept")
    parser.add_argument("--name", default="built_in", help="of the result file")
    args = parser.parse_args()
    shared = dict(field.split("=", 1) for field in args.set)
    scores = {}
    for arm in args.arm:
        name, _, changes = arm.partition(":")
        config = "configs/agcl.py" + (":vlm2vec" if name.startswith("vlm2vec") else "")
        fields = shared | dict(change.split("=", 1) for change in changes.split(",") if change)
        for seed in args.seeds:
            workdir = args.out / f"{name}-{seed}"
            if not (workdir / "evaluation.json").exists():
                train(config, workdir, fields | {"seed": seed})
            if args.validation:
                scores.setdefault(name, {})[seed] = validation(workdir)
            else:
                before = evaluation(workdir, "evaluation_before.json")
                scores.setdefault("untrained", {})[seed] = before
                scores.setdefault(name, {})[seed] = evaluation(workdir)
            values = ", ".join(f"{k} {v:.3f}" for k, v in shown(scores[name][seed]).items())
            print(f"{name} seed {seed}: {values}", flush=True)
    columns = list(shown(scores[name][args.seeds[0]]))
    print("\n| arm | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for arm, by_seed in scores.items():
        cells = [spread([shown(s)[column] for s in by_seed.values()]) for column in columns]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    write(args.name, {"arms": args.arm, "set": args.set, "scores": scores})


def shown(scores: dict) -> dict[str, float]:
    """R@1 of each task of an evaluation; the scores of a validation as they are."""
    return {k: v["recall@1"] if isinstance(v, dict) else v for k, v in scores.items()}


def validation(workdir: Path) -> dict[str, float]:
    """R@1 and MRR of the last step on the validation split."""
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: last[name] for name in ("validation", "validation_mrr")}


if __name__ == "__main__":
    main()
