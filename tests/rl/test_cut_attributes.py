"""Queries with long titles, as an encoder reads them: a row's vector counts its tokens.

They are the words of `words`, with a tail of forty that all have: "mug" seeks "red mug".
"""

import numpy as np
import pytest
from ml_collections import ConfigDict
from words import Words

from afmrl_jax.configs.rar import get_config
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset
from afmrl_jax.programs import rar
from afmrl_jax.rl.environment import Environment, Laps
from afmrl_jax.rl.gallery import open_gallery
from afmrl_jax.rl.held_out import HeldOut, Said
from afmrl_jax.rl.judging import Judge
from afmrl_jax.rl.rewards import Reward
from afmrl_jax.rl.rollout import Query, QueryEmbedder
from afmrl_jax.rl.watch import WatchLimits

TAIL = " of fine make for home and garden" * 6
CATALOG = Words(tuple(f"one {title}{TAIL}" for title in Words.titles))
TOKENIZER = train_tokenizer([*CATALOG.titles, "color: red; color: green"] * 4, 400)
CONFIG = preset("tiny").replace(
    vocab_size=TOKENIZER.get_vocab_size(), **special_token_ids(TOKENIZER)
)
OPTIONS = Reward(kind="margin", k=1, gain=False, invalid=-0.1, length_cost=0.0)
LIMITS = WatchLimits.of(get_config())
CONFIGURATION = ConfigDict({"encoder": "runs/agcl"})


def embedder_of(max_tokens):
    processor = Processor(
        TOKENIZER, CONFIG, max_tokens=max_tokens, max_patches=4, min_pixels=256, max_pixels=256
    )

    def embed(rows):
        counts = [np.bincount(tokens, minlength=CONFIG.vocab_size) for tokens in rows["tokens"]]
        vectors = np.array(counts, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return QueryEmbedder(embed, processor, CATALOG, 3, np.arange(3))


def gallery_of(embedder, folder):
    return open_gallery(
        folder,
        CATALOG,
        np.arange(5),
        lambda listings: embedder([Query(int(i)) for i in listings]).vectors,
        version="1",
        agreed=bool,
        write=False,
    )


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    embedder = embedder_of(32)
    return embedder, gallery_of(embedder, tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def is_deaf(tmp_path_factory):
    """Rows of four words and an end."""
    embedder = embedder_of(5)
    return embedder, gallery_of(embedder, tmp_path_factory.mktemp("deaf"))


def metrics(embedder, gallery):
    environment = Environment(CATALOG, embedder, gallery, OPTIONS, 4, scale=False)
    texts = ["color: red", "color: green", "red", ""]
    found = environment.judge(np.array([0]), np.array([0]), texts, [True] * 4, np.arange(4), Laps())
    return found.rewards[0], found.metrics()


def test_answers_to_a_query_of_a_long_title_are_not_worth_the_same(reads):
    rewards, found = metrics(*reads)
    assert rewards[0] > rewards[1]
    assert found["attributes_cut"] == 0 and found["valid_zero_variance"] == 0


def test_answers_that_are_not_read_are_told(is_deaf):
    rewards, found = metrics(*is_deaf)
    assert rewards[0] == rewards[1]
    assert found["attributes_cut"] == 1 and found["valid_zero_variance"] == 1
    assert found["zero_variance"] == 0  # those in no format are worth less


def test_an_encoder_that_reads_no_attribute_is_refused_before_anything_compiles(reads, is_deaf):
    rar._check_attributes_are_read(CONFIGURATION, CATALOG, reads[0])
    with pytest.raises(UserError, match=r"5 of 5 texts lose attributes \(5 of them all\)") as error:
        rar._check_attributes_are_read(CONFIGURATION, CATALOG, is_deaf[0])
    needed = int(str(error.value).partition("--config.data.max_tokens=")[2].partition(",")[0])
    rar._check_attributes_are_read(CONFIGURATION, CATALOG, embedder_of(needed))


def test_a_generator_whose_answers_are_not_read_is_refused_before_it_trains(is_deaf, tmp_path):
    """Where the catalogue has no attributes only these tell."""
    embedder, gallery = is_deaf
    held_out = HeldOut(CATALOG, "test", np.arange(5), gallery, embedder, OPTIONS, 9)
    held_out.true = [{}] * len(held_out)
    said = [Said("color: red", lambda least: {"color": "red"})] * len(held_out)
    judge = Judge(tmp_path, {"test": held_out}, lambda trained, listings: said, LIMITS)
    with pytest.raises(UserError, match="test queries: 2 of 2 texts lose attributes"):
        judge.begin("begun")
    assert held_out.judge(said).answers["attributes_cut"] == 1
