"""Joining by the environments of those who start processes; JAX itself finds the addresses."""

import os
import socket
import subprocess
import sys
import time

import jax
import pytest
from joined import free_port, joined

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.last_words import TRY_AGAIN
from afmrl_jax.core.processes import initialize_distributed

NAMES = ("COORDINATOR_", "NUM_PROCESSES", "PROCESS_ID", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
GKE = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "JAX_FORCE_TPU_INIT": "1",  # as where there are chips
    **dict.fromkeys(("MEGASCALE_NUM_SLICES", "MEGASCALE_COORDINATOR_ADDRESS"), ""),
    "MEGASCALE_SLICE_ID": "",  # empty: JAX asks no metadata server for it
}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_FORCE_TPU_INIT": "1",
}
SCRIPT = """
import sys
from pathlib import Path
import jax
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.last_words import leave
from afmrl_jax.core.processes import check_shared, initialize_distributed
initialize_distributed(int(sys.argv[1]))
print(f"{jax.process_index()} of {jax.process_count()}", flush=True)
try:
    check_shared(Path(sys.argv[2]), patience=0.5)
except UserError as error:
    print(error, flush=True)
    leave(2)
"""

SAVES = """
import resource
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from absl import logging
from afmrl_jax import runner
from afmrl_jax.core.mesh import batch_sharding, make_mesh, replicated
from afmrl_jax.core.processes import initialize_distributed
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState
folder = Path(sys.argv[2])
logging.set_verbosity("fatal")  # as main's
initialize_distributed(int(sys.argv[1]))
mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 1, "tensor": 1})
split, whole = batch_sharding(mesh), replicated(mesh)
step = jax.jit(lambda: jnp.int32(0), out_shardings=whole)()
noise = lambda: jax.random.normal(jax.random.key(0), (2, 100_000))
kernel = jax.jit(noise, out_shardings=split)()
state = TrainState(step, {"kernel": kernel}, {"mean": kernel})
try:
    with Checkpoints(folder, writable=True) as checkpoints:
        checkpoints.save(state, {"config": "{}"}, 1, None)
        checkpoints.wait()
        if jax.process_index() == int(sys.argv[3]):  # its disk is full now
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoints.save(state, {"config": "{}"}, 2, None)
        checkpoints.wait()
except BaseException as error:
    sys.exit(runner.end(error, folder))
"""


def clean():
    return {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}


def start(environment, folder, seconds=60, script=SCRIPT, more=()):
    return subprocess.Popen(
        [sys.executable, "-c", script, str(seconds), str(folder), *more],
        env=clean() | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(running):
    """Each one's status and output, standard error's behind."""
    try:
        told = ["".join(process.communicate(timeout=120)) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, said) for process, said in zip(running, told)]


@pytest.fixture
def environment(monkeypatch):
    """A function that leaves, of all that could say anything of processes, what it is given."""

    def use(variables):
        for name in os.environ.keys() - clean().keys():
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"COORDINATOR_ADDRESS": "a:1"}, "set without NUM_PROCESSES, PROCESS_ID: set all three"),
        ({"PROCESS_ID": "1", "NUM_PROCESSES": "2"}, "set without COORDINATOR_ADDRESS"),
        (("a:1", "two", "0"), "NUM_PROCESSES=two must be a whole number"),
        (("a:1", "2", "2"), "PROCESS_ID=2 is not one of 2 processes: 0 to 1"),
        (("a", "2", "1"), "COORDINATOR_ADDRESS=a must be HOST:PORT"),
        (("a:port", "2", "1"), "COORDINATOR_ADDRESS=a:port must be HOST:PORT"),
        (SLURM, "names SLURM's 2 tasks, but not SLURM_PROCID, SLURM_LOCALID"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, "names Cloud TPU's 3 hosts, but not TPU_WORKER_ID"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "2 slices, but not MEGASCALE_SLICE_ID, MEGASCALE_COORD"),
        ({"MEGASCALE_NUM_SLICES": "many"}, "MEGASCALE_NUM_SLICES=many must be a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "names Open MPI's 2 ranks, but not OMPI_COMM_WORLD_RANK"),
    ],
)
def test_half_a_process_group_is_told_in_a_sentence(environment, variables, says):
    if isinstance(variables, tuple):
        names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
        variables = dict(zip(names, variables))
    environment(variables)
    with pytest.raises(UserError, match=says):
        initialize_distributed()
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_jax_does_not_find_is_told_in_a_sentence(tmp_path):
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
    ((status, said),) = finish([start(hosts, tmp_path)])  # JAX asks before it touches a device
    assert status == 1 and "JAX finds no such cluster here: install its extra" in said


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"COORDINATOR_ADDRESS": "192.0.2.1:1", "NUM_PROCESSES": "1", "PROCESS_ID": "0"},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # sbatch without srun
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": ""},
    ],
)
def test_one_process_alone_waits_for_nobody(environment, variables):
    environment(variables)
    began = time.monotonic()
    initialize_distributed()
    assert time.monotonic() - began < 1
    assert not jax.distributed.is_initialized()


def test_a_port_that_another_program_uses_is_told(environment):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        names = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
        environment(names)
        with pytest.raises(UserError, match=r"can't be used on this machine .*: choose another"):
            initialize_distributed()


def test_a_coordinator_that_nobody_reaches_ends_in_time(tmp_path):
    """Process 0 of two waits for one that never comes; process 1 for one that is not there."""
    both = []
    for index in range(2):
        address = {"COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
        own = {"NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
        both.append(start(address | own, tmp_path, seconds=2))
    began = time.monotonic()
    for status, told in finish(both):
        assert status == TRY_AGAIN
        assert "can't be reached within 2 s: start the same command on every machine" in told
        assert "Check failure" not in told and "Traceback" not in told
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("given", "index"),
    [
        (SLURM, ("SLURM_PROCID", "SLURM_LOCALID")),
        (GKE, ("TPU_WORKER_ID",)),
        (SLICES, ("MEGASCALE_SLICE_ID",)),
    ],
    ids=["slurm", "gke", "slices"],
)
def test_a_scheduler_s_processes_find_one_another(given, index, tmp_path):
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    own = [dict.fromkeys(index, str(number)) for number in range(2)]
    done = finish([start(given | port | one, tmp_path) for one in own])
    for number, (status, told) in enumerate(done):
        assert status == 0 and f"{number} of 2" in told, told


def test_folders_that_are_not_shared_are_told_to_every_process(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for status, told in finish([start(*both) for both in zip(joined(2), folders)]):
        assert status == 2
        assert f"writes to {folders[0]}" in told or f"writes to {folders[1]}" in told
        assert "process 1 does not see: give a --workdir on a file system" in told
    assert not list(folders[0].iterdir())  # nothing is left of the look


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_in_one_process_ends_all_by_its_sentence(failing, tmp_path):
    """Both would wait for 20 minutes, each in another of Orbax's barriers."""
    own = joined(2)
    began = time.monotonic()
    done = finish([start(each, tmp_path, script=SAVES, more=(str(failing),)) for each in own])
    assert time.monotonic() - began < 90  # most of it to start on a busy machine
    told = f"step 2 could not be saved in {tmp_path}: file too large."
    for index, (status, said) in enumerate(done):
        assert status == 2 and said.count(told) == 1, said
        assert "goes on from step 1, which is whole" in said and "Traceback" not in said
        assert (f"process {failing} ended, and so do all" in said) == (index != failing)
