import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.training.goodput import (
    LOST,
    SLOW_PAUSE,
    Clock,
    Device,
    Processes,
    _Compilation,
    held_up,
)


def begun(path, step=0):
    clock = Clock(path)
    clock.begin(step)
    return clock


def test_time_is_productive_or_lost_to_one_thing(tmp_path):
    began = time.monotonic()
    clock = begun(tmp_path / "goodput.json")
    with clock.lost("validation"):
        time.sleep(0.05)
        with clock.lost("checkpoints"):
            time.sleep(0.02)
        compiling = time.monotonic()
        jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 17)(jnp.ones(3)))
        compiling = time.monotonic() - compiling
    time.sleep(0.03)
    lost, trained = clock.lost_seconds, clock.trained
    assert lost["validation"] >= 0.05
    assert lost["checkpoints"] >= 0.02
    assert 0 < lost["compilation"] <= compiling
    assert trained >= 0.03
    assert 0.1 + lost["compilation"] <= trained + sum(lost.values()) <= time.monotonic() - began


def test_a_function_traced_inside_another_counts_once():
    counted = _Compilation()
    for seconds in (1.0, 0.5, 3.0):  # the last began before the others
        counted("/jax/core/compile/jaxpr_trace_duration", seconds)
    counted("/jax/some/other/duration", 9.0)
    assert counted.seconds == pytest.approx(3, abs=0.01)


def test_a_restart_loses_the_time_between_and_the_steps_done_twice(tmp_path):
    path = tmp_path / "goodput.json"
    first = begun(path)
    time.sleep(0.1)
    first.saved(10)
    kept = first.trained
    time.sleep(0.15)
    first.saved(20)  # but torn, so that the next one goes on from 10
    time.sleep(0.05)
    first.write()
    died = time.monotonic()
    time.sleep(0.2)
    second = begun(path, 10)
    lost = second.lost_seconds
    assert second.starts == 2
    assert 0.5 <= second.seconds <= first.seconds + 0.1
    assert 0.2 <= lost["restart"] <= time.monotonic() - died + 0.1
    assert 0.2 <= lost["repeated"] <= first.seconds - kept
    assert 0.1 <= second.trained <= kept + time.monotonic() - died - 0.2
    second.write()
    third = begun(path)  # all checkpoints are gone: it begins anew
    assert third.lost_seconds["repeated"] >= 0.3
    assert third.trained < second.trained - 0.05
    assert third.starts == 3
    assert "over 3 starts" in third.table()


def test_a_file_that_cannot_be_read_begins_anew(tmp_path):
    (tmp_path / "goodput.json").write_text('{"sec')
    clock = begun(tmp_path / "goodput.json")
    assert clock.starts == 1
    clock.write()
    assert set(json.loads((tmp_path / "goodput.json").read_text())["lost"]) == set(LOST)


def window(waits, others=(0.01, 0.01, 0.01, 0.01), step=1.0):
    """Two equal steps of four processes: float32[2, 4, K]."""
    rows = [[0, step, wait, other] for wait, other in zip(waits, others)]
    return np.array([rows, rows], np.float32)


def test_a_process_that_long_holds_up_the_others_is_named_once_in_a_while():
    processes = Processes(["a", "b", "c", "d"])
    slow, fine = window([0.3, 0.31, 0.3, 2.1]), window([0.3, 0.31, 0.3, 0.4])
    told = [processes.slow(w, now=1000.0) for w in (slow, slow, fine, slow, slow, slow, slow)]
    assert [bool(t) for t in told] == [False] * 5 + [True, False]
    assert "process 3 (d) is slow: a step's batch takes 2.10 s there, where the median" in told[5]
    assert "is 0.30 s" in told[5]
    assert processes.slow(slow, now=1001.0 + SLOW_PAUSE)


def test_of_two_processes_one_can_be_slow_and_little_of_a_step_is_not():
    others = (0.01, 0.5)
    processes = Processes(["a", "b"])
    told = [processes.slow(window([0.0, 0.0], others), now=0.0) for _ in range(3)]
    assert "process 1 (b) is slow: between two steps its own work takes 0.50 s" in told[2]
    processes = Processes(["a", "b"])
    told = [processes.slow(window([0.0, 0.0], others, step=6.0), now=0.0) for _ in range(5)]
    assert not any(told)


def test_the_spread_and_the_table_tell_of_each_process():
    processes = Processes(["a", "b", "c", "d"])
    steps = window([0.1, 0.2, 0.3, 2.0])
    spread = processes.spread(steps)
    assert spread["host_seconds"] == pytest.approx(0.21)
    assert spread["host_seconds_max"] == pytest.approx(2.01)
    assert spread["slowest_process"] == 3
    processes.add(steps)
    lines = processes.table(rows=2).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["2", "(c)"], ["3", "(d)"]]
    assert lines[2].split()[2:] == ["1.000", "2.000", "0.010"]
    assert lines[3] == "and 2 faster ones"


@pytest.mark.parametrize(
    "idle, waited, other",
    [
        (10.0, 2.0, 1.5),  # before the batch was asked for: all of the wait, and what was around it
        (11.0, 2.0, 0.5),
        (12.9, 0.1, 0.5),  # the step ended just before the batch came
        (13.1, 0.0, 0.4),  # and just after
        (14.0, 0.0, 0.0),  # the device had no pause
    ],
)
def test_a_wait_counts_from_the_moment_that_the_device_had_nothing_to_do(idle, waited, other):
    assert held_up(idle, asked=11.0, got=13.0, now=13.5) == pytest.approx((waited, other))


class Result:
    """A step's, which is there when it is set."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        assert self.ready.wait(10)
        return self


def idle_since(device):
    """As soon as it is known."""
    deadline = time.monotonic() + 10
    while device.idle_since() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return device.idle_since()


def test_the_device_is_idle_from_the_end_of_the_last_step_that_it_was_given():
    device = Device()
    first, second = Result(), Result()
    for result in (first, second):
        device.dispatched(result)
    first.ready.set()
    time.sleep(0.01)
    assert device.idle_since() is None  # the second runs
    began = time.monotonic()
    second.ready.set()
    ended = idle_since(device)
    assert began <= ended <= time.monotonic()
    time.sleep(0.01)
    assert device.idle_since() == ended
    device.dispatched(failed := Result())
    failed.block_until_ready = lambda: 1 / 0
    assert idle_since(device) > ended  # the loop tells of it, not this thread
    device.close()
