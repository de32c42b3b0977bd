"""How one process of several ends all of them, by the sentence that ended it.

Process 0 hosts JAX's coordination service, so it is the last to leave. The process that ends first
leaves its sentence there, and the others look for it.
Everything that is not JAX's public interface stands in this file. Seen on jax 0.10.2:
`jax._src.distributed.global_state` (the service's client), and that the runtime ends a process that
lost the service by SIGABRT.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time

import jax
from jax._src.distributed import global_state  # JAX has no public name for its service's values

from afmrl_jax.core.errors import UserError

TRY_AGAIN = os.EX_TEMPFAIL  # 75, the exit status that launch/restart.sh starts again
LINGER_SECONDS = 5
LISTEN_SECONDS = 1.0  # between looks for what another said
_WORDS = "afmrl_jax/last_words"  # in the service: of the first that ends by a sentence
_LAST: list[tuple[str, int]] = []  # the same, heard from another process
_HEARD = threading.Event()
_SAYING = threading.Lock()  # taken, once, by the thread that says how this process ends
# What JAX's runtime, gloo, NCCL and Orbax say where another process is gone.
LOST = r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|CoordinationService|[Bb]arrier"


def listen() -> None:
    """Begins to look for the others' last words; call it once, when all have joined."""
    # Where process 0 is gone, JAX's runtime aborts from a thread of its own, while the main thread
    # is about to raise what `lost` reads. The handler sleep(SIGABRT) gives it SIGABRT = 6 seconds.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    threading.Thread(target=_follow, daemon=True).start()


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


def _follow() -> None:
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
