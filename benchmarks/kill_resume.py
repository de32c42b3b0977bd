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
    began = time.monotonic()
    train("configs/agcl.py", args.out / "whole", fields)
    seconds = time.monotonic() - began
    killed = args.out / "killed"
    moments = random.Random(args.seed)
    for number in range(args.kills):
        after = moments.uniform(0.3, 0.9) * seconds / (1 if number == 0 else 2)
        process = subprocess.Popen(
            command("configs/agcl.py", killed, fields),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(after)
        if process.poll() is not None:
            raise SystemExit(f"the run ended before {after:.1f} s: raise --steps")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log = killed / "metrics.jsonl"
        at = len(log.read_text().splitlines()) if log.exists() else 0
        print(f"kill {number + 1}: after {after:.1f} s, {at} steps logged", flush=True)
    train("configs/agcl.py", killed, fields)
    whole, again = final_state(args.out / "whole"), final_state(killed)
    different = [name for name in whole if not np.array_equal(whole[name], again[name])]
    print(f"{len(whole)} arrays, {len(different)} different")
    write("kill_resume", {"fields": fields, "arrays": len(whole), "different": different})
    if different or whole.keys() != again.keys():
        raise SystemExit(f"not bit-equal: {different}")


if __name__ == "__main__":
    main()
