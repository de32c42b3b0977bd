"""The built-in catalogue: product photos and sellers' texts, rendered from a seed. The world is
another one, much larger, that has no product in common with it: what the base learned from.

Everything is a pure function of (seed, index, draw). Draw 0 is the listing itself; any other draw
is another seller's photo and text of the same product.

Axes: N listings · S pixels a side.
"""

import functools
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from PIL import Image

from afmrl_jax.catalog import builtin
from afmrl_jax.catalog.builtin.photo import photograph
from afmrl_jax.catalog.builtin.sellers import write
from afmrl_jax.catalog.builtin.vocabulary import CATEGORIES, Product, make_products
from afmrl_jax.catalog.identity import Content
from afmrl_jax.catalog.listings import Listing
from afmrl_jax.catalog.names import split_name
from afmrl_jax.core.files import write_atomically

__all__ = ["FAMILIES", "Shape", "SyntheticCatalog", "open_world"]
log = logging.getLogger(__name__)

# Families of look-alikes per split. A family has 4 to 6 products, a product 2 to 6 listings. With
# 660 families for training, a generator memorised the products instead of reading their listings.
FAMILIES: Mapping[str, int] = MappingProxyType({"train": 2000, "validation": 24, "test": 52})
# So many that an hour's training of the base sees hardly a listing twice.
WORLD_FAMILIES = MappingProxyType({"train": 12_000, "validation": 60, "test": 120})
WORLD_SEED = 1
# Of seed 0, at least as many families as any catalogue that models are judged on.
JUDGED_FAMILIES = MappingProxyType({"train": 2000, "validation": 200, "test": 600})


@dataclass(frozen=True)
class Shape:
    """What of its families a catalogue holds, and how often their products are listed."""

    family_products: int = 6  # products at most of a family
    # Bestsellers: training products with as many listings.
    bestseller_share: float = 0.0
    bestseller_listings: int = 6

    def of(self, products: Sequence[Product], seed: int) -> Iterator[Product]:
        """The products in this shape. A larger share of bestsellers holds the smaller one's."""
        rng = random.Random(f"{seed}/bestsellers")
        sizes: Counter[int] = Counter()
        for product in products:
            sells = rng.random()
            sizes[product.family] += 1
            if sizes[product.family] > self.family_products:
                continue
            if product.split == "train" and sells < self.bestseller_share:
                product = replace(product, n_listings=self.bestseller_listings)
            yield product


