"""The stream of training batches: Grain over steps, one element a global batch's local part.

An element is a pure function of (seed, step), so the stream's whole state is one integer, the next
step, whatever the processes, workers or devices.

Axes: A micro-batches · C examples of a micro-batch (this process's).
"""

import contextlib
import gc
import queue
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np
from absl import flags

from afmrl_jax.core.errors import TryAgain
from afmrl_jax.core.options import Options, between
from afmrl_jax.data.workers import Workers, killed_or_ended

Batch = dict[str, np.ndarray]

PATIENCE = 5  # seconds for a worker to finish its batch, before it is killed


@dataclass(frozen=True)
class StreamOptions(Options, section="data"):
    """The processes that make batches ahead, and how long to wait for a batch."""

    workers: int = between(0)  # processes; 0: a thread of the training process
    timeout: float = between(1, 1_000_000)  # seconds to wait for a batch, workers' start included


class Batches(Protocol):
    """step -> batch, by indexing. A batch has `listing`, int32[A, C, ...], its listings' indices.

    Picklable, for the copies in worker processes. Grain compares the reprs of two objects, so
    different batches need different ones.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class Stream:
    """Iterates batches from `next_step` on, made ahead by worker processes or in a thread."""

    def __init__(self, batches: Batches, next_step: int, options: StreamOptions):
        """next_step: the stream's state, the first step to deliver."""
        workers = options.workers
        self._workers = Workers(workers, next_step) if workers else None
        # A worker reads ahead in a thread; without workers, the thread below does.
        threads = min(workers, 1)
        dataset = grain.MapDataset.source(batches)[next_step:].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                worker_init_fn=self._workers.initializer,
            )
        self._iterator = iter(dataset)
        self.next_step, self.timeout = next_step, options.timeout
        # Grain waits forever for a worker that hangs, so a thread waits for Grain. The thread is a
        # daemon, so that the process can end without it.
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=1 if workers else 2)
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, name="batches", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closing.is_set():
            try:
                batch = next(self._iterator)
                # The arrays lie in memory shared with a worker, and JAX may keep them for any time:
                # so they are copied.
                batch = {name: np.array(array) for name, array in batch.items()}
            except Exception as error:  # StopIteration too; `__next__` raises it
                self._ready.put(error)
                return
            self._ready.put(batch)
            del batch  # else its memory would be in use while the next batch is made

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises TryAgain where the batch's worker was killed, or the batch is not made in time:
        then its worker's stack is printed on standard error, and all workers are killed."""
        try:
            batch = self._ready.get(timeout=self.timeout)
        except queue.Empty:
            raise TryAgain(self._hung()) from None
        if isinstance(batch, Exception):
            self._ready.put(batch)  # every later call raises it again
            # Grain's only message that does not come from our own code.
            if code := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(batch)):
                raise TryAgain(self._died(int(code[1]))) from batch
            raise batch
        self.next_step += 1
        return batch

    def _died(self, exit_code: int) -> str:
        return (
            f"{self._workers.name(self.next_step)}, which was to bring the batch of step "
            f"{self.next_step + 1}, {killed_or_ended(exit_code)}. "
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
        return f"{late}: {self._workers.end_hung(self.next_step)}; {advice}"

    def close(self) -> None:
        """Ends the worker processes, in bounded time."""
        self._closing.set()
        with contextlib.suppress(queue.Empty):
            while True:  # the reader may wait for room
                self._ready.get_nowait()
        self._reader.join(PATIENCE)
        if self._reader.is_alive() and self._workers:
            self._workers.kill()
            self._reader.join(PATIENCE)
        self._iterator.close()
        if self._workers:
            self._workers.close()
        del self._iterator  # its last batch lies in memory shared with a worker
        gc.collect()
