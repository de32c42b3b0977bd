"""Queries of a step, and what the frozen encoder makes of them once attributes stand in their text.

Axes: A micro-batches · C queries of one (this process's) · n queries to embed · E embedding.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import AttributeCuts, evaluation_row, listing_row
from afmrl_jax.retrieval.evaluation import embed_listings

REMEMBERED = 64  # queries whose photos are kept while their answers are embedded one after another


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
            return evaluation_row(self.catalog, listing, self.processor.max_images, draw).images

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
