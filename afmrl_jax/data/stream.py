"""The stream of training batches: Grain over steps, one element a global batch's local part.

An element is a pure function of (seed, step), so the stream's whole state is one integer, the next
step, whatever the processes, workers or devices.

Axes: A micro-batches · C examples of one (this process's) · V views of an example · S tokens ·
P patches · T attribute terms.
"""

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
from absl import flags

from afmrl_jax.core.errors import TryAgain
from afmrl_jax.core.options import Options, between

Batch = dict[str, np.ndarray]

PATIENCE = 5  # seconds that a worker is given to finish what it is at, before it is killed
ANSWER = 1  # and to tell what that is
# A step whose cores are its workers' as well waits for the core that one holds: SFT on two cores
# took 11% longer (83.5 and 75.2 answers/s, three runs of each in turn).
NICENESS = 5


def _live_with_parent(notes: str, worker: int, _: int) -> None:
    """A worker ends when its trainer does, however that ends, not before it, and steps back for it.

    SIGTERM reaches the whole group: the trainer may still want batches for the step it is saving.
    notes: a folder; in the file that has the worker's number for a name stands its process, and,
    after a SIGUSR1, what it is at.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICENESS)
    file = (Path(notes) / str(worker)).open("w", encoding="utf-8")
    print(os.getpid(), file=file, flush=True)
    faulthandler.register(signal.SIGUSR1, file=file)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class StreamOptions(Options, section="data"):
    """Who makes batches ahead, and how long one is waited for."""

    workers: int = between(0)  # processes; 0: a thread of this one
    timeout: float = between(1, 1_000_000)  # seconds a batch, the first one's with workers' start


class Batches(Protocol):
    """step -> batch, by indexing; `listing`, int32[A, C, ...], says which listings it shows.

    Picklable: worker processes hold a copy. Its repr tells it from others: Grain compares it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class Stream:
    """Iterates batches from `next_step` on, made ahead by worker processes or in a thread."""

    def __init__(self, batches: Batches, next_step: int, options: StreamOptions):
        """next_step: the stream's state, the first step to deliver."""
        workers = options.workers
        self._notes = tempfile.TemporaryDirectory(prefix="afmrl_workers_")
        # A worker reads ahead in a thread; without one, the thread below does.
        threads = min(workers, 1)
        dataset = grain.MapDataset.source(batches)[next_step:].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                worker_init_fn=functools.partial(_live_with_parent, self._notes.name),
            )
        self._iterator = iter(dataset)
        self.next_step = self._first_step = next_step
        self.timeout, self._workers = options.timeout, workers
        self._others = set(multiprocessing.active_children())
        # Grain waits without end for a worker that hangs, so that a thread must wait for Grain; as
        # a daemon it does not keep a process that ends.
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=1 if workers else 2)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, name="batches", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closing.is_set():
            try:
                found = next(self._iterator)
                # Copied out of the memory shared with a worker: JAX may keep an array as long as
                # it likes.
                found = {name: np.array(array) for name, array in found.items()}
            except Exception as error:  # StopIteration too: whoever waits for a batch gets it
                self._ready.put(error)
                return
            self._ready.put(found)
            del found  # it would be held while the next is made

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises TryAgain where the batch's worker was killed, or the batch is not made in time:
        then the workers are killed, after that one told on standard error what it was at."""
        try:
            found = self._ready.get(timeout=self.timeout)
        except queue.Empty:
            raise TryAgain(self._hung()) from None
        if isinstance(found, Exception):
            self._ready.put(found)  # for whoever asks again
            # The one message of Grain's that does not come from our own code.
            if code := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(found)):
                raise TryAgain(self._died(int(code[1]))) from found
            raise found
        self.next_step += 1
        return found

    @property
    def _worker(self) -> int:
        """Which one makes the next batch, from 0."""
        return (self.next_step - self._first_step) % self._workers

    def _whose(self) -> str:
        return f"data worker {self._worker + 1} of {self._workers}"

    def _died(self, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return (
            f"{self._whose()}, which was to bring the batch of step {self.next_step + 1}, {how}. "
            "Where nobody did that, the machine ran out of memory: lower data.workers (dmesg names "
            "what the system killed). Start again: the run goes on from its last checkpoint"
        )

    def _hung(self) -> str:
        late = (
            f"the batch of step {self.next_step + 1} was not made within {self.timeout:g} s "
            "(data.timeout)"
        )
        advice = (
            "look whether the disk or the network file system of data.path answers, and whether "
            "the machine has memory left; then start again: the run goes on from its last "
            "checkpoint. Where batches do take that long, raise data.timeout or data.workers"
        )
        if not self._workers:
            return f"{late} by this process's own thread: {advice}"
        process = self._ask()
        self._kill()
        if process is None:
            return f"{late}: {self._whose()} did not start; {advice}"
        return (
            f"{late}: {self._whose()} (process {process}) does not answer, and is ended. What it "
            f"was at stands above; {advice}"
        )

    def _ask(self) -> int | None:
        """Has the worker that makes the next batch tell what it is at; its process, None where it
        has not got so far."""
        notes = Path(self._notes.name) / str(self._worker)
        if not notes.exists() or not (told := notes.read_text(encoding="utf-8")):
            return None
        process = int(told)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR1)
        time.sleep(ANSWER)
        print(notes.read_text(encoding="utf-8").partition("\n")[2], file=sys.stderr, flush=True)
        return process

    def _processes(self) -> list[multiprocessing.Process]:
        """This stream's living workers."""
        living = set(multiprocessing.active_children()) - self._others
        return sorted((p for p in living if p.name.startswith("grain-")), key=lambda p: p.pid)

    def _kill(self) -> None:
        for process in self._processes():
            process.kill()

    def close(self) -> None:
        """Ends the worker processes, in bounded time."""
        self._closing.set()
        with contextlib.suppress(queue.Empty):
            while True:  # the reader may wait for room
                self._ready.get_nowait()
        self._reader.join(PATIENCE)
        if self._reader.is_alive() and self._workers:
            self._kill()
            self._reader.join(PATIENCE)
        self._iterator.close()
        self._notes.cleanup()
        del self._iterator  # it holds the last batch, in that shared memory
        gc.collect()
