import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import loaded_encoder
from flax import nnx

from afmrl_jax.catalog.listings import Overlay, open_catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor, RowSizes, Shown
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import catalogue_attributes, evaluation_row
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.retrieval.evaluator import RetrievalEvaluator, enrichment
from afmrl_jax.retrieval.tasks import (
    Task,
    can_be_run,
    choose_tasks,
    parse_task,
    parts_of,
    validation_sample,
)

SAME, CROSS = parse_task("image+text->image+text"), parse_task("image->text")


@pytest.fixture(scope="module")
def catalog(catalogue_folder, tmp_path_factory):
    return open_catalog(catalogue_folder, cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_task_needs_something_to_find(catalog):
    whole = catalog.indices("all")
    _, first = np.unique(catalog.products, return_index=True)  # one listing a product
    assert can_be_run(SAME, catalog, whole)
    assert not can_be_run(SAME, catalog, first)
    assert can_be_run(SAME, catalog, first, whole)
    assert can_be_run(CROSS, catalog, first)  # its own text is an answer
    assert not can_be_run(CROSS, catalog, first[:0])


def test_a_validation_sample_holds_whole_products_and_is_the_same_each_time(catalog):
    sample = validation_sample(catalog, [SAME], limit=4)
    np.testing.assert_array_equal(sample, validation_sample(catalog, [SAME], limit=4))
    assert set(sample) <= set(catalog.indices("validation"))
    assert (np.bincount(catalog.products[sample])[catalog.products[sample]] == 2).all()
    assert 4 <= len(sample) <= 6


def test_texts_are_embedded_without_patches_and_as_they_are_with(catalog):
    tokenizer = train_tokenizer(["navy blue dress"], 280)
    config = preset("tiny_qwen3").replace(
        vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
    )
    side = config.vision.patch_size * config.vision.merge_size
    processor = Processor(tokenizer, config, RowSizes(32, 16, side**2, 4 * side**2))
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: Embedder(config, rngs=nnx.Rngs(0), dtype="float32"))
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.1, x.shape), jnp.float32), abstract
    )
    shapes = []  # of what is compiled

    def embed(rows):
        shapes.append((rows["tokens"].shape, rows["patches"].shape[:2]))
        return nnx.merge(graph, params)(rows)

    listings = catalog.indices("all")[:4]
    evaluator = RetrievalEvaluator(loaded_encoder(processor, embed, 4), catalog)
    vectors = evaluator.vectors("text", listings)
    evaluator.vectors("image", listings)
    assert shapes == [((4, 32), (4, 0)), ((4, 32), (4, 16))]
    texts = [evaluation_row(catalog, int(i), 1, view="text") for i in listings]
    np.testing.assert_allclose(vectors, jax.jit(embed)(processor(texts)), atol=1e-6)


class Words:
    """In the place of a processor: it keeps what it is shown, and holds few words."""

    max_images, max_tokens, text_bucket = 1, 4, (4, 0)

    def __init__(self):
        self.texts = []

    def __call__(self, rows, buckets=()):
        self.texts += [row.text for row in rows]
        return {"x": np.array([[len(row.text), 1] for row in rows], np.float32)}

    def shown(self, row):
        ahead = len(row.text[: row.attributes[-1][1]].split())
        fits = ahead <= self.max_tokens
        return Shown(row.text, len(row.attributes) if fits else 0, max(ahead, self.max_tokens))


def enriched_evaluator(catalog, side):
    words = Words()
    enriched = enrichment(catalogue_attributes(catalog), side)
    return words, RetrievalEvaluator(
        loaded_encoder(words, lambda rows: rows["x"], 4), catalog, enriched
    )


@pytest.mark.parametrize(
    "side, enriched, plain", [("both", 40, 0), ("queries", 8, 40), ("gallery", 40, 8)]
)
def test_a_side_alone_is_enriched_and_what_both_share_is_embedded_once(
    catalog, side, enriched, plain
):
    listings = catalog.indices("all")  # 40, in batches of 4
    words, evaluator = enriched_evaluator(catalog, side)
    evaluator.run([parse_task("text->text")], listings[:8], listings)
    carry = ["color: " in text for text in words.texts]
    assert (sum(carry), len(carry) - sum(carry)) == (enriched, plain)
    before = len(words.texts)
    evaluator.run([parse_task("text->text"), parse_task("image->image")], listings[4:8], listings)
    # Nothing of the texts anew; image views carry no attributes, and are the same on both sides.
    assert words.texts[before:] == [""] * 40


def test_vectors_come_in_the_order_asked_for_however_they_were_made(catalog):
    _, evaluator = enriched_evaluator(catalog, "queries")
    later, earlier = np.array([9, 2]), np.array([30, 2, 5])
    first = evaluator.vectors("text", later)
    both = evaluator.vectors("text", np.array([5, 9, 30, 2, 9]))
    lengths = [len(evaluation_row(catalog, i, 1, view="text").text) for i in range(40)]
    assert first[:, 0].tolist() == [lengths[9], lengths[2]]
    assert both[:, 0].tolist() == [lengths[i] for i in (5, 9, 30, 2, 9)]
    assert evaluator.vectors("text", earlier)[:, 0].tolist() == [lengths[i] for i in earlier]


