"""Texts with attributes that are too long for their rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import loaded_encoder
from PIL import Image

from afmrl_jax.attributes.text import format_attributes
from afmrl_jax.catalog.listings import Listing
from afmrl_jax.data.processor import Processor, Row, RowSizes
from afmrl_jax.data.prompts import CHATML, ChatPrompt, PlainPrompt
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import (
    AttributeCuts,
    Augmentation,
    TrainingViews,
    catalogue_attributes,
    evaluation_row,
    listing_row,
    listing_text,
    sampled_cuts,
)
from afmrl_jax.models.presets import preset
from afmrl_jax.retrieval.evaluator import RetrievalEvaluator

WORDS = ["navy", "blue", "dress", "with", "long", "sleeves", "for", "summer", "in", "soft"]
TOKENIZER = train_tokenizer([" ".join(WORDS), "color: navy; sleeve: long\nDresses\n"] * 4, 400)
IDS = special_token_ids(TOKENIZER)
CONFIG = preset("tiny").replace(vocab_size=TOKENIZER.get_vocab_size(), **IDS)
TRUE = {"color": "navy", "sleeve": "long"}
LONG = Listing("a", "p", " ".join(WORDS * 5), "Long sleeves.", "Dresses", TRUE, 1, None)
PHOTO = Image.new("RGB", (64, 64))  # 16 of a row's tokens, and 2 around them


class OneListing:
    """A catalogue of one listing, shown as often as asked."""

    def __init__(self, listing):
        self._listing = listing

    def indices(self, split):
        return np.arange(3)

    def listing(self, index, draw=0):
        return self._listing

    def image(self, index, which=0, draw=0):
        return PHOTO


class Recording:
    """A processor whose rows go through another function."""

    def __init__(self, made, call):
        self._made, self._call = made, call

    def __getattr__(self, name):
        return getattr(self._made, name)

    def __call__(self, rows, buckets=()):
        return self._call(rows, buckets)


def processor(max_tokens=48, max_patches=64, **options):
    sizes = RowSizes(max_tokens, max_patches, min_pixels=256, max_pixels=4096)
    return Processor(TOKENIZER, CONFIG, sizes, **options)


def read(made, row):
    """The text that the model is given of a row, what the prompt says included."""
    batch = made([row])
    tokens = batch["tokens"][0][batch["token_mask"][0]]
    return TOKENIZER.decode(tokens.tolist())


def random_rows(n=60):
    rng = np.random.default_rng(0)
    for _ in range(n):
        words = rng.choice(WORDS, rng.integers(0, 40)).tolist()
        pairs = {f"{rng.choice(WORDS)}{i}": " ".join(WORDS[:i]) for i in range(1, 5)}
        kept = dict(list(pairs.items())[: rng.integers(0, 4)])
        listing = Listing("a", "p", " ".join(words), "in soft wool", "Dresses", kept, 1, None)
        yield listing, listing_row(listing, (PHOTO,) * int(rng.integers(2)), kept)


def test_the_places_of_attributes_are_theirs():
    for listing, row in random_rows():
        pairs = [format_attributes({name: value}) for name, value in listing.attributes.items()]
        assert [row.text[start:end] for start, end in row.attributes] == pairs


@pytest.mark.parametrize("prompt", [PlainPrompt(), PlainPrompt("Find it."), ChatPrompt(CHATML)])
def test_no_title_pushes_an_attribute_out_and_its_first_words_stay(prompt):
    made = processor(max_tokens=100 if isinstance(prompt, ChatPrompt) else 48, prompt=prompt)
    for attributes in ({"color": "navy"}, TRUE):
        for photos in ((), (PHOTO,)):
            said = read(made, listing_row(LONG, photos, attributes))
            assert format_attributes(attributes) in said
            assert "navy blue dress" in said and "Long sleeves." not in said


def test_rows_that_hold_their_attributes_are_what_they_were():
    """And so are those that lose all of them: the row of the plain listing."""
    made, unchanged, cut = processor(), 0, 0
    for listing, row in random_rows():
        before = made([Row(row.text, row.images)])
        tokens = before["tokens"][0][before["token_mask"][0]].tolist()
        if format_attributes(listing.attributes) in TOKENIZER.decode(tokens):
            unchanged += 1
            after = made([row])
            assert all(np.array_equal(before[name], after[name]) for name in before)
        else:
            cut += 1
    assert unchanged > 15 and cut > 15
    value = {"color": "navy " * 60}
    for photos in ((), (PHOTO,)):
        plain, bare = listing_row(LONG, photos), listing_row(LONG, photos, value)
        assert read(made, plain) == read(made, bare)


def test_a_plain_row_of_the_text_that_is_shown_gives_the_same_tokens():
    """What an exported model, which is given a text, is told to see the same."""
    made = processor()
    for _, row in random_rows():
        text = made.shown(row).text
        assert read(made, Row(text, row.images)) == read(made, row)


def test_attributes_that_are_too_many_lose_whole_pairs_and_leave_the_title_a_quarter():
    made, pairs = processor(), {f"name{i}": f"value {i}" for i in range(12)}
    pairs["name1"] = "long " * 90  # fits nowhere, and is no reason to leave out what follows
    shown, room = made.shown(listing_row(LONG, (), pairs)), 48 - 1
    title, kept = shown.text.splitlines()
    whole = [format_attributes({name: value}) for name, value in pairs.items()]
    whole.pop(1)
    n = len(kept.split("; "))
    assert kept == "; ".join(whole[:n]) and 1 < n == shown.attributes < 11

    def count(text):
        return len(TOKENIZER.encode(text).ids)

    assert count(title) >= room // 4 and count(shown.text) <= room
    assert room // 4 + count("\n" + "; ".join(whole[: n + 1])) > room


def test_rows_as_long_as_is_told_hold_all():
    made, too_short = processor(34), 0
    many = dataclasses.replace(LONG, attributes={f"name{i}": "soft " * i for i in range(40)})
    for listing, row in [(many, listing_row(many, (PHOTO,), many.attributes)), *random_rows()]:
        shown = made.shown(row)
        if shown.attributes < len(row.attributes):
            too_short += 1
            longer = processor(shown.needed)
            assert longer.shown(row).attributes == len(row.attributes)
            assert listing.title in read(longer, row)
        else:
            assert shown.needed == 34 or (shown.text != row.text and listing.title in row.text)
    assert too_short > 5


def test_titles_of_a_megabyte_or_without_blanks_are_cut_too():
    made = processor()
    for title, least in (("navy " * 200_000, "navy navy navy"), ("连衣裙夏季长袖" * 30, "连衣裙")):
        listing = Listing("a", "p", title, "", "", TRUE, 0, None)
        said = read(made, listing_row(listing, (), TRUE))
        assert "color: navy; sleeve: long" in said and said.startswith(least)


def test_half_of_the_words_keep_those_of_attributes():
    options = Augmentation(1.0, 0.0, 1.0, 0.0, 0.0)
    made, words = processor(), set(format_attributes(TRUE).split())
    for seed in range(30):
        rng = np.random.default_rng(seed)
        row = TrainingViews(OneListing(LONG), options, {}).row(
            0, "image+text", rng, draw=1, shorten=True
        )
        kept = [row.text[start:end] for start, end in row.attributes]
        assert set(kept) <= words and made.shown(row).attributes == len(kept)
        assert len(row.text.split()) == len(listing_text(LONG, TRUE).split()) // 2


def test_training_evaluation_and_rewards_read_one_text():
    catalog, made, seen = OneListing(LONG), processor(), []

    def rows_seen(rows, buckets=()):
        arrays = made(rows, buckets)
        seen.append(arrays["tokens"][0])
        return arrays

    recording = Recording(made, rows_seen)
    encoder = loaded_encoder(recording, lambda rows: rows["tokens"][:, :2].astype(jnp.float32), 1)
    evaluator = RetrievalEvaluator(encoder, catalog)
    evaluator.vectors("image+text", np.array([0]), catalogue_attributes(catalog))
    carried = [TRUE, {"color": "red"}, {}]
    _, cuts = encoder.embed_listings(catalog, np.zeros(3, int), attributes=carried.__getitem__)
    options = Augmentation(1.0, 0.0, 1.0, 0.0, 0.0)
    row = TrainingViews(catalog, options, {}).row(0, "image+text", np.random.default_rng(0), draw=1)
    seen.append(made([row])["tokens"][0])
    evaluated, rewarded, other, plain, trained = (tokens.tolist() for tokens in seen)
    assert evaluated == rewarded == trained
    assert rewarded != other != plain  # no two answers to a query are one
    assert (cuts.enriched, cuts.losing) == (2, 0)


def test_cut_attributes_are_counted_once_a_listing():
    catalog, tight = OneListing(LONG), processor(22)

    def row(index):
        attributes = {"color": "navy"} | ({"style": "long " * 9} if index else {})
        return evaluation_row(catalog, index, 1, view="text", attributes=attributes)

    cuts = AttributeCuts(tight)
    assert len(cuts.made(np.array([0, 1, 2, 2, 2]), row)) == 5
    assert (cuts.enriched, cuts.losing, cuts.bare, cuts.none_is_read) == (3, 2, 0, False)
    assert cuts.shorter == 3  # titles
    # No room but for the photo, of whose 16 windows, its marks and the end the 19 tokens are.
    bare = sampled_cuts(catalog, "train", processor(19), max_images=1)
    assert (bare.enriched, bare.bare, bare.none_is_read) == (3, 3, True)
    assert sampled_cuts(catalog, "train", processor(bare.needed), max_images=1).losing == 0
