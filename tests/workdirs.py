"""What tests read in a run's folder, and a run that was stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afmrl_jax.checkpoints.checkpoint import find_checkpoints


def lines(path: Path) -> list[Any]:
    """The values of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(workdir: Path) -> list[dict]:
    """The lines of a run's log."""
    return lines(workdir / "metrics.jsonl")


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in logged(workdir)]


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's last checkpoint: "params.layers.0.gate.kernel" -> array."""
    checkpoints, step = find_checkpoints(str(workdir))
    leaves = jax.tree.leaves_with_path(checkpoints.restore_raw(step))
    return {jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(v) for k, v in leaves}


def check_bit_equal(one: Path, other: Path) -> None:
    """Two runs ended with the same state."""
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


def stopped(whole: Path, copy: Path) -> Path:
    """A copy of a run that was stopped before it saved its last checkpoint."""
    shutil.copytree(whole, copy)
    _, step = find_checkpoints(str(copy))
    shutil.rmtree(copy / "checkpoints" / str(step))
    (copy / "evaluation.json").unlink()
    return copy
