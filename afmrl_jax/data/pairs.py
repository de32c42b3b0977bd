"""Which listings make up a batch: a pure function of (seed, step).

Axes: B pairs of a global batch · V views of a pair: the query, its target, then mined negatives ·
P products.
"""

from dataclasses import dataclass

import grain
import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.corpus import listings_by_product


@dataclass(frozen=True)
class Composition:
    """How a batch is put together."""

    batch: int  # pairs
    lookalike_share: float  # of the pairs that come in groups of look-alikes
    lookalike_group: int  # products a group
    hard_negatives: int  # mined negatives a query


class PairSampler:
    """Draws the listings of each step's global batch from one split of a catalogue.

    Leaders are taken from a shuffled order of the products, anew each epoch; look-alikes take the
    places of others in that order. No product is the query of a batch twice. A product with one
    listing is paired with itself.
    """

    def __init__(
        self,
        catalog: Catalog,
        split: str,
        composition: Composition,
        seed: int,
        neighbours: np.ndarray | None,
    ):
        """neighbours: int32[P, K] of `look_alikes`; None where the composition needs none.

        Raises UserError for a batch larger than the number of products, or shares out of range.
        """
        self._listings, self._starts = listings_by_product(catalog, split)
        self._composition, self._seed, self._neighbours = composition, seed, neighbours
        products = len(self._starts) - 1
        if not products:
            raise UserError(f"{catalog.name} has no listings in its {split} split to train on")
        if composition.batch > products:
            raise UserError(
                f"a batch of {composition.batch} pairs needs as many products, but the training "
                f"split of {catalog.name} has {products}: set batch to {products} or less"
            )
        if not 0 <= composition.lookalike_share <= 1:
            raise UserError(
                f"data.lookalike_share is {composition.lookalike_share}: give a share of 0 to 1"
            )
        if composition.lookalike_group < 2:
            raise UserError(
                f"data.lookalike_group is {composition.lookalike_group}: a group has 2 or more"
            )
        if neighbours is not None and composition.hard_negatives > neighbours.shape[1]:
            raise UserError(
                f"data.hard_negatives is {composition.hard_negatives}, but data.neighbours keeps "
                f"{neighbours.shape[1]}: raise data.neighbours"
            )
        self._order = grain.MapDataset.range(products).seed(seed).shuffle().repeat()

    def products(self, step: int) -> np.ndarray:
        """int64[B]: the products of a batch, all different; look-alikes of one leader in a row."""
        c = self._composition
        order = [int(self._order[step * c.batch + slot]) for slot in range(c.batch)]
        waiting = iter(order)
        chosen: dict[int, None] = {}  # an ordered set
        grouped = round(c.lookalike_share * c.batch)
        for leader in waiting if grouped else ():
            chosen[leader] = None
            room = min(c.lookalike_group - 1, c.batch - len(chosen))
            fresh = (int(n) for n in self._neighbours[leader] if n >= 0 and int(n) not in chosen)
            chosen.update(dict.fromkeys(n for _, n in zip(range(room), fresh)))
            if len(chosen) >= grouped:
                break
        for product in waiting:
            if len(chosen) == c.batch:
                break
            chosen[product] = None
        spare = iter(range(len(self._starts) - 1))
        while len(chosen) < c.batch:  # an epoch's end, where the order repeats a product
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
                if negative < 0:  # fewer look-alikes than asked: any other product
                    negative = (product + 1 + rng.integers(len(self._starts) - 2)) % (
                        len(self._starts) - 1
                    )
                own = slice(self._starts[negative], self._starts[negative + 1])
                listings[row, 2 + column] = rng.choice(self._listings[own])
        return listings

    def _two_listings(self, product: int, rng: np.random.Generator) -> np.ndarray:
        own = self._listings[self._starts[product] : self._starts[product + 1]]
        if len(own) == 1:
            return own[[0, 0]]
        first = rng.integers(len(own))
        second = (first + 1 + rng.integers(len(own) - 1)) % len(own)
        return own[[first, second]]
