"""A training run whose model is a table of numbers, for tests of processes, signals and disks: the
loop, the stream and the checkpoints are real, and nothing takes long.

    python -m toy WORKDIR [FIELD=NUMBER ...]

is such a run as a process, or as one of several, and ends as the program's own command does.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from afmrl_jax import runner
from afmrl_jax.checkpoints.state import abstract_state
from afmrl_jax.core.mesh import local_rows, make_mesh
from afmrl_jax.core.processes import initialize_distributed
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.run import Run, RunOptions
from afmrl_jax.training.step import TrainStep, make_step

ROWS = 4  # of a batch
SIZE = 1 << 14  # numbers of the model: a checkpoint has a file that is larger than all others
FIELDS = {
    "program": "toy",
    "seed": 0,
    "steps": 8,
    "log_every": 2,
    "eval_every": 0,
    "checkpoint_every": 2,
    "checkpoint_dir": "",
    "profile": "",
    "evaluators": "",
    "micro_batches": 1,
    "data": {"workers": 0, "timeout": 100.0},
}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Batches of one number a row, which tells of its step and row; made in `seconds` each."""

    rows: tuple[int, ...] = tuple(range(ROWS))  # of the batch, those that this process delivers
    seconds: float = 0.0
    missing: int = -1  # the step whose batch fails
    wider: int = -1  # the step whose batch has another shape

    def __len__(self):
        return 1000

    def __repr__(self):
        return "Numbers"

    def __getitem__(self, step):
        time.sleep(self.seconds)
        if step == self.missing:
            raise OSError("no such file")
        listing = step * ROWS + np.array([self.rows], np.int32)
        x = np.sin(listing)
        return {"listing": listing, "x": x[..., None].repeat(2, -1) if step == self.wider else x}


def trained(workdir, numbers=Numbers(), validate=None, step=None, mesh=None, **fields):
    """Runs, or resumes, as the programs do; the configuration's defaults but for `fields`, and
    another `step` than that of the model. mesh: axis -> length."""
    config = ConfigDict(FIELDS)
    config.update(fields)
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1} | (mesh or {}))
    optimizer = optax.adam(0.1)
    split = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    table = jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=split)
    abstract = abstract_state({"w": table}, optimizer, mesh)

    def gradient(trained, frozen, memory, batch):
        def loss(params):
            return jnp.mean((params["w"] - batch["x"][..., None]) ** 2)

        value, gradients = jax.value_and_grad(loss)(trained)
        return (value, memory, {}), gradients

    update = make_step(gradient, optimizer, abstract, mesh, lambda batch: jnp.float32(1))
    train_step = TrainStep(update, optimizer, abstract, {})
    options, written = RunOptions.of(config), config.to_json()
    with jax.set_mesh(mesh), Run(options, written, workdir, mesh) as run:
        run.record = {"config": written}
        run.name_listings = lambda rows: [str(row) for row in rows]
        if run.saved:
            state = run.restore(train_step)
        else:
            state = train_step.initial(lambda: {"w": jax.random.normal(jax.random.key(0), (SIZE,))})
        training = Training(
            step=step or functools.partial(update, {}),
            batches=numbers,
            examples=ROWS,
            unit="rows",
            rows=ROWS,
            validate=validate,
        )
        return fit(training, state, run)


def command(workdir, **fields):
    """The command line of a run: mesh axes, `seconds` that a batch takes, and the loop's fields."""
    words = (f"{name}={value}" for name, value in fields.items())
    return [sys.executable, "-m", "toy", str(workdir), *words]


def logged(workdir):
    log = workdir / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def cli(workdir, fields):
    """The exit status."""
    axes = {name: fields.pop(name) for name in ("data", "fsdp", "tensor") if name in fields}
    seconds = fields.pop("seconds", 0.0)
    logging.set_verbosity("fatal")  # as the command's
    try:
        initialize_distributed()
        mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1} | axes)
        rows = tuple(local_rows(mesh, ROWS, "rows").tolist())
        trained(workdir, Numbers(rows, seconds), mesh=axes, **fields)
    except SystemExit:
        raise
    except BaseException as error:
        return runner.end(error, workdir / "checkpoints")
    return 0


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[2:])
    sys.exit(cli(Path(sys.argv[1]), {name: json.loads(value) for name, value in words.items()}))
