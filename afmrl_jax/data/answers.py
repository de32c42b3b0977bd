"""The batches that a generator learns from: listings as questions; their attributes, some of them,
or their titles as answers.

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
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import parse_mixture
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.options import Options, between
from afmrl_jax.data.fitting import fitting
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.stream import Batch
from afmrl_jax.data.tokenizer import encode_text
from afmrl_jax.data.views import (
    SEPARATOR,
    VIEWS,
    attribute_pairs,
    evaluation_row,
    listing_text,
)

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
    told: Callable[[dict[str, str]], dict[str, str]] = dict,
    view: str = "image+text",
) -> Row:
    """The listing as the question, its `learnable` attributes as the answer.

    processor: with room for answers. told: chooses among the attributes, normalised, and orders
    them; the first one stays where it chooses none. view: without "image" it opens no image.
    """
    attributes = normalise(catalog.listing(index, draw).attributes)
    chosen = told(attributes) or dict(list(attributes.items())[:1])
    question = evaluation_row(catalog, index, processor.max_images, draw, view=view)
    return dataclasses.replace(question, answer=learnable(chosen, processor).answer)


def photo_and_title(
    catalog: Catalog, index: int, processor: Processor, draw: int = 0, view: str = "image"
) -> Row:
    """The listing's photos as the question, its title as the answer; a title that is too long loses
    its last words. processor, view: as in `question_and_answer`."""
    room = processor.max_answer - 1
    words = catalog.listing(index, draw).title.split()[:room]
    while words and len(encode_text(processor.tokenizer, " ".join(words))) > room:
        words.pop()
    question = evaluation_row(catalog, index, processor.max_images, draw, view=view)
    return dataclasses.replace(question, answer=" ".join(words) or None)


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
    """The questions and answers that a generator learns."""

    buckets: int = between(1)  # lengths to which batches are padded
    question_views: str  # views of the listings asked about, and their shares
    answer_dropout: float = between(0, 1)  # share of attributes left out at random
    subset_share: float = between(0, 1)  # of answers: some attributes in random order
    subset_instruction: str  # the system's turn that asks for them
    caption_share: float = between(0, 1)  # of answers: the title of the photos
    caption_instruction: str  # the system's turn that asks for it

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_mixture(self.question_views, self.name_of("question_views"), VIEWS)
        if self.subset_share + self.caption_share > 1:
            raise UserError(
                f"data.subset_share={self.subset_share:g} and data.caption_share="
                f"{self.caption_share:g} are more than all answers: lower one"
            )

    @property
    def instructions(self) -> dict[str, str]:
        """What asks for each other kind of answer that there is than all attributes."""
        shares = {"subset": self.subset_share, "caption": self.caption_share}
        words = {"subset": self.subset_instruction, "caption": self.caption_instruction}
        return {kind: words[kind] for kind, share in shares.items() if share}


class _Asked(NamedTuple):
    """What a run asks about a listing."""

    listing: int
    kind: str  # attributes | subset | caption
    view: str  # the parts that are shown, "" for a listing without any
    images: int  # photos that are shown, as far as they fit


@dataclass(frozen=True)
class AnswerBatches:
    """The batches of a run, a pure function of (seed, step); see stream.Batches.

    Each epoch shows every listing once, in another order; a rendered catalogue renders it anew
    every time. Images are neither cropped nor mirrored: the answer might not be true of them.
    What is asked is drawn for each: all attributes, some of them, of any share, in random order, or
    the title of the photos alone.

    Rows of similar length make up a batch, which is padded to the first of `lengths` that holds it:
    the rows of WINDOW steps are sorted by length and cut into batches, and these are shuffled. Each
    process computes the lengths of all rows from their texts, and opens the images of its own rows.
    """

    catalog: Catalog
    listings: np.ndarray  # int64, the listings to learn from
    processors: Mapping[str, Processor]  # of "attributes", and of each of `options.instructions`
    batch: int  # rows of a step, of all processes
    micro_batches: int  # A
    rows: np.ndarray  # int[C], this process's places in each micro-batch
    options: AnswerOptions
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
        arrays = self._arrays(examples.ravel().tolist(), length)
        return {name: x.reshape(*examples.shape, *x.shape[1:]) for name, x in arrays.items()}

    def _arrays(self, examples: list[int], length: int) -> Batch:
        """Rows of the examples, each with the instruction of its kind, and `listing`: [N, ...]."""
        asked = [self._asked(example) for example in examples]
        kinds = np.array([one.kind for one in asked])
        arrays: Batch = {"listing": np.array([one.listing for one in asked], np.int32)}
        for kind, processor in self.processors.items():
            places = np.flatnonzero(kinds == kind)
            rows = [self._row(examples[place], asked[place]) for place in places]
            for name, part in processor(rows, [(length, processor.max_patches)]).items():
                whole = arrays.setdefault(
                    name, np.empty((len(examples), *part.shape[1:]), part.dtype)
                )
                whole[places] = part
        return arrays

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The S to which batches are padded, ascending; the last holds any row.

        They are chosen to pad a sample of the run's rows the least.
        """
        processor = self.processors["attributes"]
        longest = processor.max_tokens + processor.max_answer
        if self.options.buckets == 1:
            return (longest,)
        sampled = np.array([self._length(example) for example in range(SAMPLED)])
        return padded_lengths(sampled, self.options.buckets, longest)

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

    @functools.cached_property
    def _views(self) -> tuple[tuple[str, ...], np.ndarray]:
        return parse_mixture(self.options.question_views, "data.question_views", VIEWS)

    def _asked(self, example: int) -> _Asked:
        """A listing without the part that the drawn view names shows the part that it has."""
        rng = np.random.default_rng((self.seed, example, 1))
        kind, view = rng.random(), str(rng.choice(self._views[0], p=self._views[1]))
        index = int(self.listings[self._order[example]])
        listing = self.catalog.listing(index)
        has = {"image": listing.n_images > 0, "text": bool(listing_text(listing))}
        if kind < self.options.caption_share and has["image"] and listing.title:
            return _Asked(index, "caption", "image", listing.n_images)
        parts = [part for part in view.split("+") if has[part]]
        view = "+".join(parts or [part for part in has if has[part]])
        is_subset = 0 <= kind - self.options.caption_share < self.options.subset_share
        images = listing.n_images if "image" in view else 0
        return _Asked(index, "subset" if is_subset else "attributes", view, images)

    def _row(self, example: int, asked: _Asked) -> Row:
        rng = np.random.default_rng((self.seed, example))
        draw = 1 + int(rng.integers(2**31 - 1))
        processor = self.processors[asked.kind]
        listing = (self.catalog, asked.listing, processor, draw)

        def most(attributes: dict[str, str]) -> dict[str, str]:
            dropout = self.options.answer_dropout
            return {name: x for name, x in attributes.items() if rng.random() >= dropout}

        def some(attributes: dict[str, str]) -> dict[str, str]:
            order = rng.permutation(list(attributes.items())).tolist()
            return dict(order[: 1 + rng.integers(len(order))])

        if asked.kind == "caption":
            return photo_and_title(*listing, asked.view)
        told = some if asked.kind == "subset" else most
        return question_and_answer(*listing, told, asked.view)

    def _length(self, example: int) -> int:
        asked = self._asked(example)
        # Photos are not opened to be measured.
        read = asked._replace(view="text" if "text" in asked.view else "")
        return self.processors[asked.kind].most_tokens(self._row(example, read), asked.images)


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
