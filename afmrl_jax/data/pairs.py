"""Which listings make up a batch: a pure function of (seed, step).

Axes: B pairs of a global batch · V views of a pair: the query, its target, then mined negatives ·
A micro-batches · C pairs of a micro-batch (this process's) · P products · k neighbours · T term
slots.
"""

from dataclasses import dataclass

import grain
import numpy as np

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.catalog.groups import listings_by_product
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.teachers import Teachers
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import Mixture
from afmrl_jax.core.options import Options, among, between
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.stream import Batch
from afmrl_jax.data.views import TrainingViews, listing_text

# The views of a pair of one listing, where its parts say them.
OWN_VIEWS = {"modalities": ["image", "text"], "photo": ["image+text", "text"]}


@dataclass(frozen=True)
class Composition(Options, section="data"):
    """The products of a batch."""

    lookalike_share: float = between(0, 1)  # share of the pairs in groups of look-alikes
    lookalike_group: int = between(2)  # products of a group
    hard_negatives: int = between(0)  # mined negatives of a query
    neighbours: int = between(1)  # look-alikes kept of each product
    agreeing_neighbours: str = among("keep", "drop")  # those with all the same attributes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hard_negatives > self.neighbours:
            raise UserError(
                f"data.hard_negatives is {self.hard_negatives}, but data.neighbours keeps "
                f"{self.neighbours}: raise data.neighbours"
            )

    @property
    def needs_look_alikes(self) -> bool:
        return bool(self.lookalike_share or self.hard_negatives)


class PairSampler:
    """Draws the listings of each step's global batch from one split of a catalogue.

    Each epoch shuffles the products anew, and a batch takes the next products of that order. With
    groups of look-alikes its first products lead groups, and their look-alikes replace its last
    products. No product is the query of a batch twice. A product's only listing is paired with
    itself.
    """

    def __init__(
        self,
        catalog: Catalog,
        split: str,
        batch: int,
        composition: Composition,
        seed: int,
        neighbours: np.ndarray | None,
    ):
        """batch: pairs of a global batch. neighbours: int32[P, k] of `look_alikes`; None where the
        composition needs none. Raises UserError for a batch larger than the number of products."""
        self._listings, self._starts = listings_by_product(catalog, split)
        self._batch, self._composition = batch, composition
        self._seed, self._neighbours = seed, neighbours
        products = len(self._starts) - 1
        if not products:
            raise UserError(f"{catalog.name} has no listings in its {split} split to train on")
        if batch > products:
            raise UserError(
                f"a batch of {batch} pairs needs as many products, but the training "
                f"split of {catalog.name} has {products}: set batch to {products} or less"
            )
        self._order = grain.MapDataset.range(products).seed(seed).shuffle().repeat()

    def products(self, step: int) -> np.ndarray:
        """int64[B]: the products of a batch, all different; a leader's look-alikes follow it."""
        batch, c = self._batch, self._composition
        order = [int(self._order[step * batch + slot]) for slot in range(batch)]
        waiting = iter(order)
        chosen: dict[int, None] = {}  # an ordered set
        grouped = round(c.lookalike_share * batch)
        for leader in waiting if grouped else ():
            chosen[leader] = None
            room = min(c.lookalike_group - 1, batch - len(chosen))
            fresh = (int(n) for n in self._neighbours[leader] if n >= 0 and int(n) not in chosen)
            chosen.update(dict.fromkeys(n for _, n in zip(range(room), fresh)))
            if len(chosen) >= grouped:
                break
        for product in waiting:
            if len(chosen) == batch:
                break
            chosen[product] = None
        spare = iter(range(len(self._starts) - 1))
        while len(chosen) < batch:  # an epoch's end, where the order repeats a product
            chosen[next(spare)] = None
        return np.fromiter(chosen, np.int64)

    def draw(self, step: int) -> np.ndarray:
        """int64[B, V] listing indices: the query, its target, then `hard_negatives` listings."""
        rng = np.random.default_rng((self._seed, step, 0))
        products = self.products(step)
        listings = np.empty((len(products), 2 + self._composition.hard_negatives), np.int64)
        for row, product in enumerate(products):
            listings[row, :2] = self._two_listings(product, rng)
            for column in range(self._composition.hard_negatives):
                negative = self._neighbours[product, column]
                if negative < 0:  # too few look-alikes: any other product
                    negative = (product + 1 + rng.integers(len(self._starts) - 2)) % (
                        len(self._starts) - 1
                    )
                listings[row, 2 + column] = rng.choice(self._listings_of(negative))
        return listings

    def _listings_of(self, product: int) -> np.ndarray:
        return self._listings[self._starts[product] : self._starts[product + 1]]

    def _two_listings(self, product: int, rng: np.random.Generator) -> np.ndarray:
        listings = self._listings_of(product)
        if len(listings) == 1:
            return listings[[0, 0]]
        first = rng.integers(len(listings))
        second = (first + 1 + rng.integers(len(listings) - 1)) % len(listings)
        return listings[[first, second]]


