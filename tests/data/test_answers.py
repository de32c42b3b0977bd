import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from afmrl_jax.attributes.text import MAX_PAIRS, Verdict, format_attributes, parse
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.catalog.overlays import open_attributes
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.answers import (
    WINDOW,
    AnswerBatches,
    AnswerOptions,
    described,
    learnable,
    padded_lengths,
    photo_and_title,
    question_and_answer,
)
from afmrl_jax.data.processor import Processor, Row, RowSizes
from afmrl_jax.data.prompts import CHATML, ChatPrompt
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import evaluation_row, listing_text
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
        RowSizes(max_tokens=160, max_patches=64, min_pixels=1024, max_pixels=4096),
        prompt=ChatPrompt(CHATML),
        max_answer=120,
        pad_left=True,
    )


def processor_of(processor, max_answer=0, **sizes):
    """Another one with the same tokenizer."""
    config = preset("tiny").replace(
        vocab_size=processor.tokenizer.get_vocab_size(), **processor.ids
    )
    usual = {"max_tokens": 64, "max_patches": 64, "min_pixels": 256, "max_pixels": 4096}
    return Processor(processor.tokenizer, config, RowSizes(**usual | sizes), max_answer=max_answer)


def batches(catalog, processor, rows=(0, 1, 2, 3), micro_batches=2, buckets=1):
    listings, options = catalog.indices("train"), answer_options(buckets)
    processors = {"attributes": processor}
    return AnswerBatches(
        catalog, listings, processors, 8, micro_batches, rows, options, seed=3, steps=50
    )


def answer_options(buckets, subsets=0.0, captions=0.0, views="image+text"):
    return AnswerOptions(buckets, views, 0.5, subsets, "Some.", captions, "Title.")


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
    all_batches = batches(catalog, processor, np.arange(8), micro_batches=1)
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
        made = batches(catalog, processor, np.arange(8), micro_batches=1, buckets=buckets)
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
    tight = processor_of(processor, max_tokens=prompt, max_answer=answer)
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
    shown, learned = evaluation_row(catalog, 5, 1), question_and_answer(catalog, 5, processor)
    assert shown.text == learned.text == listing_text(listing)
    assert shown.answer is None and learned.answer == format_attributes(listing.attributes)
    row = processor([learned])
    said = row["tokens"][row["answer_mask"]]
    assert said[-1] == processor.ids["eos_token_id"]
    assert processor.tokenizer.decode(said[:-1].tolist()) == learned.answer


def test_an_answer_leaves_attributes_out_but_never_all_of_them(catalog, processor):
    true = catalog.listing(5).attributes
    first = next(iter(true))
    others = {name: value for name, value in true.items() if name != first}
    for told, answer in ((lambda _: others, others), (lambda _: {}, {first: true[first]})):
        row = question_and_answer(catalog, 5, processor, told=told)
        assert row.answer == format_attributes(answer)


def taught(processor, attributes):
    """What a row of these attributes teaches: the answer's text, and whether it ends."""
    answer = learnable(attributes, processor).answer
    row = processor([Row("mug", answer=answer)])
    said = row["tokens"][row["answer_mask"]].tolist()
    ends = said[-1:] == [processor.ids["eos_token_id"]]
    return processor.tokenizer.decode(said[:-1]), ends


def test_an_answer_that_is_too_long_leaves_out_whole_pairs_and_ends(processor):
    pairs = {f"name{i}": f"value{i}" for i in range(60)}
    pairs["name1"] = "long " * 199 + "long"  # longer than any answer: it alone is left out
    answer, ends = taught(processor, pairs)
    kept, expected = parse(answer), [name for name in pairs if name != "name1"]
    assert ends and kept.verdict is Verdict.VALID
    assert list(kept.attributes) == expected[: len(kept.attributes)]
    found = learnable(pairs, processor)
    assert found.left_out == 60 - len(kept.attributes) > 30
    assert len(processor.tokenizer.encode(answer).ids) + 1 <= processor.max_answer == 120
    whole = dict(list(pairs.items())[2:5])
    told = format_attributes(whole)
    tokens = len(processor.tokenizer.encode(told).ids) + 1
    assert learnable(whole, processor) == (told, 3, 0, tokens)
    exact = processor_of(processor, max_answer=tokens)
    assert learnable(whole, exact).left_out == 0
    assert learnable(whole, processor_of(processor, max_answer=tokens - 1)).left_out == 1


def test_no_answer_to_learn_from_is_one_that_the_format_refuses(processor):
    many = {f"n{i}": "v" for i in range(MAX_PAIRS + 10)}
    long = {f"n{i}": "v" * 190 for i in range(20)}
    roomy = processor_of(processor, max_answer=4000)
    for attributes in (many, long):
        assert parse(format_attributes(attributes)).verdict is Verdict.TOO_LONG
        answer, ends = taught(roomy, attributes)
        assert ends and parse(answer).verdict is Verdict.VALID
    assert learnable(many, roomy).left_out == 10
    assert learnable(long, roomy).left_out == 10  # of 2,000 characters, 190 + 6 or 7 each


