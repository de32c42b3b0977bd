"""Batches of queries, for a generator to answer."""

from dataclasses import dataclass

import grain
import numpy as np

from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.data.answers import question
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import Batch


@dataclass(frozen=True)
class QueryBatches:
    """The queries of a run as the generator is asked about them, a pure function of (seed, step);
    see pipeline.Batches.

    Each epoch asks about all listings once, in an order of its own; a rendered catalogue renders
    each anew every time.
    """

    catalog: Catalog
    listings: np.ndarray  # int64, those that have something to find
    processor: Processor  # the generator's
    queries: int  # of a step, of all processes
    micro_batches: int  # A
    rows: np.ndarray  # of each chunk's queries, this process's
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return f"QueryBatches({self.catalog.fingerprint}, seed={self.seed}, steps={self.steps})"

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """All queries of a step, chunk by chunk: listings int64[Q] and their draws int64[Q]."""
        order = grain.MapDataset.range(len(self.listings)).seed(self.seed).shuffle().repeat()
        numbers = step * self.queries + np.arange(self.queries)
        listings = [self.listings[order[int(number)]] for number in numbers]
        draws = [np.random.default_rng((self.seed, int(n))).integers(2**31 - 1) for n in numbers]
        return np.array(listings), 1 + np.array(draws)

    def __getitem__(self, step: int) -> Batch:
        """The processor's arrays as [A, C, ...], and `listing` int32[A, C], each row's index."""
        listings, draws = (x.reshape(self.micro_batches, -1)[:, self.rows] for x in self.draw(step))
        rows = [
            question(self.catalog, int(listing), self.processor.max_images, int(draw))
            for listing, draw in zip(listings.flat, draws.flat)
        ]
        arrays = {
            name: x.reshape(*listings.shape, *x.shape[1:])
            for name, x in self.processor(rows).items()
        }
        return arrays | {"listing": listings.astype(np.int32)}
