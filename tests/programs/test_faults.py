"""A process of four killed in the middle of a run: all end, start again, and come to the same."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from afmrl_jax import runner

QUICK = True
ROOT = Path(__file__).resolve().parents[2]
BOUND = 60  # seconds, in which the others must have ended


def process_of(running, index):
    """The id of the run's process number `index`: a Python among the descendants."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = os.getsid(int(folder.name))
            own = (folder / "environ").read_bytes().split(b"\0")
            python = b"afmrl_jax.main" in (folder / "cmdline").read_bytes().split(b"\0")
            program = (folder / "exe").resolve().name
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        ours = group == running.pid and f"PROCESS_ID={index}".encode() in own
        if ours and python and program.startswith("python"):
            return int(folder.name)
    raise AssertionError(f"process {index} is not there")


def logged(workdir):
    log = workdir / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_four_processes_with_one_killed_end_restart_and_see_the_losses_of_one(
    agcl_config, whole, command, tmp_path
):
    """kill -9 once the second step is logged and saved; six are asked for."""
    if not whole.exists():
        runner.run(agcl_config, whole)
    agcl_config.mesh.data = 4
    agcl_config.update(eval_every=0)  # the losses do not depend on it
    agcl_config.eval.tasks = "image->text"
    workdir = tmp_path / "four"
    running = subprocess.Popen(
        [
            *("bash", "launch/restart.sh", "--times", "1", "--wait", "0", "--"),
            *("bash", "launch/processes.sh", "4", "--grace", str(BOUND), "--"),
            *command(agcl_config, workdir),
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
        victim = process_of(running, 2)  # now, as that takes a while
        while running.poll() is None and len(logged(workdir)) < 2:
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
    assert told.count("afmrl_jax: another of the processes ended or can't be reached") == 3
    assert told.count("start the same command again on all of them") == 3
    assert "process 2 ended by KILL" in told and "starting again in 0 s (1 of 1)" in told
    assert "Traceback" not in told and "not all have ended" not in told
    assert ended < BOUND
    rows = logged(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    losses = [[row["loss"] for row in each] for each in (logged(whole), rows)]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)
    scores = [json.loads((each / "evaluation.json").read_text()) for each in (whole, workdir)]
    one, four = (score["image->text"]["mrr"] for score in scores)
    assert four == pytest.approx(one, abs=0.02)
