"""One run, whatever the devices and processes: the same losses."""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def losses(command, config, workdir, processes=1, env=None):
    """Runs to the end in `processes` processes; the losses by step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    running = []
    for index in range(processes):
        own = os.environ | (env or {})
        if processes > 1:
            own |= {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(processes)}
            own |= {"PROCESS_ID": str(index)}
        running.append(subprocess.Popen(command(config, workdir), cwd=ROOT, env=own))
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=4, batch=8, eval_every=0, checkpoint_every=0)
    agcl_config.model.dtype = "float32"
    return agcl_config


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The losses of one device; filled by the first test."""
    return {}


def test_eight_devices_see_the_losses_of_one(config, command, one_device, tmp_path):
    one_device["losses"] = losses(command, config, tmp_path / "one")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    eight = losses(command, config, tmp_path / "eight", env=EIGHT)
    np.testing.assert_allclose(eight, one_device["losses"], atol=1e-5)


def test_two_processes_see_the_losses_of_one(config, command, one_device, tmp_path):
    config.mesh.update(data=2)
    config.chunks = 2
    two = losses(command, config, tmp_path / "two", processes=2)
    np.testing.assert_allclose(two, one_device["losses"], atol=1e-5)
