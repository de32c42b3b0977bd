"""BM25's statistics of a split's products, and each product's look-alikes.

They are read from the catalogue once and kept in the cache under its fingerprint: a catalogue of
millions takes minutes to read listing by listing.

Axes: P products · k neighbours.
"""

import hashlib
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from afmrl_jax.attributes import comparison
from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.attributes.comparison import is_empty
from afmrl_jax.catalog.groups import listings_by_product
from afmrl_jax.catalog.listings import Catalog, Listing, Overlay
from afmrl_jax.core.files import write_atomically
from afmrl_jax.data import mining

log = logging.getLogger(__name__)

EXAMPLES = 5_000  # listings, where a sample of a split is enough
LOGGED = 10  # names and values that a message lists with their counts


class TrainedOn(Overlay):
    """A catalogue whose training split is cut down to some of its listings."""

    def __init__(self, catalog: Catalog, listings: np.ndarray):
        """listings: int64, the whole of the new training split; other splits stay as they are."""
        key = catalog.fingerprint.encode() + listings.tobytes()
        super().__init__(catalog, hashlib.blake2b(key, digest_size=16).hexdigest())
        self._listings = listings

    def indices(self, split: str) -> np.ndarray:
        return self._listings if split == "train" else super().indices(split)


def product_attributes(catalog: Catalog, split: str) -> list[dict[str, str]]:
    """The attributes of each product of a split: those of its listings together. Where two listings
    differ the last value that is not empty counts. Products in the order of `listings_by_product`.
    """
    listings, starts = listings_by_product(catalog, split)
    products = []
    for start, end in itertools.pairwise(starts):
        merged: dict[str, str] = {}
        for listing in listings[start:end]:
            for name, value in catalog.listing(int(listing)).attributes.items():
                if name not in merged or not is_empty(value):
                    merged[name] = value
        products.append(merged)
    return products


def example_listings(catalog: Catalog, split: str) -> list[Listing]:
    """EXAMPLES listings of a split, the same at every call; all where it has fewer."""
    listings = np.random.default_rng(0).permutation(catalog.indices(split))[:EXAMPLES]
    return [catalog.listing(int(index)) for index in listings]


def attributes_by_category(listings: list[Listing]) -> dict[str, list[dict[str, str]]]:
    """Category -> the attributes of each of its listings."""
    by_category: dict[str, list[dict[str, str]]] = {}
    for listing in listings:
        by_category.setdefault(listing.category, []).append(dict(listing.attributes))
    return by_category


def corpus_statistics(catalog: Catalog, split: str, cache: Path) -> CorpusStatistics:
    """BM25's statistics over a split, a document a product; logs which attributes they ignore."""
    path = cache / f"statistics-{comparison.VERSION}-{catalog.fingerprint}-{split}.json"
    statistics = _cached_statistics(path)
    if statistics is None:
        statistics = CorpusStatistics.from_documents(product_attributes(catalog, split))
        write_atomically(path, statistics.to_json())
    if statistics.identifiers:
        log.warning(
            "%s: attributes that differ in nearly every product tell nothing of it, and do not "
            "count where attributes are compared: %s",
            *(catalog.name, _counts(statistics.identifiers, "of %d products")),
        )
    if statistics.empty_values:
        log.info(
            "%s: %d values of its products' attributes say nothing and count as missing: %s",
            *(catalog.name, sum(statistics.empty_values.values())),
            _counts(statistics.empty_values, "%d times"),
        )
    return statistics


def _cached_statistics(path: Path) -> CorpusStatistics | None:
    """The statistics in a file; None where there is none, or another version wrote it."""
    try:
        return CorpusStatistics.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _counts(counts: Mapping[str, int], unit: str) -> str:
    """The first LOGGED names, each with its count."""
    shown = [f"{name} ({unit % count})" for name, count in itertools.islice(counts.items(), LOGGED)]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def look_alikes(
    catalog: Catalog,
    split: str,
    k: int,
    statistics: CorpusStatistics,
    cache: Path,
    differing: bool = False,
) -> np.ndarray:
    """int32[P, k]: the products with the most similar attributes to each of a split's products, as
    numbers in the order of `listings_by_product`; -1 pads. differing: whether all of them differ in
    attributes, from the product and from each other."""
    version = f"{mining.VERSION}-{comparison.VERSION}"
    kept = f"{k}-differing" if differing else f"{k}"
    path = cache / f"look-alikes-{version}-{catalog.fingerprint}-{split}-{kept}.npy"
    if path.exists():
        return np.load(path)
    log.info("looking for the look-alikes of each product")
    attributes = product_attributes(catalog, split)
    if differing:
        neighbours = mining.mine_differing(attributes, k, statistics)
    else:
        neighbours, _ = mining.mine_neighbours(attributes, k, statistics)
    write_atomically(path, neighbours)
    return neighbours
