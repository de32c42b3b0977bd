import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from afmrl_jax.attributes.text import format_attributes
from afmrl_jax.data.answers import (
    WINDOW,
    AnswerBatches,
    described,
    padded_lengths,
    question,
    question_and_answer,
)
from afmrl_jax.data.catalog import open_catalog
from afmrl_jax.data.oracle import open_attributes
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.prompts import CHATML, ChatPrompt
from afmrl_jax.data.synthetic import SyntheticCatalog
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import listing_text
from afmrl_jax.models.presets import preset


@pytest.fixture(scope="module")
def catalog():
    return SyntheticCatalog(families={"train": 3, "validation": 1})


@pytest.fixture(scope="module")
def processor(catalog):
    texts = [format_attributes(catalog.listing(i).attributes) for i in range(len(catalog))]
    tokenizer = train_tokenizer(texts, 400)
    config = preset("tiny").replace(
        vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
    )
    return Processor(
        tokenizer,
        config,
        max_tokens=160,
        max_patches=64,
        min_pixels=1024,
        max_pixels=4096,
        prompt=ChatPrompt(CHATML),
        max_answer=120,
        pad_left=True,
    )


def batches(catalog, processor, rows=(0, 1, 2, 3), chunks=2, buckets=1):
    listings = catalog.indices("train")
    options = {"dropout": 0.5, "buckets": buckets, "seed": 3, "steps": 50}
    return AnswerBatches(catalog, listings, processor, 8, chunks, rows, **options)


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_batch_depends_on_seed_and_step_alone(catalog, processor, buckets):
    one = batches(catalog, processor, buckets=buckets)
    other = pickle.loads(pickle.dumps(one))
    one[4]
    one[WINDOW + 1]
    first, again = one[5], other[5]
    assert first["tokens"].shape[:2] == first["listing"].shape == (2, 4)
    assert first["tokens"].shape[2] in one.lengths and one.lengths[-1] == 280
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("buckets", [1, 3])
def test_processes_share_a_batch_without_change(catalog, processor, buckets):
    whole = batches(catalog, processor, buckets=buckets)[2]
    for rows in np.arange(4).reshape(2, 2):
        part = batches(catalog, processor, rows, buckets=buckets)[2]
        assert all(np.array_equal(part[name], whole[name][:, rows]) for name in whole)


def test_an_epoch_shows_every_listing_once_and_the_next_one_anew(catalog, processor):
    all_batches = batches(catalog, processor, np.arange(8), chunks=1)
    listings = catalog.indices("train")
    count = 2 * len(listings)
    shown = [all_batches[step] for step in range(-(-count // 8))]
    order = np.concatenate([batch["listing"][0] for batch in shown])[:count]
    epochs = order.reshape(2, -1)
    assert all(np.array_equal(np.sort(epoch), listings) for epoch in epochs)
    assert not np.array_equal(*epochs)
    patches = np.concatenate([batch["patches"][0] for batch in shown])[:count]
    first, second = np.flatnonzero(order == listings[0])
    assert not np.array_equal(patches[first], patches[second])


def test_batches_of_like_rows_are_the_same_rows_with_less_padding(catalog, processor):
    def window(buckets):
        """Each example's rows, by what stands in them; and how long they are padded."""
        made = batches(catalog, processor, np.arange(8), chunks=1, buckets=buckets)
        shown = [made[step] for step in range(WINDOW)]
        rows = sorted(
            (int(listing), tokens[mask].tolist(), answer[mask].tolist(), patches.tobytes())
            for one in shown
            for listing, tokens, mask, answer, patches in zip(
                *(one[name][0] for name in ("listing", "tokens", "token_mask", "answer_mask")),
                one["patches"][0],
            )
        )
        return rows, [one["tokens"].shape[-1] for one in shown], made.lengths

    plain, long, _ = window(1)
    alike, padded, lengths = window(3)
    assert alike == plain and set(long) == {280}
    assert set(padded) <= set(lengths) and len(lengths) == 3 and len(set(padded)) > 1
    assert padded != sorted(padded)  # the order of steps is not that of their lengths
    assert np.mean(padded) < 1.15 * np.mean([len(row[1]) for row in plain])


def test_a_row_never_takes_more_tokens_than_was_told_without_its_images(catalog, processor):
    prompt, answer = 64, 12
    tight = Processor(
        processor.tokenizer,
        preset("tiny").replace(vocab_size=processor.tokenizer.get_vocab_size(), **processor.ids),
        max_tokens=prompt,
        max_patches=64,
        min_pixels=256,
        max_pixels=4096,
        max_answer=answer,
    )
    rng = np.random.default_rng(0)
    told = []
    for _ in range(60):
        sizes = rng.integers(8, 90, (int(rng.integers(0, 4)), 2))
        images = tuple(Image.new("RGB", tuple(size.tolist())) for size in sizes)
        words = "mug blue " * int(rng.integers(0, 30))
        row = Row(words, images[: tight.max_images], "color: blue")
        most = tight.most_tokens(dataclasses.replace(row, images=()), len(images))
        told.append((int(tight([row])["token_mask"].sum()), most))
    assert all(took <= most <= prompt + answer for took, most in told)
    assert any(took == most < prompt + answer for took, most in told)


def test_rows_are_padded_to_the_lengths_that_waste_least():
    lengths = np.array([20] * 50 + [60] * 50 + [61] * 3 + [200])
    assert padded_lengths(lengths, 1, 512) == (512,)
    assert padded_lengths(lengths, 4, 512) == (24, 64, 200, 512)
    assert padded_lengths(lengths, 3, 512) == (24, 64, 512)
    assert padded_lengths(lengths, 9, 20) == (8, 16, 20)  # none beyond the longest allowed


def test_the_answer_is_the_attributes_and_the_question_has_none_of_them(catalog, processor):
    listing = catalog.listing(5)
    shown, learned = question(catalog, 5, 1), question_and_answer(catalog, 5, processor)
    assert shown.text == learned.text == listing_text(listing)
    assert shown.answer is None and learned.answer == format_attributes(listing.attributes)
    row = processor([learned])
    said = row["tokens"][row["answer_mask"]]
    assert said[-1] == processor.ids["eos_token_id"]
    assert processor.tokenizer.decode(said[:-1].tolist()) == learned.answer


def test_an_answer_leaves_attributes_out_but_never_all_of_them(catalog, processor):
    true = catalog.listing(5).attributes
    first = next(iter(true))
    for left_out, told in (
        (iter([True, *[False] * len(true)]).__next__, dict(list(true.items())[1:])),
        (lambda: True, {first: true[first]}),
    ):
        row = question_and_answer(catalog, 5, processor, left_out=left_out)
        assert row.answer == format_attributes(told)


def test_only_listings_with_attributes_are_learned_from(catalogue_folder, tmp_path):
    catalog = open_catalog(catalogue_folder, cache_dir=tmp_path)
    lines = '{"listing_id": "mug-red-1", "attributes": {"color": "red"}}\n'
    lines += '{"listing_id": "hat-blue-0", "attributes": {}}\n'
    (tmp_path / "written.jsonl").write_text(lines)
    labelled = open_attributes(catalog, tmp_path / "written.jsonl", cache_dir=tmp_path)
    for _ in range(2):  # the second time from the cache
        [index] = described(labelled, "train", tmp_path)
        assert catalog.listing(int(index)).listing_id == "mug-red-1"
        assert np.array_equal(described(catalog, "train", tmp_path), catalog.indices("train"))
