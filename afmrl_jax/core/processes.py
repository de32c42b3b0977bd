"""Several processes that run one program: how they join, and how one ends without the others.

Process 0 hosts JAX's coordination service, so it is the last to leave. What ends one of them by a
sentence ends all: it leaves the sentence there, and the others look for it.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax._src.distributed import global_state  # JAX has no public name for its service's values
from jax.experimental import multihost_utils

from afmrl_jax.core.errors import UserError

log = logging.getLogger(__name__)

TRY_AGAIN = os.EX_TEMPFAIL  # 75, the exit status that launch/restart.sh starts again
JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 45  # without a sign of life until JAX gives a process up
LINGER_SECONDS = 5
LISTEN_SECONDS = 1.0  # between looks for what another said
_WORDS = "afmrl_jax/last_words"  # in the service: of the first that ends by a sentence
_LAST: list[tuple[str, int]] = []  # the same, heard from another process
_HEARD = threading.Event()
_SAYING = threading.Lock()  # taken, once, by the thread that says how this process ends
EXPLICIT = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
# What JAX's runtime, gloo, NCCL and Orbax say where another process is gone.
LOST = r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|CoordinationService|[Bb]arrier"


def initialize_distributed(seconds: int = JOIN_SECONDS) -> None:
    """Joins the other processes, where the environment says that this is one of several.

    Said by COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID; else by SLURM (srun), Open MPI or
    Cloud TPU (one slice or several, as VMs or in GKE), whose addresses JAX finds itself.
    Raises UserError where that is said by halves, before JAX touches a device. Ends the process
    with a sentence and TRY_AGAIN where the others can't be reached within so many `seconds`.
    """
    env = os.environ
    if any(name in env for name in EXPLICIT):
        address, count, index = _explicit(env)
        if count > 1:
            told = f"process {index} of {count}: the others at {address}"
            _join(told, seconds, address, count, index, cluster_detection_method="deactivate")
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
    count, index = _whole("NUM_PROCESSES", env), _whole("PROCESS_ID", env)
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
    """What a scheduler made this process a part of, as "SLURM's 4 tasks"; None if it is alone."""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    hosts, slices = len(hosts.split(",")), _whole("MEGASCALE_NUM_SLICES", env)
    tasks, ranks = _whole("SLURM_NTASKS", env), _whole("OMPI_COMM_WORLD_SIZE", env)
    if hosts > 1 or slices > 1:
        told = f"Cloud TPU's {slices} slices" if slices > 1 else f"Cloud TPU's {hosts} hosts"
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
        told, needed = f"SLURM's {tasks} tasks", ["SLURM_PROCID", "SLURM_LOCALID"]
    elif ranks > 1:
        told, needed = f"Open MPI's {ranks} ranks", ["OMPI_COMM_WORLD_RANK"]
    else:
        return None
    if missing := [name for name in needed if name not in env]:
        raise UserError(
            f"the environment names {told}, but not {', '.join(missing)}: which of them this "
            f"process is. Set that, or {', '.join(EXPLICIT)}"
        )
    return told


def _tpu_vm(env: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM, whose metadata tell JAX of the slice's other workers.

    By what importing JAX sets: TPU_ML_PLATFORM where there are TPU chips and their library,
    TPU_SKIP_MDS_QUERY (also set in GKE and Colab) where no metadata are to be asked.
    """
    wanted = "tpu" in (env.get("JAX_PLATFORMS") or "tpu")
    return wanted and "TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env


def _whole(name: str, env: Mapping[str, str]) -> int:
    """That variable, 1 where it is not set."""
    try:
        return int(env.get(name) or 1)
    except ValueError:
        raise UserError(f"{name}={env[name]} must be a whole number") from None


def _join(told: str, seconds: int, *where: str | int, **how: str) -> None:
    """jax.distributed.initialize; `told`: whom this process waits for."""
    # Where JAX's own time is over it aborts, with a stack trace: so ours is over before.
    watch = threading.Timer(seconds, _give_up, [told, seconds])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *where,
            initialization_timeout=2 * seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **how,
        )
    finally:
        watch.cancel()
    # Where process 0 is gone, JAX's runtime aborts from a thread of its own, while the main thread
    # is about to raise what `lost` reads. This handler, sleep(SIGABRT), lets it: for 6 seconds.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    threading.Thread(target=_listen, daemon=True).start()


def _give_up(told: str, seconds: int) -> None:
    print(
        f"afmrl_jax: {told} can't be reached within {seconds} s: start the same command on every "
        "machine, and see that they reach process 0 by that name and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(TRY_AGAIN)  # the main thread is inside JAX, which does not listen


def lost(error: BaseException | None) -> str | None:
    """What an error, or one behind it, says of another process that is gone; else None.

    Its first line, of which the rest of a page of explanations is left out.
    """
    while error and jax.distributed.is_initialized():
        message = str(error).strip()
        if not isinstance(error, UserError) and re.search(LOST, message):
            return textwrap.shorten(message.splitlines()[0], 160, placeholder=" ...")
        error = error.__cause__ or error.__context__
    return None


def say_last(told: str, status: int = 0) -> None:
    """Prints why this process ends; with a status, the others, if any, end by the same sentence."""
    if not jax.distributed.is_initialized() or _SAYING.acquire(blocking=False):
        print(f"afmrl_jax: {told}", file=sys.stderr, flush=True)
    if status and jax.distributed.is_initialized():
        words = json.dumps([jax.process_index(), told, status])
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or all is over
            global_state.client.key_value_set(_WORDS, words)


def last_words() -> tuple[str, int] | None:
    """The sentence and the status with which another process ended, as it said itself; it is given
    a moment to be heard, and no more: where process 0 is gone, JAX ends this one soon."""
    return _LAST[0] if _HEARD.wait(2 * LISTEN_SECONDS) else None


def _listen() -> None:
    """Ends this process as another ended that said why: the main thread may wait for that one
    in a collective or a barrier that does not fail, or only after minutes."""
    seconds = LISTEN_SECONDS * max(1, global_state.num_processes / 100)  # all ask process 0
    while (client := global_state.client) is not None:
        time.sleep(seconds)
        try:
            index, told, status = json.loads(client.key_value_try_get(_WORDS))
        except jax.errors.JaxRuntimeError:  # nobody has said anything, or all is over
            continue
        if index == global_state.process_id:
            return
        _LAST.append((f"process {index} ended, and so do all: {told}", status))
        _HEARD.set()
        time.sleep(LISTEN_SECONDS)  # for the main thread, if it has found out by itself
        say_last(_LAST[0][0])
        leave(status)


def leave(status: int) -> int:
    """Ends this process at once with `status` where it is one of several; else returns `status`.

    Not by Python's own end, where JAX waits for all processes, aborts if one does not come, and
    Orbax's and Grain's threads wait as well.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(LINGER_SECONDS)  # the others find out by themselves, not by its absence
        os._exit(status)
    return status


def first_says(flag: bool) -> bool:
    """What the first process knows, in all of them: workdirs need not be shared."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))


def all_say(flag: bool) -> bool:
    """Whether it is so in all processes, which ask together."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(flag))))


def check_shared(folder: Path, patience: float = 20.0) -> None:
    """Raises UserError, in all processes, where one does not see what the first writes in `folder`.

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
