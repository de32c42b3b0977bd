"""A run goes on elsewhere: on other processes, another mesh, after a machine or a disk gave out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from joined import joined
from metadata_server import PREEMPTED, serving

from afmrl_jax import main
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import find_checkpoints
from afmrl_jax.programs import agcl

QUICK = True
ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=STEPS, eval_every=0, checkpoint_every=4)
    agcl_config.eval.tasks = "image->text"
    return agcl_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the run is that nothing stopped; made by whichever test is first."""
    return tmp_path_factory.mktemp("elastic") / "whole"


def never_stopped(config, folder):
    if not folder.exists():
        main.run(config, folder)
    return folder


def as_it_was(folder, step, workdir):
    """A copy of a run as it was when it had saved `step`."""
    shutil.copytree(folder, workdir)
    (workdir / "evaluation.json").unlink()
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
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
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


def shown(config, workdir, first, last, shares):
    """The ids of the listings in the batches of steps first + 1 to last, as the program's streams
    give them to processes that have these shares of a batch; [step][example][view]."""
    catalog = open_catalogue(CatalogOptions.of(config), workdir)
    checkpoints, step = find_checkpoints(str(workdir))
    statistics, sampler = agcl._sampler(config, catalog)
    enc, _ = agcl._encoder(config, catalog, checkpoints.record(step))
    streams = [
        agcl._open_stream(config, catalog, sampler, enc.processor(), statistics, rows)(first)
        for rows in shares
    ]
    try:
        batches = [[next(stream)["listing"] for stream in streams] for _ in range(first, last)]
    finally:
        for stream in streams:
            stream.close()
    return [
        [
            [catalog.listing(int(i)).listing_id for i in example]
            for part in parts
            for example in part.reshape(-1, part.shape[-1])
        ]
        for parts in batches
    ]


def test_a_run_goes_on_with_other_processes_and_meshes_showing_each_listing_when_it_would_have(
    config, command, folder, tmp_path
):
    """Four steps on one device, and four that are lost by damage; two processes, until one hears
    that its machine is taken away; the rest on four devices of one process."""
    workdir = as_it_was(never_stopped(config, folder), STEPS, tmp_path / "moved")
    damage(workdir, STEPS)
    config.mesh.update(fsdp=2)
    envs = joined(2)
    with serving(**{PREEMPTED: "TRUE"}) as server:
        envs = envs[0], envs[1] | {"GCE_METADATA_HOST": server.address}
        status, told = run(command(config, workdir), *envs)
    assert status == [143, 143], told
    assert f"checkpoints/{STEPS} is left for the checkpoint before it: its file" in told[0]
    stopped = find_checkpoints(str(workdir))[1]
    assert 4 < stopped < STEPS
    assert f"stopped by a notice to another process at step {stopped}, which is saved" in told[0]

    config.mesh.update(data=2, fsdp=1, tensor=2)
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    status, told = run(command(config, workdir), four)
    assert status == [0], told
    np.testing.assert_allclose(losses(workdir), losses(folder), atol=1e-5)

    alone, halves = [np.arange(8)], [np.arange(4), np.arange(4, 8)]
    wanted = shown(config, folder, 0, STEPS, alone)
    moved = [(0, 4, alone), (4, stopped, halves), (stopped, STEPS, alone)]
    assert [step for part in moved for step in shown(config, workdir, *part)] == wanted
    assert len({str(step) for step in wanted}) == STEPS  # they can be told apart


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    config, folder, tmp_path, caplog
):
    workdir = as_it_was(never_stopped(config, folder), STEPS, tmp_path / "damaged")
    damage(workdir, STEPS)
    main.run(config, workdir)
    assert f"checkpoints/{STEPS} is left for the checkpoint before it: its file" in caplog.text
    assert losses(workdir) == losses(folder)
    states = [find_checkpoints(str(f))[0].restore_raw(STEPS) for f in (workdir, folder)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_full_disk_ends_a_run_with_what_is_whole_and_room_lets_it_go_on(
    config, command, folder, tmp_path
):
    """A limit on files' size stands for the disk: the checkpoint's numbers pass it."""
    workdir = as_it_was(never_stopped(config, folder), 4, tmp_path / "full")
    sizes = [p.stat().st_size for p in (workdir / "checkpoints").rglob("*") if p.is_file()]
    status, (told,) = run(command(config, workdir), {}, limit=max(sizes) // 2048)
    assert status == [2], told
    last = told.strip().splitlines()[-1]
    assert last.startswith(f"afmrl_jax: step {STEPS} could not be saved in {workdir}/checkpoints: ")
    assert "the same command goes on from step 4, which is whole" in last
    assert "Traceback" not in told
    assert not (workdir / "checkpoints" / str(STEPS)).exists()
    main.run(config, workdir)
    assert losses(workdir) == losses(folder)
