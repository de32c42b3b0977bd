"""A run that is ended from outside: one of its processes is killed, or all are asked to stop."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from toy import command, logged, trained

from afmrl_jax.checkpoints.checkpoint import find_checkpoints

ROOT = Path(__file__).resolve().parents[2]
BOUND = 60  # seconds, in which the others must have ended


def process_of(running, index):
    """The id of the run's process number `index`: a Python among the descendants."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = os.getsid(int(folder.name))
            own = (folder / "environ").read_bytes().split(b"\0")
            python = b"toy" in (folder / "cmdline").read_bytes().split(b"\0")
            program = (folder / "exe").resolve().name
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        ours = group == running.pid and f"PROCESS_ID={index}".encode() in own
        if ours and python and program.startswith("python"):
            return int(folder.name)
    raise AssertionError(f"process {index} is not there")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_of_which_one_is_killed_end_restart_and_see_the_losses_of_one(count, tmp_path):
    """kill -9 once the fifth step is logged and the third saved, since whoever waits for one that
    died in a save learns of it after 45 seconds; eight are asked for."""
    alone, workdir = tmp_path / "one", tmp_path / "several"
    trained(alone, log_every=1)
    running = subprocess.Popen(
        [
            *("bash", "launch/restart.sh", "--times", "1", "--wait", "0", "--"),
            *("bash", "launch/processes.sh", str(count), "--grace", str(BOUND), "--"),
            *command(workdir, seconds=0.3, log_every=1, checkpoint_every=3),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    told = []
    try:
        while running.poll() is None and not logged(workdir):
            time.sleep(0.02)
        victim = process_of(running, count - 1)  # now, as that takes a while
        while running.poll() is None and len(logged(workdir)) < 5:
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        for line in running.stdout:
            told.append(line)
            if "starting again" in line:
                ended = time.monotonic() - killed
        running.wait(timeout=60)
    finally:
        for folder in Path("/proc").glob("[0-9]*"):  # of every process group
            try:
                if os.getsid(int(folder.name)) == running.pid:
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue
    told = "".join(told)
    assert running.returncode == 0, told
    assert told.count("afmrl_jax: another of the processes ended or can't be reached") == count - 1
    assert told.count("start the same command again on all of them") == count - 1
    assert f"process {count - 1} ended by KILL" in told and "starting again in 0 s (1 of 1)" in told
    assert "Traceback" not in told and "not all have ended" not in told
    assert ended < BOUND
    rows = logged(workdir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    losses = [[row["loss"] for row in each] for each in (logged(alone), rows)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


def test_sigterm_saves_and_exits(tmp_path):
    running = subprocess.Popen(
        command(tmp_path, steps=900, log_every=1, checkpoint_every=0, seconds=0.02),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while running.poll() is None and not logged(tmp_path):
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    told, _ = running.communicate(timeout=400)
    assert running.returncode == 143
    _, step = find_checkpoints(str(tmp_path))
    assert f"stopped by SIGTERM at step {step}, which is saved" in told
