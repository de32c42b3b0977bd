"""Repeats a run on several layouts of devices and processes: the losses must agree to 1e-5.

python benchmarks/same_numbers.py --out /tmp/same_numbers [--steps 20]

The layouts: 1 device; 8 fake devices as meshes 1x8x1x1, 1x2x4x1, 1x2x2x2; 2 processes of 1 device.
The learning rate is small, because Adam's first steps are signs of gradients: at a large rate,
rounding in a gradient near 0 would become a large step.
"""

import argparse
import os
import socket
import subprocess
from pathlib import Path

from running import ROOT, command, losses, write

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
LAYOUTS = {  # name -> (processes, environment, mesh: slice x data x fsdp x tensor)
    "1 device": (1, {}, (1, 1, 1, 1)),
    "8 devices, 1x8x1x1": (1, EIGHT, (1, 8, 1, 1)),
    "8 devices, 1x2x4x1": (1, EIGHT, (1, 2, 4, 1)),
    "8 devices, 1x2x2x2": (1, EIGHT, (1, 2, 2, 2)),
    "2 processes": (2, {}, (1, 2, 1, 1)),
}
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(layout: str, workdir: Path, fields: dict, timeout: float = 1800) -> dict[int, float]:
    """Step -> loss of a whole run on one layout. Raises RuntimeError if a process fails."""
    processes, environment, mesh = LAYOUTS[layout]
    axes = dict(zip(("mesh.slice", "mesh.data", "mesh.fsdp", "mesh.tensor"), mesh))
    address = f"127.0.0.1:{free_port()}"
    workdir.parent.mkdir(parents=True, exist_ok=True)
    running = []
    for index in range(processes):
        env = os.environ | environment
        if processes > 1:
            env |= {
                "COORDINATOR_ADDRESS": address,
                "NUM_PROCESSES": str(processes),
                "PROCESS_ID": str(index),
            }
        with Path(f"{workdir}.{index}.log").open("w") as log:
            running.append(
                subprocess.Popen(
                    command("configs/agcl.py", workdir, fields | axes),
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise RuntimeError(f"{layout}: exit {codes}; see {workdir}.*.log")
    return losses(workdir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate; VLM2Vec-V2's")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists: name a new folder, so that nothing old is compared")
    fields = {
        "steps": args.steps,
        "batch": args.batch,
        "micro_batches": args.micro_batches,
        "log_every": 1,
        "checkpoint_every": 0,
        "eval_every": 0,
        "model.dtype": "float32",
        "optimizer.learning_rate": args.rate,
        "eval.tasks": "image+text->image+text",
    }
    layout_losses = {}
    for number, layout in enumerate(LAYOUTS):
        layout_losses[layout] = run(layout, args.out / str(number), fields)
        first = next(iter(layout_losses.values()))
        worst = max(abs(layout_losses[layout][s] - first[s]) for s in first)
        last = layout_losses[layout][args.steps]
        print(f"{layout:22}  last loss {last:.7f}  largest difference {worst:.2e}", flush=True)
        if worst > TOLERANCE:
            raise SystemExit(f"{layout} differs from 1 device by {worst:.2e}, above {TOLERANCE}")
    write("same_numbers", {"fields": fields, "losses": layout_losses})


if __name__ == "__main__":
    main()
