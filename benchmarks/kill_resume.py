"""kill -9 at random moments, start again: the final parameters must equal those of a run never
stopped, bit for bit.

python benchmarks/kill_resume.py --out /tmp/kill_resume [--kills 3] [--steps 30]
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

from afmrl_jax.training.checkpoint import find_checkpoints


def final_state(workdir: Path) -> dict:
    """Every array of the last checkpoint, by name."""
    checkpoints, step = find_checkpoints(str(workdir))
    state = checkpoints.restore_raw(step)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)}


def steps_logged(workdir: Path) -> int:
    log = workdir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: name a new folder, so that nothing old is compared")
    fields = {
        "steps": args.steps,
        "batch": 16,
        "log_every": 1,
        "checkpoint_every": 5,
        "eval_every": 10,
        "eval.tasks": "image+text->image+text",
    }
    train("configs/agcl.py", args.out / "whole", fields)
    killed = args.out / "killed"
    chance = random.Random(args.seed)
    for number, target in enumerate(sorted(chance.sample(range(1, args.steps - 1), args.kills))):
        process = subprocess.Popen(
            command("configs/agcl.py", killed, fields),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and steps_logged(killed) < target:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))  # somewhere within a step, or while one is being saved
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {target} could be killed: raise --steps")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"kill {number + 1}: {steps_logged(killed)} of {args.steps} steps logged", flush=True)
    train("configs/agcl.py", killed, fields)
    whole, again = final_state(args.out / "whole"), final_state(killed)
    different = [name for name in whole if not np.array_equal(whole[name], again[name])]
    print(f"{len(whole)} arrays, {len(different)} different")
    write("kill_resume", {"fields": fields, "arrays": len(whole), "different": different})
    if different or whole.keys() != again.keys():
        raise SystemExit(f"not bit-equal: {different}")


if __name__ == "__main__":
    main()
