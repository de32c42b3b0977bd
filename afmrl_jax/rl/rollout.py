"""Queries of a step, and what the frozen encoder makes of them once attributes stand in their text.

Axes: A micro-batches · C queries of one (this process's) · n queries to embed · E embedding.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import grain
import jax
import numpy as np
from PIL import Image

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.answers import question
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.pipeline import Batch
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import AttributeCuts, listing_row
from afmrl_jax.retrieval.evaluation import embed_listings

REMEMBERED = 64  # queries whose photos are kept while their answers are embedded one after another


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
    chunks: int  # A
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
        listings, draws = (x.reshape(self.chunks, -1)[:, self.rows] for x in self.draw(step))
        rows = [
            question(self.catalog, int(listing), self.processor.max_images, int(draw))
            for listing, draw in zip(listings.flat, draws.flat)
        ]
        arrays = {
            name: x.reshape(*listings.shape, *x.shape[1:])
            for name, x in self.processor(rows).items()
        }
        return arrays | {"listing": listings.astype(np.int32)}


@dataclass(frozen=True)
class Query:
    """A listing that asks for the others of its product, with attributes in its text or without."""

    listing: int
    draw: int = 0
    attributes: Mapping[str, str] = field(default_factory=dict)


class Embedded(NamedTuple):
    """vectors: float32[n, E], the same on every process. cuts: of the rows that this one made."""

    vectors: np.ndarray
    cuts: AttributeCuts


@dataclass(frozen=True)
class QueryEmbedder:
    """The frozen encoder: queries to vectors, the same on every process.

    embed: this process's rows of a batch -> float32[batch, E] on every device. batch: rows embedded
    at once, by all processes; local: which of them this process makes.
    """

    embed: Callable[[dict[str, np.ndarray]], jax.Array]
    processor: Processor
    catalog: Catalog
    batch: int
    local: np.ndarray

    def __call__(self, queries: Sequence[Query]) -> Embedded:
        """Image and text of each query, its attributes where `listing_row` has them."""
        cuts = AttributeCuts(self.processor)

        @functools.lru_cache(REMEMBERED)
        def photos(listing: int, draw: int) -> tuple[Image.Image, ...]:
            return question(self.catalog, listing, self.processor.max_images, draw).images

        def row(number: int) -> Row:
            query = queries[number]
            listing = self.catalog.listing(query.listing, query.draw)
            return listing_row(listing, photos(query.listing, query.draw), query.attributes)

        def rows(numbers: np.ndarray) -> dict[str, np.ndarray]:
            return self.processor(cuts.made(numbers[self.local], row))

        vectors = embed_listings(self.embed, rows, np.arange(len(queries)), self.batch)
        return Embedded(vectors, cuts)


def none_is_read(cuts: AttributeCuts, where: str) -> UserError:
    """The error that ends a run whose encoder reads no attribute. where: in whose texts."""
    return UserError(
        f"{where}: {cuts}. Every answer would be worth the same: train the encoder with "
        f"--config.data.max_tokens={cuts.needed}, or with a smaller data.max_patches"
    )
