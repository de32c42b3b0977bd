"""R@1 on the built-in catalogue: untrained, VLM2Vec and AGCL (or other arms), several seeds.

python benchmarks/built_in.py --out /tmp/built_in [--seeds 0 1 2] [--arm NAME:FIELD=VALUE,... ...]

Each arm is configs/agcl.py with fields changed; `agcl` and `vlm2vec` are the file's own. Finished
runs are kept, so that a call goes on where the last one stopped.
"""

import argparse
from pathlib import Path

from running import evaluation, spread, train, write

TASKS = ("image+text->image+text", "image->image", "text->text", "image->text", "text->image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", nargs="+", default=["vlm2vec", "agcl"])
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE for every arm")
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
            scores.setdefault("untrained", {})[seed] = evaluation(workdir, "evaluation_before.json")
            scores.setdefault(name, {})[seed] = evaluation(workdir)
            r1 = scores[name][seed][TASKS[0]]["recall@1"]
            print(f"{name} seed {seed}: R@1 {r1:.3f}", flush=True)
    print("\n| arm | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for arm, by_seed in scores.items():
        cells = [spread([s[task]["recall@1"] for s in by_seed.values()]) for task in TASKS]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    write(args.name, {"arms": args.arm, "set": args.set, "scores": scores})


if __name__ == "__main__":
    main()
