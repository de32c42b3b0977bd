"""Several processes that run one program: how they join, and how they agree."""

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from afmrl_jax.core import last_words
from afmrl_jax.core.errors import UserError

log = logging.getLogger(__name__)

JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 45  # without a sign of life until JAX gives a process up
EXPLICIT = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def initialize_distributed(seconds: int = JOIN_SECONDS) -> None:
    """Joins the other processes, where the environment says that this is one of several.

    Said by COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID; else by SLURM (srun), Open MPI or
    Cloud TPU (one slice or several, as VMs or in GKE), whose addresses JAX finds itself.
    Raises UserError where that is said by halves, before JAX touches a device. Ends the process
    with a sentence and `last_words.TRY_AGAIN` where the others can't be reached within `seconds`.
    """
    env = os.environ
    if any(name in env for name in EXPLICIT):
        address, count, index = _explicit(env)
        if count > 1:
            others = f"process {index} of {count}: the others at {address}"
            _join(others, seconds, address, count, index, cluster_detection_method="deactivate")
    elif cluster := _cluster(env):
        try:
            _join(f"the other processes of {cluster}", seconds)
        except ValueError:  # JAX detects none
            raise UserError(
                f"the environment names the processes of {cluster}, but JAX finds no such cluster "
                f"here: install its extra (tpu, cuda13), or set {', '.join(EXPLICIT)}"
            ) from None
    elif _tpu_vm(env):
        try:
            _join("the other workers of this TPU slice", seconds)
        except ValueError:
            log.info("this TPU belongs to no slice that JAX knows: the process runs alone")


def _explicit(env: Mapping[str, str]) -> tuple[str, int, int]:
    """Coordinator's address, number of processes, index of this one."""
    if missing := [name for name in EXPLICIT if name not in env]:
        found = [name for name in EXPLICIT if name in env]
        raise UserError(
            f"{', '.join(found)} set without {', '.join(missing)}: set all three, or none to run "
            "as one process"
        )
    address = env["COORDINATOR_ADDRESS"]
    count, index = _integer("NUM_PROCESSES", env), _integer("PROCESS_ID", env)
    if not 0 <= index < count:
        raise UserError(f"PROCESS_ID={index} is not one of {count} processes: 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"COORDINATOR_ADDRESS={address} must be HOST:PORT, the machine of process 0 and a "
            "port that is free there"
        )
    if index == 0 and count > 1:
        _check_free(int(port), address)
    return address, count, index


def _check_free(port: int, address: str) -> None:
    """Raises UserError where another program listens there: JAX's runtime would crash."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"COORDINATOR_ADDRESS={address}: port {port} can't be used on this machine "
                f"({error.strerror}): choose another"
            ) from None


def _cluster(env: Mapping[str, str]) -> str | None:
    """The group of processes that a scheduler started, such as "SLURM's 4 tasks"; None if alone."""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    hosts, slices = len(hosts.split(",")), _integer("MEGASCALE_NUM_SLICES", env)
    tasks, ranks = _integer("SLURM_NTASKS", env), _integer("OMPI_COMM_WORLD_SIZE", env)
    if hosts > 1 or slices > 1:
        cluster = f"Cloud TPU's {slices} slices" if slices > 1 else f"Cloud TPU's {hosts} hosts"
        needed = ["TPU_WORKER_ID"] if hosts > 1 else []
        if slices > 1:
            needed += ["MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"]
    elif "SLURM_JOB_ID" in env and tasks > 1:
        if "SLURM_STEP_NODELIST" not in env:
            log.warning(
                "SLURM gave this job %d tasks, but srun did not start this process: it runs alone",
                tasks,
            )
            return None
        cluster, needed = f"SLURM's {tasks} tasks", ["SLURM_PROCID", "SLURM_LOCALID"]
    elif ranks > 1:
        cluster, needed = f"Open MPI's {ranks} ranks", ["OMPI_COMM_WORLD_RANK"]
    else:
        return None
    if missing := [name for name in needed if name not in env]:
        raise UserError(
            f"the environment names {cluster}, but not {', '.join(missing)}: which of them this "
            f"process is. Set that, or {', '.join(EXPLICIT)}"
        )
    return cluster


def _tpu_vm(env: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM, whose metadata tell JAX of the slice's other workers.

    By what importing JAX sets: TPU_ML_PLATFORM where there are TPU chips and their library,
    TPU_SKIP_MDS_QUERY (also set in GKE and Colab) where no metadata are to be asked.
    """
    allowed = "tpu" in (env.get("JAX_PLATFORMS") or "tpu")
    return allowed and "TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env


def _integer(name: str, env: Mapping[str, str]) -> int:
    """The environment variable's value; 1 where it is not set."""
    try:
        return int(env.get(name) or 1)
    except ValueError:
        raise UserError(f"{name}={env[name]} must be a whole number") from None


def _join(others: str, seconds: int, *args: str | int, **kwargs: str) -> None:
    """Calls jax.distributed.initialize. others: the processes that this one waits for, in words."""
    # When JAX's own time limit is over it aborts with a stack trace: this one ends before.
    watch = threading.Timer(seconds, _give_up, [others, seconds])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *args,
            initialization_timeout=2 * seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **kwargs,
        )
    finally:
        watch.cancel()
    last_words.listen()


def _give_up(others: str, seconds: int) -> None:
    print(
        f"afmrl_jax: {others} can't be reached within {seconds} s: start the same command on every "
        "machine, and see that they reach process 0 by that name and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(last_words.TRY_AGAIN)  # the main thread is inside JAX, which does not listen


def meet(where: str) -> None:
    """Waits until all processes are here. where: a name for it, the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"afmrl_jax {where}")


def first_says(flags: bool | np.ndarray) -> np.ndarray:
    """The first process's flags, bool[...], in all processes: workdirs need not be shared."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(flags, np.bool_)), np.bool_)


def all_say(flag: bool) -> bool:
    """Whether the flag is True in every process; all processes must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


def texts_of_all(text: str, size: int) -> list[str]:
    """The first `size` bytes of each process's text, by process; all processes must call it."""
    row = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
    rows = row[None] if jax.process_count() == 1 else multihost_utils.process_allgather(row)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]


def check_shared(folder: Path, patience: float = 20.0) -> None:
    """Raises UserError, in all processes, unless all see what the first one writes to `folder`.

    patience: seconds; a network file system shows a new file late.
    """
    if jax.process_count() == 1:
        return
    first, name, refused = jax.process_index() == 0, secrets.randbelow(2**31 - 1), None
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".shared-{name}").write_text("may be deleted")
        except OSError as error:
            name, refused = -1, error
    name = int(multihost_utils.broadcast_one_to_all(np.int32(name)))
    if name < 0:
        raise refused or UserError(f"process 0 can't write to {folder}, and says why")
    token, deadline = folder / f".shared-{name}", time.monotonic() + patience
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    all_see = multihost_utils.process_allgather(np.asarray(seen))
    if first:
        token.unlink(missing_ok=True)
    if not all_see.all():
        blind = ", ".join(map(str, np.flatnonzero(~all_see)))
        raise UserError(
            f"what process 0 writes to {folder}, process {blind} does not see: give a --workdir on "
            "a file system that all machines share (NFS, Filestore, a bucket mounted by gcsfuse)"
        )
