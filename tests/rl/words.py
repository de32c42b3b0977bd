"""A catalogue small enough to work out by hand: a text's vector counts five words."""

from dataclasses import dataclass

import numpy as np

from afmrl_jax.catalog.listings import Listing
from afmrl_jax.data.processor import Shown
from afmrl_jax.rl.gallery import open_gallery
from afmrl_jax.rl.rollout import Query, QueryEmbedder

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
    """Stands for the encoder's processor and for the encoder: rows to unit vectors."""

    max_images = max_tokens = 1

    def shown(self, row):
        return Shown(row.text, len(row.attributes), self.max_tokens)

    def __call__(self, rows):
        counts = [[row.text.split().count(word) for word in WORDS] for row in rows]
        vectors = np.array(counts, np.float32) + 1e-3
        return {"vectors": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}


CATALOG = Words()
EMBEDDER = QueryEmbedder(lambda rows: rows["vectors"], Counting(), CATALOG, 3, np.arange(3))


def gallery_in(
    folder, embed=lambda listings: EMBEDDER([Query(int(i)) for i in listings])[0], **how
):
    listings = np.arange(len(CATALOG))
    always = {"version": "1", "agreed": bool, "write": True}
    return open_gallery(folder, CATALOG, listings, embed, **always, **how)
