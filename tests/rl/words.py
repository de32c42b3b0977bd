"""A catalogue small enough to work out by hand: a text's vector counts five words."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from by_hand import loaded_encoder

from afmrl_jax.catalog.listings import Listing
from afmrl_jax.data.processor import Shown
from afmrl_jax.rl.gallery import open_gallery

WORDS = ("red", "green", "lamp", "mug", "hat")


@dataclass
class Words:
    """A catalogue of titles; every listing is in the training split."""

    titles: tuple[str, ...] = ("mug", "red mug", "green mug", "red lamp", "hat")
    products: np.ndarray = None
    fingerprint: str = "words"

    def __post_init__(self):
        self.products = np.array([0, 0, 1, 2, 3], np.int32)
        self.identities = np.arange(5)

    def __len__(self):
        return len(self.titles)

    def indices(self, split):
        return np.arange(len(self))

    def listing(self, index, draw=0):
        names = (f"listing-{index}", f"product-{self.products[index]}")
        return Listing(*names, self.titles[index], "", "", {"color": "red"}, 0, None)


class Counting:
    """In the place of a processor: rows to the counts of WORDS."""

    max_images = max_tokens = 1

    def shown(self, row):
        return Shown(row.text, len(row.attributes), self.max_tokens)

    def __call__(self, rows, buckets=()):
        counts = [[row.text.split().count(word) for word in WORDS] for row in rows]
        return {"counts": np.array(counts, np.float32)}


def unit_counts(rows):
    vectors = rows["counts"] + 1e-3
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)


CATALOG = Words()
ENCODER = loaded_encoder(Counting(), unit_counts, 3)


def plain(listings):
    return ENCODER.embed_listings(CATALOG, listings).vectors


def gallery_in(folder, embed=plain, **how):
    return open_gallery(folder, "1", CATALOG, np.arange(len(CATALOG)), embed, **how)
