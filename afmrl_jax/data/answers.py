"""The batches that a generator learns from: listings as questions, their attributes as answers.

Axes: A micro-batches · C rows of a micro-batch (this process's) · S tokens · N sampled rows.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from afmrl_jax.attributes.comparison import VERSION
from afmrl_jax.attributes.text import MAX_CHARACTERS, MAX_PAIRS, format_attributes, normalise
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.options import Options, between
from afmrl_jax.data.fitting import fitting
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.stream import Batch
from afmrl_jax.data.tokenizer import encode_text
from afmrl_jax.data.views import SEPARATOR, attribute_pairs, evaluation_row

log = logging.getLogger(__name__)

WINDOW = 16  # steps whose rows are sorted by length together; more would save little padding
SAMPLED = 1024  # rows from whose lengths the padded lengths are chosen
ROUNDED = 8  # tokens; padded lengths are multiples of it


class Learnable(NamedTuple):
    """The answer that a generator can learn for a listing.

    answer: whole attributes, as many as `parse` reads and max_answer holds; None for no attribute,
    because an empty answer would teach silence. pairs: number of attributes in the answer.
    left_out: number of attributes that are not in it. needed: the max_answer that holds all
    attributes that `parse` reads.
    """

    answer: str | None
    pairs: int
    left_out: int
    needed: int


def learnable(attributes: Mapping[str, str], processor: Processor) -> Learnable:
    """A valid answer of whole attributes. Attributes that do not fit are left out, and shorter ones
    behind them are kept.

    attributes: normalised. processor: its max_answer limits the answer, the end token included.
    Raises ValueError where max_answer is 0.
    """
    if not processor.max_answer:
        raise ValueError("max_answer=0 leaves no room for an answer: make rows that have some")

    def count(text: str) -> int:
        return len(encode_text(processor.tokenizer, text))

    answer = format_attributes(attributes)
    if len(attributes) <= MAX_PAIRS and len(answer) <= MAX_CHARACTERS:
        needed = count(answer) + 1
        if needed <= processor.max_answer:
            return Learnable(answer or None, len(attributes), 0, needed)
    readable, room = [], MAX_CHARACTERS
    for pair in attribute_pairs(attributes):
        if len(readable) < MAX_PAIRS and len(pair) <= room:
            readable.append(pair)
            room -= len(pair) + len(SEPARATOR)
    kept = fitting(readable, SEPARATOR, processor.max_answer - 1, count, SEPARATOR.join)
    needed = count(SEPARATOR.join(readable)) + 1
    left_out = len(attributes) - len(kept)
    return Learnable(SEPARATOR.join(kept) or None, len(kept), left_out, needed)


def question_and_answer(
    catalog: Catalog,
    index: int,
    processor: Processor,
    draw: int = 0,
    left_out: Callable[[], bool] = lambda: False,
    view: str = "image+text",
) -> Row:
    """The listing as the question, its `learnable` attributes as the answer.

    processor: with room for answers. left_out: called once an attribute, True to leave it out; the
    first attribute stays where all would be left out. view: "text" opens no image.
    """
    attributes = normalise(catalog.listing(index, draw).attributes)
    kept = {name: value for name, value in attributes.items() if not left_out()}
    answer = learnable(kept or dict(list(attributes.items())[:1]), processor).answer
    question = evaluation_row(catalog, index, processor.max_images, draw, view=view)
    return dataclasses.replace(question, answer=answer)


def described(catalog: Catalog, split: str, cache: Path) -> np.ndarray:
    """int64 indices of a split's listings with at least one attribute that is not empty, ascending.

    Read from the catalogue once and kept in the cache: a catalogue of millions takes a minute.
    """
    path = cache / f"described-{VERSION}-{catalog.fingerprint}-{split}.npy"
    if not path.exists():
        listings = catalog.indices(split)
        each = (catalog.listing(int(i)).attributes for i in listings)
        flags = [(bool(format_attributes(attributes)), bool(attributes)) for attributes in each]
        is_described, has_attributes = np.array(flags, bool).reshape(-1, 2).T
        if empty := np.count_nonzero(has_attributes & ~is_described):
            log.info(
                "%s: %d listings of the %s split have only attributes that say nothing, as "
                '"unknown", and count as having none',
                *(catalog.name, empty, split),
            )
        write_atomically(path, listings[is_described])
    return np.load(path)


@dataclass(frozen=True)
class AnswerOptions(Options, section="data"):
    """The answers that a generator learns."""

    buckets: int = between(1)  # lengths to which batches are padded
    answer_dropout: float = between(0, 1)  # share of attributes left out at random


@dataclass(frozen=True)
class AnswerBatches:
    """The batches of a run, a pure function of (seed, step); see stream.Batches.

    Each epoch shows every listing once, in another order; a rendered catalogue renders it anew
    every time. Images are neither cropped nor mirrored: the answer might not be true of them.

    Rows of similar length make up a batch, which is padded to the first of `lengths` that holds it:
    the rows of WINDOW steps are sorted by length and cut into batches, and these are shuffled. Each
    process computes the lengths of all rows from their texts, and opens the images of its own rows.
    """

    catalog: Catalog
    listings: np.ndarray  # int64, the listings to learn from
    processor: Processor
    batch: int  # rows of a step, of all processes
    micro_batches: int  # A
    rows: np.ndarray  # int[C], this process's places in each micro-batch
    dropout: float  # share of attributes left out of answers, at random
    buckets: int  # padded lengths at most
    seed: int
    steps: int
    _window: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return f"AnswerBatches({self.catalog.fingerprint}, seed={self.seed}, steps={self.steps})"

    def __getitem__(self, step: int) -> Batch:
        """The processor's arrays as [A, C, ...], and `listing` int32[A, C], each row's index."""
        examples, length = self._of_step(step)
        examples = examples.reshape(self.micro_batches, -1)[:, self.rows]
        rows = [self._row(int(example), "image+text") for example in examples.flat]
        arrays = self.processor(rows, [(length, self.processor.max_patches)])
        arrays["listing"] = np.array([self._listing(int(i)) for i in examples.flat], np.int32)
        return {name: x.reshape(*examples.shape, *x.shape[1:]) for name, x in arrays.items()}

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The S to which batches are padded, ascending; the last holds any row.

        They are chosen to pad a sample of the run's rows the least.
        """
        longest = self.processor.max_tokens + self.processor.max_answer
        if self.buckets == 1:
            return (longest,)
        sampled = np.array([self._length(example) for example in range(SAMPLED)])
        return padded_lengths(sampled, self.buckets, longest)

    def _of_step(self, step: int) -> tuple[np.ndarray, int]:
        """The numbers of a step's examples, of all processes, and the S of its batch."""
        if len(self.lengths) == 1:
            return step * self.batch + np.arange(self.batch), self.lengths[0]
        window, position = divmod(step, WINDOW)
        if window not in self._window:
            self._window.clear()
            examples = (window * WINDOW * self.batch) + np.arange(WINDOW * self.batch)
            lengths = np.array([self._length(int(example)) for example in examples])
            order = np.argsort(lengths, kind="stable").reshape(WINDOW, self.batch)
            order = np.random.default_rng((self.seed, 1, window)).permutation(order)
            self._window[window] = examples[order], lengths[order].max(1)
        examples, longest = self._window[window]
        return examples[position], next(s for s in self.lengths if s >= longest[position])

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        return grain.MapDataset.range(len(self.listings)).seed(self.seed).shuffle().repeat()

    def _listing(self, example: int) -> int:
        return int(self.listings[self._order[example]])

    def _row(self, example: int, view: str) -> Row:
        rng = np.random.default_rng((self.seed, example))
        draw = 1 + int(rng.integers(2**31 - 1))
        return question_and_answer(
            *(self.catalog, self._listing(example), self.processor, draw),
            left_out=lambda: rng.random() < self.dropout,
            view=view,
        )

    def _length(self, example: int) -> int:
        n_images = self.catalog.listing(self._listing(example)).n_images
        return self.processor.most_tokens(self._row(example, "text"), n_images)


def padded_lengths(lengths: np.ndarray, most: int, longest: int) -> tuple[int, ...]:
    """At most `most` lengths to pad to, ascending, the last `longest`; multiples of ROUNDED.

    lengths: int[N], of a sample. Starts from all multiples and removes one after another, each time
    the one whose removal adds the fewest tokens of padding.
    """
    kept = np.append(np.arange(ROUNDED, longest, ROUNDED), longest)
    rows = np.bincount(np.searchsorted(kept, lengths), minlength=len(kept))
    while len(kept) > most:
        cheapest = np.argmin(rows[:-1] * np.diff(kept))
        rows[cheapest + 1] += rows[cheapest]
        kept, rows = np.delete(kept, cheapest), np.delete(rows, cheapest)
    return tuple(kept.tolist())
