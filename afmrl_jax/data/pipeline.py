"""The stream of training batches: Grain over steps, one element a global batch's local part.

An element is a pure function of (seed, step), so the stream's whole state is one integer, the next
step, whatever the processes, workers or devices.

Axes: A chunks · C examples of a chunk (this process's) · V views of an example · S tokens ·
P patches · T attribute terms.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np
from absl import flags

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.pairs import PairSampler
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import Augmentation, listing_text, training_row

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PairBatches:
    """step -> batch, by indexing. Picklable: worker processes hold a copy."""

    catalog: Catalog
    sampler: PairSampler
    processor: Processor
    statistics: CorpusStatistics
    augmentation: Augmentation
    query_views: tuple[tuple[str, ...], np.ndarray]
    target_views: tuple[tuple[str, ...], np.ndarray]
    max_terms: int
    chunks: int
    rows: slice  # of each chunk's C examples, this process's
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # Grain compares it when it restores a stream
        return f"PairBatches({self.catalog.fingerprint}, seed={self.seed}, steps={self.steps})"

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step: the processor's arrays as [A, C, V, ...], and of each listing
        `listing` int32 (its index), `product` int32, and BM25's `terms`, `query_weights` and
        `document_weights` [A, C, V, T].
        """
        listings = self.sampler.draw(step)
        examples = np.arange(len(listings)).reshape(self.chunks, -1)[:, self.rows]
        rows, attributes = [], []
        for example in examples.flat:
            rows += self._rows(step, int(example), listings[example])
            attributes += [self.catalog.listing(int(i)).attributes for i in listings[example]]
        drawn = listings[examples]
        flat = self.processor(rows) | self.statistics.encode(attributes, self.max_terms)
        batch = {k: v.reshape(*drawn.shape, *v.shape[1:]) for k, v in flat.items()}
        batch["listing"] = drawn.astype(np.int32)
        batch["product"] = self.catalog.products[drawn]
        return batch

    def _rows(self, step: int, example: int, listings: np.ndarray) -> list[Row]:
        """One example's views: query, target, negatives, each rendered and cropped anew."""
        rng = np.random.default_rng((self.seed, step, 1, example))
        views, shares = self.target_views
        chosen = [str(rng.choice(views, p=shares)) for _ in listings]
        views, shares = self.query_views
        chosen[0] = str(rng.choice(views, p=shares))
        draws = 1 + rng.integers(2**31 - 1, size=len(listings))
        shorten = False
        if listings[0] == listings[1]:  # one listing stands for both sides
            listing = self.catalog.listing(int(listings[0]))
            if listing.n_images and listing_text(listing) and rng.random() < 0.5:
                # ... so they share no modality
                chosen[:2] = ["image", "text"] if rng.random() < 0.5 else ["text", "image"]
            else:  # ... or differ in crop and kept text
                shorten = True
        return [
            training_row(
                self.catalog,
                int(listing),
                int(draw),
                view,
                rng,
                self.augmentation,
                shorten=shorten and column < 2,
            )
            for column, (listing, draw, view) in enumerate(zip(listings, draws, chosen))
        ]


def _live_with_parent(*_: int) -> None:
    """A worker ends when its trainer does, however that ends, and not before it.

    SIGTERM reaches the whole group: the trainer may still want batches for the step it is saving.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Batches(Protocol):
    """step -> batch, by indexing; `listing`, int32[A, C, ...], says which listings it shows.

    Picklable: worker processes hold a copy. Its repr tells it from others: Grain compares it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class Stream:
    """Iterates batches from `next_step` on, made ahead by worker processes (0: in a thread)."""

    def __init__(self, batches: Batches, next_step: int, workers: int):
        """next_step: the stream's state, the first step to deliver."""
        dataset = grain.MapDataset.source(batches)[next_step:].to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                worker_init_fn=_live_with_parent,
            )
        self._iterator = iter(dataset)
        self.next_step = next_step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # Copied out of the memory shared with a worker: JAX may keep an array as long as it likes.
        batch = {name: np.array(array) for name, array in next(self._iterator).items()}
        self.next_step += 1
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator.close()
        del self._iterator  # it holds the last batch, in that shared memory
        gc.collect()
