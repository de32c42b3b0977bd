import jax
import numpy as np
import pytest
from flax import nnx

from afmrl_jax.data.catalog import open_catalog
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.retrieval.evaluation import parse_task
from afmrl_jax.retrieval.tasks import Judge, can_be_run, validation_sample

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
    processor = Processor(
        tokenizer, config, max_tokens=32, max_patches=16, min_pixels=side**2, max_pixels=4 * side**2
    )
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: Embedder(config, rngs=nnx.Rngs(0), dtype="float32"))
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), abstract)
    model = jax.jit(lambda params, rows: nnx.merge(graph, params)(rows))
    shapes = []

    def embed(rows):
        shapes.append((rows["tokens"].shape, rows["patches"].shape[:2]))
        return model(params, rows)

    listings = catalog.indices("all")[:4]
    options = {"batch": 4, "local": slice(0, 4), "attributes": False}
    judge = Judge(embed, processor, catalog, **options)
    vectors = judge.vectors("text", listings)
    judge.vectors("image", listings)
    assert shapes == [((4, 32), (4, 0)), ((4, 32), (4, 16))]
    texts = [
        evaluation_row(catalog, int(i), "text", attributes=False, max_images=1) for i in listings
    ]
    np.testing.assert_allclose(vectors, model(params, processor(texts)), atol=1e-6)
