"""The worker processes of a stream, and the three ways in which they end.

Their trainer ends, and they with it; the system kills one, usually for memory; or one hangs, and
all are killed, after that one printed its stack.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

STACK_SECONDS = 1  # time for a worker to print its stack
# A training step that shares its cores with its workers waits for the core that one holds: SFT on
# two cores took 11% longer (83.5 and 75.2 answers/s, three runs of each in turn).
NICENESS = 5


class Workers:
    """The workers of one stream, which make its batches in turn; make this before they start."""

    def __init__(self, count: int, first_step: int):
        """first_step: the step whose batch the first worker makes."""
        self._count, self._first_step = count, first_step
        # Each worker's file, named by its number, holds its process id, then its stack when asked.
        self._folder = tempfile.TemporaryDirectory(prefix="afmrl_workers_")
        self._other_processes = set(multiprocessing.active_children())

    @property
    def initializer(self) -> Callable[[int, int], None]:
        """Grain's worker_init_fn, which each worker calls with its number and their count."""
        return functools.partial(_live_with_parent, self._folder.name)

    def name(self, step: int) -> str:
        """The worker that makes the batch of a step, for a message."""
        return f"data worker {self._number(step) + 1} of {self._count}"

    def _number(self, step: int) -> int:
        return (step - self._first_step) % self._count

    def end_hung(self, step: int) -> str:
        """Has the worker of a step print its stack, kills all workers, and says so."""
        process = self._print_stack(step)
        self.kill()
        if process is None:
            return f"{self.name(step)} did not start"
        return (
            f"{self.name(step)} (process {process}) does not answer, and is ended. What it "
            "was at stands above"
        )

    def _print_stack(self, step: int) -> int | None:
        """Prints the stack of the worker of a step on standard error. Returns its process id; None
        where the worker has not started."""
        file = Path(self._folder.name) / str(self._number(step))
        if not file.exists() or not (content := file.read_text(encoding="utf-8")):
            return None
        process = int(content)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        print(file.read_text(encoding="utf-8").partition("\n")[2], file=sys.stderr, flush=True)
        return process

    def kill(self) -> None:
        """Kills the workers that live."""
        children = set(multiprocessing.active_children()) - self._other_processes
        for process in children:
            if process.name.startswith("grain-"):
                process.kill()

    def close(self) -> None:
        self._folder.cleanup()


def killed_or_ended(exit_code: int) -> str:
    """What became of a process, for a message; exit_code: as multiprocessing gives it."""
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with {exit_code}"


def _live_with_parent(folder: str, number: int, count: int) -> None:
    """Makes a worker process end when its trainer does, not before it, and yield its core to it.

    folder: where the file with the worker's number for a name gets its process id, and after a
    SIGUSR1 its stack.
    """
    # SIGTERM reaches the whole group, and the trainer may still want batches for the step that it
    # saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    file = (Path(folder) / str(number)).open("w", encoding="utf-8")
    print(os.getpid(), file=file, flush=True)
    faulthandler.register(signal.SIGUSR1, file=file)

    def end_with_trainer() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_trainer, daemon=True).start()