def test_a_listing_of_which_no_attribute_fits_teaches_nothing(processor):
    row = processor([Row("mug", answer=learnable({"a": "long " * 200}, processor).answer)])
    assert not row["answer_mask"].any()
    with pytest.raises(ValueError, match="max_answer=120: leave attributes out"):
        processor([Row("mug", answer="long " * 200)])


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


@pytest.fixture(scope="module")
def asked(catalog, processor):
    """The rows of some steps by the instruction that asks for them: (listing, shows its photo,
    question's text, answer)."""
    options = answer_options(
        3, subsets=0.3, captions=0.3, views="image+text 0.4, image 0.3, text 0.3"
    )
    words = {"attributes": "All.", **options.instructions}
    sizes = RowSizes(max_tokens=160, max_patches=64, min_pixels=1024, max_pixels=4096)
    config = preset("tiny").replace(
        vocab_size=processor.tokenizer.get_vocab_size(), **processor.ids
    )
    processors = {
        kind: Processor(
            *(processor.tokenizer, config, sizes),
            prompt=ChatPrompt(CHATML, instruction),
            max_answer=120,
            pad_left=True,
        )
        for kind, instruction in words.items()
    }
    listings = catalog.indices("train")
    made = AnswerBatches(
        catalog, listings, processors, 8, 2, np.arange(4), options, seed=3, steps=50
    )
    rows = {kind: [] for kind in words}
    for step in range(30):
        batch = {name: x.reshape(8, *x.shape[2:]) for name, x in made[step].items()}
        for n in range(8):
            mask, answer = batch["token_mask"][n], batch["answer_mask"][n]
            decode = processor.tokenizer.decode
            text = decode(batch["tokens"][n][mask & ~answer].tolist(), skip_special_tokens=False)
            system, user = (part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:3])
            kind = next(kind for kind, word in words.items() if system == f"system\n{word}")
            said = decode(batch["tokens"][n][answer].tolist())
            shows = bool(batch["patch_segments"][n].any())
            rows[kind].append((int(batch["listing"][n]), shows, user, said))
    return rows


def test_kinds_of_answers_come_as_often_as_asked_for(asked):
    counts = [len(asked[kind]) for kind in ("attributes", "subset", "caption")]
    assert sum(counts) == 240 and np.allclose(np.array(counts) / 240, (0.4, 0.3, 0.3), atol=0.1)


def test_a_title_is_asked_of_the_photo_alone(asked):
    for _, shows, user, said in asked["caption"]:
        assert shows and user.endswith("<|vision_end|>") and len(said) > 3
        assert parse(said).verdict is not Verdict.VALID
    assert len({said for *_, said in asked["caption"]}) > 60  # another seller's each time


def test_some_attributes_come_true_in_any_order_and_number(asked, catalog):
    numbers, in_order = [], 0
    for listing, _, _, said in asked["subset"]:
        told, true = parse(said), catalog.listing(listing).attributes
        assert told.verdict is Verdict.VALID and told.attributes.items() <= true.items()
        numbers.append(len(told.attributes))
        in_order += list(told.attributes) == [name for name in true if name in told.attributes]
    assert set(numbers) >= set(range(1, 9)) and in_order < 0.6 * len(numbers)
    kept = [parse(said).attributes for *_, said in asked["attributes"]]
    order = [list(catalog.listing(row[0]).attributes) for row in asked["attributes"]]
    assert all(sorted(one, key=names.index) == list(one) for one, names in zip(kept, order))


def test_a_dropout_of_a_half_leaves_out_half_of_the_pairs_others_each_time(asked, catalog):
    told = [(row[0], list(parse(row[3]).attributes)) for row in asked["attributes"]]
    true = [list(catalog.listing(listing).attributes) for listing, _ in told]
    assert sum(len(names) for _, names in told) / sum(map(len, true)) == pytest.approx(
        0.5, abs=0.06
    )
    # Of any place in the order: not the last ones more often.
    last = [names[-1] in kept for (_, kept), names in zip(told, true)]
    assert np.mean(last) == pytest.approx(0.5, abs=0.15)
    assert len({(listing, *names) for listing, names in told}) > 0.9 * len(told)


def test_questions_show_the_views_that_are_asked_for(asked):
    views = [
        (shows, not user.endswith(("<|vision_end|>", "user\n")))
        for kind in ("attributes", "subset")
        for _, shows, user, _ in asked[kind]
    ]
    shares = [
        views.count(view) / len(views) for view in ((True, True), (True, False), (False, True))
    ]
    assert np.allclose(shares, (0.4, 0.3, 0.3), atol=0.1) and sum(shares) == pytest.approx(1)


def test_shares_that_are_more_than_all_answers_are_refused():
    with pytest.raises(UserError, match=r"data\.caption_share=0\.6 are more than all answers"):
        answer_options(1, subsets=0.5, captions=0.6)
    with pytest.raises(UserError, match=r"data\.question_views is 'photo', expected one of"):
        answer_options(1, views="photo")


def test_a_title_too_long_for_an_answer_loses_its_last_words(catalog, processor):
    tight = processor_of(processor, max_answer=12)
    said = photo_and_title(catalog, 5, tight).answer
    assert catalog.listing(5).title.startswith(said + " ")
    assert len(tight.tokenizer.encode(said).ids) < 12
