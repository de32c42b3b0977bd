"""The training listings as a feed brings them: under which ids they come, and which of them have
attributes. Listings of other splits stay as they are.

Axes: N listings.
"""

import dataclasses
import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from afmrl_jax.catalog.groups import group_by_product
from afmrl_jax.catalog.listings import Catalog, Listing, Overlay
from afmrl_jax.core.options import Options, among, between

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed(Options, section="data"):
    """What is known of the training listings."""

    identity: str = among("product", "listing", "mixed")  # which listings are known to be the same
    unmerged_share: float = between(0, 1)  # mixed: share of the products under several ids
    ids_per_product: int = between(2)  # mixed: ids of each of them
    described_share: float = between(0, 1)  # share of the listings that have attributes

    def with_attributes(self, catalog: Catalog, seed: int) -> Catalog:
        """The catalogue with attributes of `described_share` of its training listings alone. A
        larger share holds the smaller one's."""
        if self.described_share == 1:
            return catalog
        return PartlyDescribed(catalog, self.described_share, seed)

    def with_ids(self, catalog: Catalog, seed: int) -> Catalog:
        """The catalogue with the ids of `identity` for products."""
        if self.identity == "product":
            return catalog
        known = KnownByIds(catalog, self, seed)
        listings = catalog.indices("train")
        counts = (len(np.unique(codes[listings])) for codes in (known.truth, known.products))
        log.info("%s: %d training products come under %d ids", catalog.name, *counts)
        return known


def true_products(catalog: Catalog) -> np.ndarray:
    """int32[N]: each listing's product, though a feed may have hidden it."""
    return catalog.truth if isinstance(catalog, KnownByIds) else catalog.products


class PartlyDescribed(Overlay):
    """A catalogue some of whose training listings have lost their attributes."""

    def __init__(self, catalog: Catalog, share: float, seed: int):
        super().__init__(catalog, _digest(catalog, "described", share, seed))
        listings = catalog.indices("train")
        order = np.random.default_rng((seed, 0)).permutation(listings)
        self._is_described = np.ones(len(catalog), bool)
        self._is_described[order[round(share * len(listings)) :]] = False

    def listing(self, index: int, draw: int = 0) -> Listing:
        listing = super().listing(index, draw)
        if self._is_described[index]:
            return listing
        return dataclasses.replace(listing, attributes={})


class KnownByIds(Overlay):
    """A catalogue whose training listings are the same product only where they share an id.

    products: the codes of the ids. truth: int32[N], the codes of the products.
    """

    def __init__(self, catalog: Catalog, feed: Feed, seed: int):
        choices: list[str | float] = [feed.identity]
        if feed.identity == "mixed":
            choices += [feed.unmerged_share, feed.ids_per_product, seed]
        super().__init__(catalog, _digest(catalog, *choices))
        self.truth = catalog.products
        numbers = np.zeros(len(catalog), np.int64)  # an id's among those of its product
        if feed.identity == "listing":
            listings = catalog.indices("train")
            numbers[listings] = np.arange(len(listings)) + 1
        else:
            listings, dealt = _dealt(catalog, feed, seed)
            numbers[listings] = dealt
        ids = self.truth.astype(np.int64) * (numbers.max(initial=0) + 1) + numbers
        _, self._first, codes = np.unique(ids, return_index=True, return_inverse=True)
        self._codes = codes.astype(np.int32)

    @property
    def products(self) -> np.ndarray:
        return self._codes

    @property
    def product_ids(self) -> pa.Array:
        """large_string[P], in the order of their codes: the listing_id of an id's first listing."""
        return self.listing_ids.take(pa.array(self._first))


def _dealt(catalog: Catalog, feed: Feed, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training listings of the unmerged products, int64, and the number of each one's id: a
    product's listings are dealt to its ids in turn, in an order of the seed."""
    rng = np.random.default_rng((seed, 1))
    listings, starts = group_by_product(catalog, rng.permutation(catalog.indices("train")))
    sizes = np.diff(starts)
    unmerged = np.zeros(len(sizes), bool)
    unmerged[rng.permutation(len(sizes))[: round(feed.unmerged_share * len(sizes))]] = True
    places = np.arange(len(listings)) - np.repeat(starts[:-1], sizes)
    is_dealt = np.repeat(unmerged, sizes)
    return listings[is_dealt], places[is_dealt] % feed.ids_per_product + 1


def _digest(catalog: Catalog, *choices: str | float) -> str:
    key = f"{catalog.fingerprint} {choices}"
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
