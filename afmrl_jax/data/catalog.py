"""Catalogues: the listings that everything else reads.

Axes: N listings · P products.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Listing:
    """One offer of a product. Listings with the same product_id are the identical product."""

    listing_id: str
    product_id: str
    title: str
    description: str
    category: str
    attributes: dict[str, str]
    n_images: int
    split: str | None  # as the source says it ("val" read as "validation"); None: by the split rule


class Catalog(Protocol):
    """What every catalogue can do, real or rendered. Picklable, and used from worker processes."""

    name: str
    fingerprint: str  # hex; changes when the content does
    products: np.ndarray  # int32[N]: each listing's product as a dense code 0..P-1

    def __len__(self) -> int: ...

    def listing(self, index: int, draw: int = 0) -> Listing:
        """The listing's text. draw > 0 asks a rendered catalogue for a fresh rendering."""

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image | None:
        """The listing's image number `which`, RGB; None where a bad image is skipped."""

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split ("train", "validation", "test", "all"), ascending."""


def split_name(split: str) -> str:
    """The split's name as catalogues keep it: "val" is "validation"."""
    return "validation" if split == "val" else split


def split_of_product(product_id: str) -> str:
    """The split of a product whose catalogue names none: 1 in 20 is validation, the rest train."""
    digest = hashlib.sha256(product_id.encode()).hexdigest()
    return "validation" if int(digest, 16) % 20 == 0 else "train"
