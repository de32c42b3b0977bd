"""The loop, with a model that is a table of numbers."""

import gzip
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from joined import joined
from toy import ROWS, Numbers, command, logged, trained

from afmrl_jax.core.errors import UserError
from afmrl_jax.training.goodput import LOST
from afmrl_jax.training.tracing import traced_steps

ROOT = Path(__file__).resolve().parents[2]


def test_the_logs_and_a_closing_table_tell_where_the_time_went(tmp_path, capsys):
    def validate(state):
        time.sleep(0.05)
        return {"validation": float(state.params["w"].mean())}

    trained(tmp_path, Numbers(seconds=0.02), validate, eval_every=4)
    rows = logged(tmp_path)
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
    rows = logged(tmp_path)
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
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, 9))
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


def test_the_first_process_names_a_slow_one(tmp_path):
    """Of two, process 1 reads slowly."""
    running = [
        subprocess.Popen(
            command(tmp_path, seconds=0.3 * index, steps=12, log_every=1, checkpoint_every=0),
            cwd=ROOT,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, env in enumerate(joined(2))
    ]
    try:
        told = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    name = socket.gethostname()
    assert told[0].count(f"process 1 ({name}) is slow: a step's batch takes 0.") == 1
    assert "slow" not in told[1]
    last = logged(tmp_path)[-1]
    assert last["slowest_process"] == 1
    assert last["lost_input_seconds"] > 7 * 0.3 * 0.9
    assert last["host_seconds_max"] > 0.25 > last["host_seconds"]
