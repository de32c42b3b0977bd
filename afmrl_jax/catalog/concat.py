"""Joins several catalogues into one.

Axes: N listings of all catalogues · P products of all catalogues.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from afmrl_jax.catalog.checking import describe_shared, shared_products
from afmrl_jax.catalog.identity import Content, identify_listings, keep_apart
from afmrl_jax.catalog.listings import Catalog, Listing
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.core.errors import UserError

log = logging.getLogger(__name__)


class ConcatCatalog:
    """A Catalog of several catalogues' listings, one catalogue after another.

    A listing that several catalogues hold (identity.py decides which listings are the same) belongs
    only to its split in the first of them, so that no listing is in a split twice or in two splits.
    """

    def __init__(self, catalogs: Sequence[Catalog], shared_ids: bool = True):
        """shared_ids: True if equal ids in two catalogues mean the same listing or product; False
        if each catalogue has its own numbering.

        Logs what is shared. Raises UserError if a listing has different products in two catalogues.
        """
        if not catalogs:
            raise ValueError("ConcatCatalog needs at least one catalogue")
        self._catalogs = tuple(catalogs)
        self._starts = np.cumsum([0, *map(len, catalogs)])
        self.name = "+".join(catalog.name for catalog in catalogs)
        mode = () if shared_ids else ("apart",)
        key = " ".join([*(catalog.fingerprint for catalog in catalogs), *mode])
        self.fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        identities = identify_listings(catalogs) if shared_ids else keep_apart(catalogs)
        self.products, self.identities = identities.products, identities.listings
        cure = "where each catalogue numbers its own, set data.shared_ids=False"
        if disputed := identities.disputed:
            raise UserError(
                f"{self.name}: {len(disputed):,} listings are of one product in one catalogue "
                f"and of another in the next (as {disputed[0]!r}): correct their product_id, "
                f"or, {cure}"
            )
        if report := identities.report():
            level = logging.WARNING if identities.apart else logging.INFO
            log.log(level, f"{self.name}: {report}; {cure}")
        self._warn_of_shared_products()

    def _warn_of_shared_products(self) -> None:
        """Warns of products that are in several catalogues and in two splits. Products in two
        splits of a single catalogue were reported when that catalogue was opened."""
        codes = [np.unique(part) for part in np.split(self.products, self._starts[1:-1])]
        in_several = np.bincount(np.concatenate(codes)) > 1
        listings = {}
        for split in SPLITS:
            indices = self.indices(split)
            listings[split] = indices[in_several[self.products[indices]]]
        if shared := shared_products(self.products, listings):
            log.warning(
                "%s: of the products that several of them have, %s",
                self.name,
                describe_shared(shared, lambda index: self.listing(index).product_id),
            )

    @property
    def listing_ids(self) -> pa.Array:
        """large_string[N]."""
        return pa.concat_arrays([catalog.listing_ids for catalog in self._catalogs])

    @property
    def product_ids(self) -> pa.Array:
        """large_string[P], in the order of their codes."""
        _, first = np.unique(self.products, return_index=True)
        ids = [self.listing(int(index)).product_id for index in first]
        return pa.array(ids, pa.large_string())

    def content(self, index: int) -> Content:
        catalog, index = self._find(index)
        return catalog.content(index)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Catalog, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"listing {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._catalogs[number], int(index - self._starts[number])

    def listing(self, index: int, draw: int = 0) -> Listing:
        catalog, index = self._find(index)
        return catalog.listing(index, draw)

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image | None:
        catalog, index = self._find(index)
        return catalog.image(index, which, draw)

    def indices(self, split: str) -> np.ndarray:
        parts = [catalog.indices(split) for catalog in self._catalogs]
        listings = np.concatenate([part + start for part, start in zip(parts, self._starts)])
        return listings[self.identities[listings] == listings]
