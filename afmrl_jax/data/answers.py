"""What a generator learns from: listings shown as questions, their attributes as answers.

Axes: A micro-batches · C rows of one (this process's) · S tokens · P patches.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from afmrl_jax.attributes.text import format_attributes, normalise
from afmrl_jax.core.writer import write_atomically
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.pipeline import Batch
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import evaluation_row


def question(catalog: Catalog, index: int, max_images: int, draw: int = 0) -> Row:
    """What a generator is shown of a listing: its first images, title, category, description."""
    return evaluation_row(catalog, index, "image+text", max_images=max_images, draw=draw)


def question_and_answer(
    catalog: Catalog,
    index: int,
    max_images: int,
    draw: int = 0,
    left_out: Callable[[], bool] = lambda: False,
) -> Row:
    """The question, and the listing's attributes in their format as what to answer.

    left_out: asked of each attribute; one stays in any case.
    """
    given = normalise(catalog.listing(index, draw).attributes)
    kept = {name: value for name, value in given.items() if not left_out()}
    answer = format_attributes(kept or dict(list(given.items())[:1]))
    return dataclasses.replace(question(catalog, index, max_images, draw), answer=answer)


def described(catalog: Catalog, split: str, cache: Path) -> np.ndarray:
    """int64 indices of a split's listings that have attributes, ascending.

    Read from the catalogue once and kept in the cache: a catalogue of millions takes a minute.
    """
    path = cache / f"described-{catalog.fingerprint}-{split}.npy"
    if not path.exists():
        listings = catalog.indices(split)
        has = [bool(format_attributes(catalog.listing(int(i)).attributes)) for i in listings]
        write_atomically(path, listings[np.array(has, bool)])
    return np.load(path)


@dataclass(frozen=True)
class AnswerBatches:
    """The batches of a run, a pure function of (seed, step); see pipeline.Batches.

    Each epoch shows all listings once, in an order of its own; a rendered catalogue renders each
    anew every time. Images are neither cropped nor mirrored: the answer would not be true of them.
    """

    catalog: Catalog
    listings: np.ndarray  # int64, those to learn from
    processor: Processor
    batch: int  # rows of a step, of all processes
    chunks: int  # A
    rows: np.ndarray  # of each chunk's rows, this process's
    dropout: float  # share of the attributes that answers leave out, at random
    seed: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return f"AnswerBatches({self.catalog.fingerprint}, seed={self.seed}, steps={self.steps})"

    def __getitem__(self, step: int) -> Batch:
        """The processor's arrays as [A, C, ...], and `listing` int32[A, C], each row's index."""
        order = grain.MapDataset.range(len(self.listings)).seed(self.seed).shuffle().repeat()
        examples = step * self.batch + np.arange(self.batch)
        examples = examples.reshape(self.chunks, -1)[:, self.rows]
        listings = np.array([self.listings[order[int(example)]] for example in examples.flat])
        rows = []
        for example, listing in zip(examples.flat, listings):
            rng = np.random.default_rng((self.seed, int(example)))
            draw = 1 + int(rng.integers(2**31 - 1))
            rows.append(
                question_and_answer(
                    *(self.catalog, int(listing), self.processor.max_images, draw),
                    left_out=lambda rng=rng: rng.random() < self.dropout,
                )
            )
        arrays = self.processor(rows) | {"listing": listings.astype(np.int32)}
        return {name: x.reshape(*examples.shape, *x.shape[1:]) for name, x in arrays.items()}