@dataclass(frozen=True)
class PairBatches:
    """The batches of a run, a pure function of (seed, step); see stream.Batches."""

    views: TrainingViews
    sampler: PairSampler
    processor: Processor
    statistics: CorpusStatistics
    query_views: Mixture
    target_views: Mixture
    parts: Mixture  # of pairs of one listing; one without photo or text takes the last
    one_rendering: bool  # whether both sides of a pair of one listing show one rendering of it
    truth: np.ndarray  # int32[N], each listing's product, though the catalogue may not know it
    max_terms: int
    micro_batches: int
    rows: np.ndarray  # int[C], this process's places in each micro-batch
    seed: int
    steps: int
    teachers: Teachers | None = None  # whose vectors of the listings join the batch

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # Grain compares it when it restores a stream
        fingerprint = self.views.catalog.fingerprint
        taught = f", teachers={self.teachers.fingerprint}" if self.teachers else ""
        return f"PairBatches({fingerprint}, seed={self.seed}, steps={self.steps}{taught})"

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step: the processor's arrays as [A, C, V, ...]; int32[A, C, V] of the
        listings: `listing`, their indices, `product`, their products as far as the catalogue knows
        them, and `true_product`, for statistics; and BM25's `terms`, `query_weights` and
        `document_weights`, [A, C, V, T]. With teachers also `teacher` and `teacher_weight`.
        """
        catalog, listings = self.views.catalog, self.sampler.draw(step)
        examples = np.arange(len(listings)).reshape(self.micro_batches, -1)[:, self.rows]
        rows, attributes = [], []
        for example in examples.flat:
            rows += self._rows(step, int(example), listings[example])
            attributes += [catalog.listing(int(i)).attributes for i in listings[example]]
        drawn = listings[examples]
        flat = self.processor(rows) | self.statistics.encode(attributes, self.max_terms)
        batch = {k: v.reshape(*drawn.shape, *v.shape[1:]) for k, v in flat.items()}
        batch["listing"] = drawn.astype(np.int32)
        batch["product"] = catalog.products[drawn]
        batch["true_product"] = self.truth[drawn]
        return batch | self.teachers[drawn] if self.teachers else batch

    def _rows(self, step: int, example: int, listings: np.ndarray) -> list[Row]:
        """One example's views: query, target, negatives, each rendered and cropped anew."""
        rng = np.random.default_rng((self.seed, step, 1, example))
        views, shares = self.target_views
        chosen = [str(rng.choice(views, p=shares)) for _ in listings]
        views, shares = self.query_views
        chosen[0] = str(rng.choice(views, p=shares))
        draws = 1 + rng.integers(2**31 - 1, size=len(listings))
        parts, rows = "", []
        if listings[0] == listings[1]:  # one listing stands on both sides
            parts = self._parts(int(listings[0]), rng)
            if parts in OWN_VIEWS:
                views = OWN_VIEWS[parts]
                chosen[:2] = views if rng.random() < 0.5 else views[::-1]
            if self.one_rendering:
                draws[1] = draws[0]
            if parts in ("words", "photo"):
                rows = self.views.apart(int(listings[0]), chosen[:2], rng, draw=int(draws[0]))
        for column in range(len(rows), len(listings)):
            listing, draw = int(listings[column]), int(draws[column])
            shorten = parts == "halves" and column < 2
            rows.append(self.views.row(listing, chosen[column], rng, draw=draw, shorten=shorten))
        return rows

    def _parts(self, listing: int, rng: np.random.Generator) -> str:
        """What the sides of a pair of this one listing show."""
        parts, shares = self.parts
        shown = self.views.catalog.listing(listing)
        if not shown.n_images or not listing_text(shown):
            return parts[-1]
        return str(rng.choice(parts, p=shares))