class SyntheticCatalog:
    """A catalogue (see catalog.Catalog) of rendered products.

    families: split ("train", "validation", "test") -> number of families; a split that is left
    out is empty. shape: of families and products. image_size: S. cache_dir: folder for the photos
    of validation and test, which are rendered once and read from disk afterwards; None renders them
    each time. judged: families of the catalogue of seed 0; a family that has one of their products
    in it is left out.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        families: Mapping[str, int] = FAMILIES,
        shape: Shape = Shape(),
        image_size: int = 64,
        cache_dir: str | Path | None = None,
        judged: Mapping[str, int] | None = None,
    ):
        self.name = "world" if judged else "built-in"
        self.seed = seed
        self.image_size = image_size
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        self._products = list(shape.of(make_products(seed, families), seed))
        if judged:
            self._products = _apart_from(make_products(0, judged), self._products)
        counts = [product.n_listings for product in self._products]
        self.products = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._splits = np.repeat(np.array([p.split for p in self._products]), counts)
        self._is_cached = self._splits != "train"  # bool[N]: photos that are rendered once
        self._cache_row = np.cumsum(self._is_cached) - 1  # int64[N]: rows of the cached photos
        key = f"{_renderer()} {seed} {sorted(families.items())} {image_size}"
        key += f" {shape}" if shape != Shape() else ""
        key += f" apart from {sorted(judged.items())}" if judged else ""
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._photos: np.ndarray | None = None

    @property
    def identities(self) -> np.ndarray:
        """int32[N]: no two listings of one catalogue have one id."""
        return np.arange(len(self), dtype=np.int32)

    @property
    def listing_ids(self) -> pa.Array:
        """large_string[N]."""
        ids = [self._listing_id(index) for index in range(len(self))]
        return pa.array(ids, pa.large_string())

    @property
    def product_ids(self) -> pa.Array:
        """large_string[P], in the order of their codes."""
        return pa.array([product.product_id for product in self._products], pa.large_string())

    def content(self, index: int) -> Content:
        """One hash for both text and photo: they are determined by the fingerprint and `index`."""
        digest = hashlib.blake2b(f"{self.fingerprint} {index}".encode(), digest_size=8).digest()
        rendered = int.from_bytes(digest)
        return Content(rendered, frozenset([rendered]))

    def _listing_id(self, index: int) -> str:
        return f"{self._products[self.products[index]].product_id}-{index:06d}"

    def __len__(self) -> int:
        return len(self.products)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_photos": None}

    def __repr__(self) -> str:
        return f"SyntheticCatalog(seed={self.seed}, fingerprint={self.fingerprint})"

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split ("train", "validation", "test", "all"), ascending."""
        split = split_name(split)
        if split == "all":
            return np.arange(len(self))
        return np.flatnonzero(self._splits == split)

    def listing(self, index: int, draw: int = 0) -> Listing:
        """The listing's text; its attributes are the product's, complete and true."""
        product = self._products[self.products[index]]
        title, description = write(
            self._random("text", index, draw), product.category, product.attributes
        )
        return Listing(
            listing_id=self._listing_id(index) + (f"-{draw}" if draw else ""),
            product_id=product.product_id,
            title=title,
            description=description,
            category=CATEGORIES[product.category].path,
            attributes=dict(product.attributes),
            n_images=1,
            split=product.split,
        )

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image:
        """The listing's photo, RGB, S x S."""
        if which:
            raise IndexError(f"listing {index} has one image, asked for number {which}")
        if draw == 0 and self._cache_dir is not None and self._is_cached[index]:
            if self._photos is None:
                self._photos = self._open_photos(self._cache_dir)
            return Image.fromarray(self._photos[self._cache_row[index]])
        return Image.fromarray(self._photograph(index, draw))

    def family(self, index: int) -> int:
        """Number of the family of look-alikes that the listing's product belongs to."""
        return self._products[self.products[index]].family

    def _random(self, stream: str, index: int, draw: int) -> random.Random:
        return random.Random(f"{self.seed}/{stream}/{index}/{draw}")

    def _photograph(self, index: int, draw: int) -> np.ndarray:
        product = self._products[self.products[index]]
        rng = self._random("photo", index, draw)
        return photograph(rng, product.category, product.attributes, self.image_size)

    def _open_photos(self, cache_dir: Path) -> np.ndarray:
        """The evaluation photos, memory-mapped: uint8[n, S, S, 3]; renders them the first time."""
        path = cache_dir / f"builtin-{self.fingerprint}.npy"
        if not path.exists():
            indices = np.flatnonzero(self._is_cached)
            log.info("rendering %d evaluation photos into %s", len(indices), path)
            write_atomically(path, np.stack([self._photograph(index, 0) for index in indices]))
        return np.load(path, mmap_mode="r")


def open_world(cache_dir: str | Path | None = None) -> SyntheticCatalog:
    """The world: products of another seed, none of which is in a catalogue that is judged."""
    return SyntheticCatalog(
        WORLD_SEED, families=WORLD_FAMILIES, cache_dir=cache_dir, judged=JUDGED_FAMILIES
    )


def _apart_from(judged: Iterable[Product], products: list[Product]) -> list[Product]:
    """The products of families without a judged product, under ids of their own.

    Two products are one where category and attributes are equal; brands do not count.
    """

    def essence(product: Product) -> tuple[str, ...]:
        values = (value for name, value in product.attributes.items() if name != "brand")
        return product.category, *values

    taken = {essence(product) for product in judged}
    left_out = {product.family for product in products if essence(product) in taken}
    return [
        replace(product, product_id=f"world-{product.product_id}")
        for product in products
        if product.family not in left_out
    ]


@functools.cache
def _renderer() -> str:
    """A digest of the renderer's source code: an edit of the code makes another catalogue."""
    folder = Path(builtin.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()
