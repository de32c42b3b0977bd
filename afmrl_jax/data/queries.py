"""Batches of queries, for a generator to answer.

Axes: A micro-batches · C queries of a micro-batch (this process's) · Q queries of a step.
"""

from dataclasses import dataclass

import grain
import numpy as np

from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import Batch
from afmrl_jax.data.views import evaluation_row


@dataclass(frozen=True)
class QueryBatches:
    """The queries of a run as prompts of the generator, a pure function of (seed, step); see
    stream.Batches.

    Each epoch shows every listing once, in another order; a rendered catalogue renders it anew
    every time.
    """

    catalog: Catalog
    listings: np.ndarray  # int64, the listings to query with
    processor: Processor  # the generator's
    queries: int  # queries of a step, of all processes
    micro_batches: int  # A
    rows: np.ndarray  # int[C], this process's places in each micro-batch
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return f"QueryBatches({self.catalog.fingerprint}, seed={self.seed}, steps={self.steps})"

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """All queries of a step, one micro-batch after another: their listings and draws, int64[Q]
        each."""
        order = grain.MapDataset.range(len(self.listings)).seed(self.seed).shuffle().repeat()
        numbers = step * self.queries + np.arange(self.queries)
        listings = [self.listings[order[int(number)]] for number in numbers]
        draws = [np.random.default_rng((self.seed, int(n))).integers(2**31 - 1) for n in numbers]
        return np.array(listings), 1 + np.array(draws)

    def __getitem__(self, step: int) -> Batch:
        """The processor's arrays as [A, C, ...], and `listing` int32[A, C], each row's index."""
        listings, draws = (x.reshape(self.micro_batches, -1)[:, self.rows] for x in self.draw(step))
        rows = [
            evaluation_row(self.catalog, int(listing), self.processor.max_images, int(draw))
            for listing, draw in zip(listings.flat, draws.flat)
        ]
        arrays = {
            name: x.reshape(*listings.shape, *x.shape[1:])
            for name, x in self.processor(rows).items()
        }
        return arrays | {"listing": listings.astype(np.int32)}
