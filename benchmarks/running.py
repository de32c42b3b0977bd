"""Shared by the benchmarks: runs the program as a user does, and writes results."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def command(config: str, workdir: Path, fields: dict) -> list[str]:
    """The command line of one run; `fields` are --config.FIELD=VALUE."""
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return [
        *(
            sys.executable,
            "-m",
            "afmrl_jax.main",
            f"--config={config}",
            f"--workdir={workdir.absolute()}",
        ),
        *flags,
    ]


def train(config: str, workdir: Path, fields: dict, env: dict | None = None) -> None:
    """Runs the program to its end; an earlier run is resumed. Its output goes to WORKDIR.log.
    Raises CalledProcessError if it fails."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{workdir}.log").open("a") as log:
        subprocess.run(
            command(config, workdir, fields),
            cwd=ROOT,
            env=os.environ | (env or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


def evaluation(workdir: Path, name: str = "evaluation.json") -> dict:
    return json.loads((workdir / name).read_text())


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl."""
    return {row["step"]: row["loss"] for row in metrics(workdir)}


def training_flops(workdir: Path) -> float:
    """Useful FLOPs of a run, from its log; 0 for a run that trains nothing."""
    config = evaluation(workdir, "config.json")
    rows = [row for row in metrics(workdir) if "model_flops_per_second" in row]
    unit = "pairs_per_second" if config["program"] == "agcl" else "answers_per_second"
    each = [row["model_flops_per_second"] / row[unit] for row in rows]
    if not each:
        return 0.0
    of_step = config["batch"] if "batch" in config else config["queries"] * config["samples"]
    return float(np.mean(each)) * of_step * config["steps"]


def spread(values: list[float]) -> str:
    """ "mean (lowest-highest)" """
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def write(name: str, result: dict, folder: Path = RESULTS) -> None:
    """Writes FOLDER/NAME.json, with the command and versions that made the result."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **{package: version(package) for package in ("jax", "flax", "numpy")},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    print(f"written to {path}")
