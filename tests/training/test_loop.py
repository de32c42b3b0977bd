"""The loop, with a model of one number."""

import dataclasses
import gzip
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from joined import free_port
from ml_collections import ConfigDict

from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState, abstract_state, init_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh, replicated
from afmrl_jax.data.stream import Stream, StreamOptions
from afmrl_jax.training.goodput import LOST, Clock
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.tracing import traced_steps

ROWS = 4


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Batches of one number, made in `seconds` each; `missing`: a step whose batch fails."""

    rows: int = ROWS
    seconds: float = 0.0
    missing: int = -1
    wider: int = -1  # the step whose batch has another shape

    def __len__(self):
        return 1000

    def __repr__(self):
        return "Numbers"

    def __getitem__(self, step):
        time.sleep(self.seconds)
        if step == self.missing:
            raise OSError("no such file")
        shape = (1, self.rows, *([2] if step == self.wider else []))
        return {"listing": np.full((1, self.rows), step, np.int32), "x": np.ones(shape)}


def trained(workdir, numbers=Numbers(), validate=None, step=None, **fields):
    """Runs, or resumes, as the programs do; the configuration's defaults but for `fields`, and
    another `step` than that of the model."""
    config = ConfigDict(
        {"steps": 8, "log_every": 2, "eval_every": 0, "checkpoint_every": 2, "profile": ""}
    )
    config.update(fields)
    clock = Clock(workdir / "goodput.json")
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    optimizer = optax.sgd(0.1)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    abstract = abstract_state({"w": number}, optimizer, mesh)

    @jax.jit
    def update(state, batch):
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((p["w"] - batch["x"]) ** 2))(
            state.params
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        metrics = {"loss": loss, "finite": jnp.isfinite(loss), "flops": jnp.float32(1)}
        host = jax.lax.with_sharding_constraint(batch["host"], replicated(mesh))
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics | {"host": host}

    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        if checkpoints.latest:
            state = checkpoints.restore(checkpoints.latest, abstract)
        else:
            state = init_state(lambda: {"w": jnp.float32(0)}, optimizer, abstract)
        training = Training(
            step=step or update,
            open_stream=lambda first: Stream(numbers, first, StreamOptions(0, 100.0)),
            examples=ROWS,
            unit="rows",
            chunk=ROWS,
            validate=validate,
            name_listings=lambda rows: [str(row) for row in rows],
            record={"config": "{}"},
        )
        return fit(training, state, checkpoints, clock, config, workdir, mesh)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_logs_and_a_closing_table_tell_where_the_time_went(tmp_path, capsys):
    def validate(state):
        time.sleep(0.05)
        return {"validation": float(state.params["w"])}

    trained(tmp_path, Numbers(seconds=0.02), validate, eval_every=4)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    last = rows[-1]
    assert 0 < last["goodput"] < 1
    assert last["lost_validation_seconds"] >= 0.1
    assert last["lost_input_seconds"] > 0
    assert last["lost_checkpoints_seconds"] > 0
    assert 0 < last["data_wait_share"] <= 1
    assert last["step_seconds"] <= last["step_seconds_max"]
    told = capsys.readouterr().out
    table = told[told.index("Time since the first start") :]
    assert [line.split()[0] for line in table.splitlines()[2 : 2 + len(LOST)]] == list(LOST)
    assert f"0 ({socket.gethostname()})" in table


class Later(float):
    """A step's number, known when the step has ended; `ended` by time.monotonic()."""

    ended = 0.0

    def block_until_ready(self):
        time.sleep(max(0.0, self.ended - time.monotonic()))
        return self

    def __bool__(self):
        return bool(float(self.block_until_ready()))


