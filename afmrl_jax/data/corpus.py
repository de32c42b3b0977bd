"""What training knows of its products' attributes: BM25's statistics, and who looks like whom.

Read from the catalogue once and kept in the cache under its fingerprint, since a catalogue of
millions takes minutes to read listing by listing.

Axes: P products · K neighbours.
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

EXAMPLES = 5_000  # listings that are read where some tell enough
TOLD = 10  # names and values that are told with their counts


class TrainedOn(Overlay):
    """A catalogue of whose training split only some listings are left."""

    def __init__(self, catalog: Catalog, listings: np.ndarray):
        """listings: int64, what is left of the training split; the other splits stay whole."""
        key = catalog.fingerprint.encode() + listings.tobytes()
        super().__init__(catalog, hashlib.blake2b(key, digest_size=16).hexdigest())
        self._listings = listings

    def indices(self, split: str) -> np.ndarray:
        return self._listings if split == "train" else super().indices(split)


def product_attributes(catalog: Catalog, split: str) -> list[dict[str, str]]:
    """The attributes of each product of a split, its listings' together; the last that says
    something says it where two differ. Products in the order of `listings_by_product`."""
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
    """EXAMPLES of a split, the same at every call; all where it has no more."""
    listings = np.random.default_rng(0).permutation(catalog.indices(split))[:EXAMPLES]
    return [catalog.listing(int(index)) for index in listings]


def attributes_by_category(listings: list[Listing]) -> dict[str, list[dict[str, str]]]:
    """Category -> the attributes of its listings."""
    found: dict[str, list[dict[str, str]]] = {}
    for listing in listings:
        found.setdefault(listing.category, []).append(dict(listing.attributes))
    return found


def corpus_statistics(catalog: Catalog, split: str, cache: Path) -> CorpusStatistics:
    """BM25's statistics over a split, a document a product; tells what they leave out."""
    path = cache / f"statistics-{comparison.VERSION}-{catalog.fingerprint}-{split}.json"
    if path.exists():
        statistics = CorpusStatistics.from_json(path.read_text(encoding="utf-8"))
    else:
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


def _counts(counted: Mapping[str, int], unit: str) -> str:
    """The first TOLD of them, each with its count."""
    shown = [f"{name} ({unit % count})" for name, count in itertools.islice(counted.items(), TOLD)]
    more = len(counted) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def look_alikes(
    catalog: Catalog, split: str, k: int, statistics: CorpusStatistics, cache: Path
) -> np.ndarray:
    """int32[P, K]: of each of a split's products those with the most similar attributes, as
    positions among them; -1 pads."""
    version = f"{mining.VERSION}-{statistics.version}"
    path = cache / f"look-alikes-{version}-{catalog.fingerprint}-{split}-{k}.npy"
    if path.exists():
        return np.load(path)
    log.info("looking for the look-alikes of each product")
    neighbours, _ = mining.mine_neighbours(product_attributes(catalog, split), k, statistics)
    write_atomically(path, neighbours)
    return neighbours