def test_texts_that_lose_attributes_are_told(catalog, caplog):
    words, evaluator = enriched_evaluator(catalog, "queries")
    # "MUG new", "mug", "color: red; type: mug" are 7 words; the odd listings' are as many.
    words.max_tokens = 7
    listings = catalog.indices("all")[:8]
    with caplog.at_level("WARNING", "afmrl_jax.data.views"):
        evaluator.vectors("text", listings, evaluator.enriched.queries)
        assert not caplog.records  # of "A fine thing." anything may be cut
        words.max_tokens = 6
        evaluator.vectors("text", listings + 8, evaluator.enriched.queries)
    assert "8 of 8 texts lose attributes" in caplog.text
    assert "data.max_tokens=6, images included; trained with 7 it" in caplog.text


class Partial(Overlay):
    """The catalogue without some of its images and texts."""

    def __init__(self, catalog, no_image=(), no_text=()):
        super().__init__(catalog, catalog.fingerprint)
        self.no_image, self.no_text = set(no_image), set(no_text)

    def listing(self, index, draw=0):
        lost = {"n_images": 0} if index in self.no_image else {}
        lost |= (
            dict.fromkeys(("title", "description", "category"), "") if index in self.no_text else {}
        )
        return dataclasses.replace(super().listing(index, draw), **lost)


def test_a_listing_has_what_a_view_shows_where_it_has_any_part_of_it(catalog):
    has = parts_of(Partial(catalog, no_image=[1], no_text=[2]), np.arange(3))
    assert has["image"].tolist() == [True, False, True]
    assert has["text"].tolist() == [True, True, False]  # attributes are no text
    assert has["image+text"].all()


def test_a_listing_without_what_is_shown_neither_asks_nor_is_searched(catalog):
    # Listings 0 and 1 are one product, 2 and 3 the next. Without their images 0 cannot ask, 1 has
    # nothing to find, 2 and 3 find each other.
    partial, asked = Partial(catalog, no_image=[0, 30], no_text=[3]), np.arange(4)
    words = Words()
    evaluator = RetrievalEvaluator(loaded_encoder(words, lambda rows: rows["x"], 4), partial)
    found = evaluator.scores(
        [parse_task("image->image"), CROSS, SAME], asked, catalog.indices("all")
    )
    assert found["image->image"].queries.tolist() == [2, 3]
    assert found["image->image"].extra == {"n_gallery": 38, "n_without": 1}
    assert found["image->image"].means()["n_queries"] == 2
    # Of 2 and 3 only 2 has a text to be found by, which is 2's own as well.
    assert found["image->text"].queries.tolist() == [1, 2, 3]
    assert found["image->text"].extra == {"n_gallery": 39, "n_without": 1}
    # A view of both shows what there is.
    assert found[SAME.name].queries.tolist() == [0, 1, 2, 3]
    assert found[SAME.name].extra == {"n_gallery": 40}


def test_tasks_that_show_what_listings_lack_are_left_out_and_told(catalog, caplog):
    images, texts = parse_task("image->image"), parse_task("text->text")
    whole, few = catalog.indices("all"), Partial(catalog, no_image=range(6))
    assert choose_tasks([images, texts, CROSS], few, whole) == [images, texts, CROSS]
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "6 of 40 queries have no image, 6 of 40 gallery listings have no image",
        "6 of 40 queries have no image",
    ]
    caplog.clear()
    blind = Partial(catalog, no_image=range(40))
    assert choose_tasks([images, texts, CROSS], blind, whole) == [texts]
    assert "image->image is left out: 40 of 40 queries have no image" in caplog.text
    assert not can_be_run(CROSS, blind, whole)
    with pytest.raises(UserError, match=r"image->image, image->text shows what no listing"):
        choose_tasks([images, CROSS], blind, whole)
    caplog.clear()
    alone = whole[::2]  # one listing a product
    assert choose_tasks([texts], blind, alone) == []
    assert "no query's product has another listing" in caplog.text


def test_a_validation_sample_serves_the_first_task_that_can_be_run_on_it(catalog):
    images, texts = parse_task("image->image"), parse_task("text->text")
    validation = catalog.indices("validation")
    some = Partial(catalog, no_image=validation[:-4])
    assert validation_sample(some, [images, texts], 600).tolist() == validation[-4:].tolist()
    none = Partial(catalog, no_image=validation, no_text=validation[:2])
    assert validation_sample(none, [images, texts], 600).tolist() == validation[2:].tolist()


def test_a_side_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"eval\.enrich is 'query'.*did you mean \"queries\""):
        enrichment(None, "query")


def test_the_own_listing_counts_only_where_the_views_share_no_modality():
    assert parse_task("image->text") == Task("image", "text")
    assert parse_task(" Text+Image -> image+text").name == "image+text->image+text"
    shared = {name: parse_task(name).exclude_self for name in ("image->image", "text->image+text")}
    assert shared == {"image->image": True, "text->image+text": True}
    assert not parse_task("text->image").exclude_self


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("imgae->text", 'did you mean "image->text"'),
        ("classify", "known are image.text->image.text, "),
    ],
)
def test_a_mistyped_task_is_refused_with_a_suggestion(name, told):
    with pytest.raises(UserError, match=told):
        parse_task(name)
