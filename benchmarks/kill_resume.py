"""Kills a run at random moments, resumes it, and compares it with a run that was not interrupted.

The final parameters must be bit-equal; RAR's rollouts must be equal, too.

python benchmarks/kill_resume.py --out DIR [--kills 3] [--steps 30]                           AGCL
python benchmarks/kill_resume.py --out DIR --steps 12 --kills 6 --generator W/sft --encoder W/agcl
"""

import argparse
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
from running import ROOT, command, train, write

from afmrl_jax.checkpoints.checkpoint import find_checkpoints

AGCL = {
    "batch": 16,
    "log_every": 1,
    "checkpoint_every": 5,
    "eval_every": 10,
    "eval.tasks": "image+text->image+text",
}
RAR = {
    "checkpoint_every": 3,
    "eval_every": 6,
    "rollouts_every": 1,  # every group is compared
    "reward.gallery": 1000,
    "eval.validation_listings": 48,
    "eval.listings": 48,
}


def final_state(workdir: Path) -> dict:
    """Name -> array of the last checkpoint."""
    checkpoints, step = find_checkpoints(str(workdir))
    state = checkpoints.restore_raw(step)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)}


def steps_logged(workdir: Path) -> int:
    log = workdir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_and_resume(
    config: str, folder: Path, fields: dict, kills: int, chance: random.Random
) -> list[float]:
    """Runs to the end despite `kills` kills. Returns the seconds between the end of a step and each
    kill."""
    steps, moments = fields["steps"], []
    for number, target in enumerate(sorted(chance.sample(range(1, steps - 1), kills))):
        process = subprocess.Popen(
            command(config, folder, fields),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and steps_logged(folder) < target:
            time.sleep(0.02)
        # Kills at some moment within the next step, or while a step is being saved.
        moments.append(chance.uniform(0, 0.5 if config == "configs/agcl.py" else 2.0))
        time.sleep(moments[-1])
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {target} could be killed: raise --steps")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(
            f"kill {number + 1}: {moments[-1]:.2f} s after step {target}; "
            f"{steps_logged(folder)} of {steps} steps logged",
            flush=True,
        )
    train(config, folder, fields)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generator", help="of RAR: SFT's workdir")
    parser.add_argument("--encoder", help="of RAR: AGCL's workdir")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: name a new folder, so that nothing old is compared")
    if bool(args.generator) != bool(args.encoder):
        raise SystemExit("RAR needs both --generator and --encoder")
    config, fields = "configs/agcl.py", AGCL | {"steps": args.steps}
    if args.generator:
        config, fields = "configs/rar.py", RAR | {"steps": args.steps}
        fields |= {"generator": args.generator, "encoder": args.encoder}
    whole, killed = args.out / "whole", args.out / "killed"
    train(config, whole, fields)
    moments = kill_and_resume(config, killed, fields, args.kills, random.Random(args.seed))

    first, again = final_state(whole), final_state(killed)
    different = sorted(first.keys() ^ again.keys())
    different += [n for n in first if n in again and not np.array_equal(first[n], again[n])]
    print(f"{len(first)} arrays, {len(different)} different")
    result = {"fields": fields, "arrays": len(first), "kills": moments}
    if args.generator:
        texts = [(folder / "rollouts.jsonl").read_text().splitlines() for folder in (whole, killed)]
        unlike = sum(a != b for a, b in zip(*texts)) + abs(len(texts[0]) - len(texts[1]))
        print(f"{len(texts[0])} groups of rollouts, {unlike} different")
        result |= {"groups": len(texts[0])}
        different += ["rollouts.jsonl"] * bool(unlike)
    write("kill_resume_rar" if args.generator else "kill_resume", result | {"different": different})
    if different:
        raise SystemExit(f"not bit-equal: {different}")


if __name__ == "__main__":
    main()
