"""Queries with long titles, as an encoder reads them: a row's vector counts its tokens.

They are the words of `words`, with a tail of forty that all have: "mug" seeks "red mug".
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import loaded_encoder
from words import BY_ANSWER, TITLES, catalogue_of

from afmrl_jax.configs.rar import get_config
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor, RowSizes
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset
from afmrl_jax.retrieval.evaluator import RetrievalEvaluator
from afmrl_jax.rl.environment import Environment, Laps, check_attributes_are_read
from afmrl_jax.rl.gallery import open_gallery
from afmrl_jax.rl.held_out import Arms, HeldOut, QueryAnswer
from afmrl_jax.rl.rewards import Reward
from afmrl_jax.rl.watch import WatchLimits

TAIL = " of fine make for home and garden" * 6
LONG_TITLES = [f"one {title}{TAIL}" for title in TITLES]
CATALOG = catalogue_of(LONG_TITLES)
TOKENIZER = train_tokenizer([*LONG_TITLES, "color: red; color: green"] * 4, 400)
CONFIG = preset("tiny").replace(
    vocab_size=TOKENIZER.get_vocab_size(), **special_token_ids(TOKENIZER)
)
OPTIONS = Reward(kind="margin", function="", k=1, gain=False, invalid=-0.1, length_cost=0.0)
LIMITS = WatchLimits.of(get_config())


def encoder_of(max_tokens):
    sizes = RowSizes(max_tokens, max_patches=4, min_pixels=256, max_pixels=256)
    processor = Processor(TOKENIZER, CONFIG, sizes)

    def unit_counts(rows):
        vectors = jax.nn.one_hot(rows["tokens"], CONFIG.vocab_size).sum(axis=1)
        return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)

    return loaded_encoder(processor, unit_counts, 3)


def gallery_of(encoder, folder):
    def embed(listings):
        return encoder.embed_listings(CATALOG, listings).vectors

    return open_gallery(folder, "1", CATALOG, np.arange(5), embed)


@pytest.fixture(scope="module")
def reads(tmp_path_factory):
    encoder = encoder_of(32)
    return encoder, gallery_of(encoder, tmp_path_factory.mktemp("reads"))


@pytest.fixture(scope="module")
def is_deaf(tmp_path_factory):
    """Rows of four words and an end."""
    encoder = encoder_of(5)
    return encoder, gallery_of(encoder, tmp_path_factory.mktemp("deaf"))


def metrics(encoder, gallery):
    environment = Environment(CATALOG, encoder, gallery, OPTIONS, 4, False, BY_ANSWER)
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
    check_attributes_are_read(CATALOG, reads[0], "runs/agcl")
    with pytest.raises(UserError, match=r"5 of 5 texts lose attributes \(5 of them all\)") as error:
        check_attributes_are_read(CATALOG, is_deaf[0], "runs/agcl")
    needed = int(str(error.value).partition("--config.data.max_tokens=")[2].partition(",")[0])
    check_attributes_are_read(CATALOG, encoder_of(needed), "runs/agcl")


def test_a_generator_whose_answers_are_not_read_is_refused_before_it_trains(is_deaf, tmp_path):
    """Where the catalogue has no attributes only these tell."""
    encoder, gallery = is_deaf
    held_out = HeldOut(CATALOG, "test", gallery, encoder, OPTIONS, 9)
    held_out.true = [{}] * len(held_out)
    said = [QueryAnswer("color: red", lambda least: {"color": "red"})] * len(held_out)
    arms = Arms(tmp_path, {"test": held_out}, lambda trained, listings: said, LIMITS)
    with pytest.raises(UserError, match="test queries: 2 of 2 texts lose attributes"):
        arms.begin("begun")
    assert held_out.judge(said).answers["attributes_cut"] == 1


def test_rewards_tell_of_cut_attributes_as_evaluation_does_and_once(tmp_path, caplog):
    encoder = encoder_of(5)
    gallery = gallery_of(encoder, tmp_path)
    with caplog.at_level("WARNING", "afmrl_jax.data.views"):
        found = [metrics(encoder, gallery)[1]["attributes_cut"] for _ in range(2)]
        RetrievalEvaluator(encoder, CATALOG).vectors(
            "image+text", np.arange(2), lambda index: {"color": "red"}
        )
    assert found == [1, 1]  # of a step's metrics, each time
    rewarded, evaluated = (message.partition(": ") for message in caplog.messages)
    assert rewarded[0] == "queries with the answers' attributes" and evaluated[0] == "image+text"
    same = rewarded[2].partition(";")[0]  # before the tokens that would hold these listings' texts
    assert same == evaluated[2].partition(";")[0] and "2 of 2 texts lose attributes" in same
