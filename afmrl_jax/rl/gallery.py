"""The gallery that rewards search: vectors of the frozen encoder, computed once, and their index.

Axes: N gallery listings · n queries · E embedding · K ranks · R relevant listings, padded with -1.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.attributes import comparison
from afmrl_jax.catalog.groups import Members, askers, whole_products
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.processes import all_say
from afmrl_jax.retrieval.exact import ExactIndex
from afmrl_jax.retrieval.index import Index
from afmrl_jax.retrieval.indexes import EXACT_BELOW, load_index
from afmrl_jax.retrieval.scann import ScannIndex
from afmrl_jax.rl.rewards import Retrieved, Reward, measures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GallerySize(Options, section="reward"):
    """The gallery that rewards search."""

    gallery: int = between(2)  # listings, about so many of a larger split
    gallery_attributes: bool  # whether attributes are appended to their texts
    batch: int = between(1)  # rows embedded at once


class Gallery:
    """The listings that queries search; `open_gallery` makes one."""

    def __init__(self, catalog: Catalog, listings: np.ndarray, vectors: np.ndarray, index: Index):
        """listings: int64[N], indices of the catalogue. vectors: float32[N, E], of the listings.
        index: holds these vectors, with the listings as ids."""
        self._products, self.listings = catalog.products, listings
        self._vectors, self._index = vectors, index
        products = self._products[listings]
        self._by_product = Members(products)
        if (products == products[0]).all():
            raise UserError(
                f"all {len(listings)} listings of the gallery are one product, so that nothing can "
                "be found wrong: search more of a larger catalogue (reward.gallery)"
            )

    def __len__(self) -> int:
        return len(self.listings)

    @property
    def approximate(self) -> bool:
        return self._index.kind != ExactIndex.kind

    def find(
        self, vectors: np.ndarray, queries: np.ndarray, k: int, *, exact: bool = False
    ) -> Retrieved:
        """The results of queries: at least k ranks without the query's listing, one rank more that
        shows whether a tie goes on, and at least one wrong listing.

        vectors: float32[n, E]. queries: int64[n], the queries' listings. exact: compares with every
        vector, on the host, whatever the index: for a few queries.
        """
        rows = self._by_product.rows(self._products[queries])
        relevant = np.where(rows >= 0, self.listings[rows], -1)
        # One column at a time: never n x R x E at once.
        right = [np.einsum("ne,ne->n", vectors, self._vectors[column]) for column in rows.T]

        depth = k + 2
        if depth < rows.shape[1] + 2:  # by powers of two: each depth compiles its own search
            depth = 1 << (rows.shape[1] + 1).bit_length()
        search = self._compare if exact else self._index.search
        ids, scores = search(vectors, depth)
        self_ids = np.where((relevant == queries[:, None]).any(axis=1), queries, -1)
        return Retrieved(ids, scores, relevant, np.stack(right, 1).astype(np.float32), self_ids)

    def _compare(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = vectors @ self._vectors.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return self.listings[best], np.take_along_axis(scores, best, axis=1)

    def agreement(self, vectors: np.ndarray, queries: np.ndarray, options: Reward) -> float:
        """The share of queries whose measure is the same by the index as by an exact search."""

        def measure(exact: bool) -> np.ndarray:
            retrieved = self.find(vectors, queries, options.k, exact=exact)
            return measures(retrieved, options.k)[options.measure]

        return float(np.isclose(measure(False), measure(True), atol=1e-5).mean())


def open_gallery(
    folder: Path,
    version: str,
    catalog: Catalog,
    listings: np.ndarray,
    embed: Callable[[np.ndarray], np.ndarray],
    *,
    exact_below: int = EXACT_BELOW,
) -> Gallery:
    """The gallery of some listings, int64[N], read from the folder where it was written already;
    else the first process writes it there.

    version: changes with all that the vectors depend on; the files are named by it. embed: listings
    -> float32[N, E]; all processes call it together, unless all of them find the file.
    """
    path, first_process = folder / f"{version}.npy", jax.process_index() == 0
    if all_say(path.exists()):
        vectors = np.load(path, mmap_mode="r")
    else:
        log.info("embedding the %d listings of a gallery", len(listings))
        vectors = embed(listings)
        if first_process:
            write_atomically(path, vectors)
    if len(listings) < exact_below:
        index: Index = ExactIndex(version).build(vectors, listings)
    elif (saved := folder / f"{version}.index").exists():
        index = load_index(saved)
    else:
        log.info("building ScaNN's index of them")
        index = ScannIndex(version).build(vectors, listings)
        if first_process:
            index.save(saved)
    return Gallery(catalog, listings, vectors, index)


def gallery_of_split(
    options: GallerySize, folder: Path, catalog: Catalog, encoder: LoadedEncoder, split: str
) -> Gallery | None:
    """The gallery of a split's listings; None where nothing can be found, or in a split for judging
    nothing wrong can. folder: as `open_gallery` takes it."""
    listings = whole_products(catalog, catalog.indices(split), options.gallery)
    if not len(askers(catalog, split, listings)):
        return None
    if split != "train" and len(np.unique(catalog.products[listings])) == 1:
        return None
    attributes = options.gallery_attributes
    parts = [encoder.version, str(encoder.batch), catalog.fingerprint, str(attributes)]
    parts += [listings.tobytes().hex()]
    if attributes:  # as texts with attributes are since titles are cut before them; of attributes
        parts += ["kept whole", str(comparison.VERSION)]  # those stand there that say something

    def of(number: int) -> Mapping[str, str]:
        return catalog.listing(int(listings[number])).attributes

    def embed(listings: np.ndarray) -> np.ndarray:
        carried = of if attributes else None
        return encoder.embed_listings(
            catalog, listings, attributes=carried, where="the gallery"
        ).vectors

    version = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return open_gallery(folder, version, catalog, listings, embed)
