"""A catalogue small enough to work out by hand: a text's vector counts five words."""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from by_hand import loaded_encoder

from afmrl_jax.catalog.listings import Overlay, open_catalog
from afmrl_jax.data.processor import Processor, RowSizes
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset
from afmrl_jax.rl.credit import PairCredit
from afmrl_jax.rl.gallery import open_gallery

WORDS = ("red", "green", "lamp", "mug", "hat")
TITLES = ("mug", "red mug", "green mug", "red lamp", "hat")
PRODUCTS = (0, 0, 1, 2, 3)
FOLDER = tempfile.TemporaryDirectory(prefix="words-")  # of the catalogues; it goes with the process


class WholeSplits(Overlay):
    """A catalogue with all listings in each split: one that trains and one that judges."""

    def indices(self, split):
        return super().indices("all")


def catalogue_of(titles):
    """Five red listings with these titles, the first two of one product."""
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    lines = [
        {
            "listing_id": f"listing-{index}",
            "product_id": f"product-{product}",
            "title": title,
            "attributes": {"color": "red"},
        }
        for index, (title, product) in enumerate(zip(titles, PRODUCTS))
    ]
    (folder / "products.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    catalog = open_catalog(folder, cache_dir=folder / "cache")
    return WholeSplits(catalog, catalog.fingerprint)


# Each of the words is one token, behind a blank and at the beginning of a line.
TOKENIZER = train_tokenizer([*WORDS, " " + " ".join(WORDS)] * 2, 400)
CONFIG = preset("tiny").replace(
    vocab_size=TOKENIZER.get_vocab_size(), **special_token_ids(TOKENIZER)
)
TOKENS = [TOKENIZER.decode([token]).strip() for token in range(CONFIG.vocab_size)]
COUNTED = np.array([[token == word for word in WORDS] for token in TOKENS], np.float32)


def unit_counts(rows):
    vectors = jnp.asarray(COUNTED)[rows["tokens"]].sum(axis=1) + 1e-3
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)


CATALOG = catalogue_of(TITLES)
BY_ANSWER = PairCredit(credit="answer", credit_ridge=1.0, credit_checks=0)
SIZES = RowSizes(max_tokens=48, max_patches=4, min_pixels=256, max_pixels=256)
ENCODER = loaded_encoder(Processor(TOKENIZER, CONFIG, SIZES), unit_counts, 3)


def plain(listings):
    return ENCODER.embed_listings(CATALOG, listings).vectors


def gallery_in(folder, embed=plain, **how):
    return open_gallery(folder, "1", CATALOG, np.arange(len(CATALOG)), embed, **how)
