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
LINGER_SECONDS = 5  # that process 0 stays when it ends
LISTEN_SECONDS = 1.0  # between two looks for the other processes' last words
_KEY = "afmrl_jax/last_words"  # in the coordination service
_LAST: list[tuple[str, int]] = []  # another process's sentence and status, once they are known
_HEARD = threading.Event()  # set when _LAST is filled
_PRINTING = threading.Lock()  # taken once, by the thread that prints why this process ends
# In the errors of JAX's runtime, gloo, NCCL and Orbax when another process is gone.
LOST = r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|CoordinationService|[Bb]arrier"


def listen() -> None:
    """Begins to look for the others' last words; call it once, when all have joined."""
    # Where process 0 is gone, JAX's runtime aborts from a thread of its own, while the main thread
    # is about to raise what `lost` reads. The handler sleep(SIGABRT) gives it SIGABRT = 6 seconds.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    threading.Thread(target=_follow, daemon=True).start()


def lost(error: BaseException | None) -> str | None:
    """The first line of an error that another process's end has caused; None for other errors.

    Looks through the error's causes as well.
    """
    while error and jax.distributed.is_initialized():
        message = str(error).strip()
        if not isinstance(error, UserError) and re.search(LOST, message):
            return textwrap.shorten(message.splitlines()[0], 160, placeholder=" ...")
        error = error.__cause__ or error.__context__
    return None


def say_last(sentence: str, status: int = 0) -> None:
    """Prints why this process ends; with a status, all other processes end by that sentence too."""
    if not jax.distributed.is_initialized() or _PRINTING.acquire(blocking=False):
        print(f"afmrl_jax: {sentence}", file=sys.stderr, flush=True)
    if status and jax.distributed.is_initialized():
        words = json.dumps([jax.process_index(), sentence, status])
        # Raised where another process was first, or where the service is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            global_state.client.key_value_set(_KEY, words)


def last_words() -> tuple[str, int] | None:
    """The sentence and the exit status with which another process ended; None where none is known.

    Waits two seconds for them, and no longer: where process 0 is gone, JAX ends this process soon.
    """
    return _LAST[0] if _HEARD.wait(2 * LISTEN_SECONDS) else None


def _follow() -> None:
    """Ends this process when another one's last words are there.

    The main thread may wait for that process in a collective or a barrier that fails after minutes,
    or never.
    """
    seconds = LISTEN_SECONDS * max(1, global_state.num_processes / 100)  # spares process 0
    while (client := global_state.client) is not None:
        time.sleep(seconds)
        try:
            index, sentence, status = json.loads(client.key_value_try_get(_KEY))
        except jax.errors.JaxRuntimeError:  # no last words yet, or the service is gone
            continue
        if index == global_state.process_id:
            return
        _LAST.append((f"process {index} ended, and so do all: {sentence}", status))
        _HEARD.set()
        time.sleep(LISTEN_SECONDS)  # in which the main thread may end the process itself
        say_last(_LAST[0][0])
        leave(status)


def leave(status: int) -> int:
    """Ends this process at once with `status` where it is one of several; else returns `status`.

    At Python's normal exit JAX would wait for all processes, and abort if one is missing; Orbax's
    and Grain's threads would wait too.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(LINGER_SECONDS)  # so that the others hear its words before they miss it
        os._exit(status)
    return status