class Steps:
    """Of a device that takes exactly so long for each; `idle` in seconds, before each of them."""

    def __init__(self, seconds):
        self._seconds, self._ended, self.idle = seconds, None, []

    def __call__(self, state, batch):
        now = time.monotonic()
        began = max(now, self._ended or now)
        self.idle.append(began - (self._ended or now))
        self._ended = began + self._seconds
        metrics = {"loss": Later(1.0), "finite": Later(1.0), "flops": 1.0}
        for name in ("loss", "finite"):
            metrics[name].ended = self._ended
        return state, metrics | {"host": batch["host"]}


@pytest.mark.parametrize("seconds", [0.01, 0.03])  # a batch takes; a step 0.02
def test_no_more_of_a_wait_is_told_than_the_device_had_no_batch(tmp_path, seconds):
    steps = Steps(0.02)
    trained(tmp_path, Numbers(seconds=seconds), step=steps, log_every=1, checkpoint_every=0)
    rows = rows_of(tmp_path)
    waited = rows[-1]["lost_input_seconds"] - rows[0]["lost_input_seconds"]
    # Each wait is longer than that by what was left of the step before.
    assert waited <= sum(steps.idle[1:]) + 0.001
    assert waited > 0 or seconds < 0.02


def test_a_batch_of_a_further_shape_is_told_before_it_is_compiled(tmp_path):
    with pytest.raises(UserError, match="step 6 would compile again") as error:
        trained(tmp_path, Numbers(wider=5))
    assert f"the batch has [('x', (1, {ROWS}, 2), 'float64')], and" in str(error.value)
    assert "this run's have 1 sets of shapes" in str(error.value)


def test_a_run_that_died_goes_on_with_what_it_had_lost(tmp_path, capsys):
    with pytest.raises(OSError, match="no such file"):
        trained(tmp_path, Numbers(missing=5), checkpoint_every=4, log_every=1)
    before = json.loads((tmp_path / "goodput.json").read_text())
    time.sleep(0.1)
    trained(tmp_path, checkpoint_every=4, log_every=1)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 9))
    assert "over 2 starts" in capsys.readouterr().out
    after = json.loads((tmp_path / "goodput.json").read_text())
    assert after["lost"]["restart"] >= 0.1
    assert after["lost"]["start"] == before["lost"]["start"]
    assert after["lost"]["compilation"] > before["lost"]["compilation"]
    assert after["seconds"] >= before["seconds"] + 0.1
    assert set(after["trained_at"]) == {"4", "8"}


def test_asked_steps_are_traced_and_no_others(tmp_path, capsys):
    trained(tmp_path, profile="3:4")
    assert f"the trace lies in {tmp_path / 'profile'}" in capsys.readouterr().out
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}
    assert steps == {3, 4}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_wrong_steps_to_trace_are_refused():
    for profile in ("3", "0:2", "4:3", "3:9", "a:b", "-1:2"):
        with pytest.raises(UserError, match="give the first and the last step"):
            traced_steps(profile, steps=8)
    assert traced_steps("8:8", steps=8) == range(8, 9)
    assert not traced_steps("", steps=8)


def process(index, port, workdir):
    """One of two, of which process 1 reads slowly."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    numbers = Numbers(rows=ROWS // 2, seconds=0.3 * index)
    trained(workdir, numbers, steps=12, log_every=1, checkpoint_every=0)


def test_the_first_process_names_a_slow_one(tmp_path):
    port = free_port()
    code = "import sys, pathlib, test_loop; a = sys.argv; "
    code += "test_loop.process(int(a[1]), int(a[2]), pathlib.Path(a[3]))"
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), os.environ["PYTHONPATH"]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index), str(port), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        told = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    name = socket.gethostname()
    assert told[0].count(f"process 1 ({name}) is slow: a step's batch takes 0.") == 1
    assert "slow" not in told[1]
    last = rows_of(tmp_path)[-1]
    assert last["slowest_process"] == 1
    assert last["lost_input_seconds"] > 7 * 0.3 * 0.9
    assert last["host_seconds_max"] > 0.25 > last["host_seconds"]
