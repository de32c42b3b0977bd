"""A run goes on elsewhere: on other processes, another mesh, after a machine or a disk gave out."""

import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import devices
from joined import joined
from metadata_server import PREEMPTED, serving
from toy import command, logged, trained

from afmrl_jax.checkpoints.checkpoint import find_checkpoints

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
HOW = {"steps": STEPS, "log_every": 1, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("elastic") / "whole"
    trained(workdir, **HOW)
    return workdir


def as_it_was(folder, step, workdir):
    """A copy of a run as it was when it had saved `step`."""
    shutil.copytree(folder, workdir)
    for later in (workdir / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    return workdir


def damage(workdir, step):
    """Flips a bit in the moments of a checkpoint."""
    moments = workdir / "checkpoints" / str(step) / "optimizer"
    numbers = max((p for p in moments.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(numbers.read_bytes())
    content[len(content) // 3] ^= 1
    numbers.write_bytes(bytes(content))


def losses(workdir):
    rows = logged(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def run(command, *envs, limit=None):
    """Runs a process with each of these environments, to its end: exit statuses and outputs.

    limit: KiB that a file may have.
    """
    if limit:
        command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for env in envs
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
        return [process.returncode for process in running], told
    finally:
        for process in running:
            process.kill()


def test_a_run_goes_on_with_other_processes_and_meshes_with_the_losses_of_one(folder, tmp_path):
    """Four steps on one device, and four that are lost by damage; two processes, until one hears
    that its machine is taken away; the rest on four devices of one process. A batch tells its step
    and rows, so that another one would have another loss."""
    workdir = as_it_was(folder, STEPS, tmp_path / "moved")
    damage(workdir, STEPS)
    envs = joined(2)
    with serving(**{PREEMPTED: "TRUE"}) as server:
        envs = envs[0], envs[1] | {"GCE_METADATA_HOST": server.address}
        status, told = run(command(workdir, fsdp=2, seconds=0.3, **HOW), *envs)
    assert status == [143, 143], told
    assert f"checkpoints/{STEPS} is left for the checkpoint before it: its file" in told[0]
    stopped = find_checkpoints(str(workdir))[1]
    assert 4 < stopped < STEPS
    assert f"stopped by a notice to another process at step {stopped}, which is saved" in told[0]

    with devices(4):
        trained(workdir, mesh={"data": 2, "tensor": 2}, **HOW)
    np.testing.assert_allclose(losses(workdir), losses(folder), atol=1e-5)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(folder, tmp_path, caplog):
    workdir = as_it_was(folder, STEPS, tmp_path / "damaged")
    damage(workdir, STEPS)
    trained(workdir, **HOW)
    assert f"checkpoints/{STEPS} is left for the checkpoint before it: its file" in caplog.text
    assert losses(workdir) == losses(folder)
    states = [find_checkpoints(str(f))[0].restore_raw(STEPS) for f in (workdir, folder)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_full_disk_ends_a_run_with_what_is_whole_and_room_lets_it_go_on(folder, tmp_path):
    """A limit on files' size stands for the disk: the checkpoint's numbers pass it."""
    workdir = as_it_was(folder, 4, tmp_path / "full")
    sizes = [p.stat().st_size for p in (workdir / "checkpoints").rglob("*") if p.is_file()]
    status, (told,) = run(command(workdir, **HOW), {}, limit=max(sizes) // 2048)
    assert status == [2], told
    last = told.strip().splitlines()[-1]
    assert last.startswith(f"afmrl_jax: step {STEPS} could not be saved in {workdir}/checkpoints: ")
    assert "the same command goes on from step 4, which is whole" in last
    assert "Traceback" not in told
    assert not (workdir / "checkpoints" / str(STEPS)).exists()
    trained(workdir, **HOW)
    assert losses(workdir) == losses(folder)
