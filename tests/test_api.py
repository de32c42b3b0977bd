"""What `import afmrl_jax as aj` gives, on models of one layer that nobody trained."""

import dataclasses
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import afmrl_jax as aj
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.options import EncoderOptions, GeneratorOptions
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
TEXTS = ["system user assistant color: type: red green blue grey mug shirt lamp shoe hat new"] * 4


def save_run(folder, program, kind, options, seed=0):
    """A workdir with a checkpoint of fresh parameters, as `program` leaves it."""
    config = importlib.import_module(f"afmrl_jax.configs.{program}").get_config()
    config.data.update(max_tokens=48, max_patches=16, min_pixels=256, max_pixels=1024)
    if kind is Generator:
        config.data.update(max_answer=8, instruction="color type")
    tokenizer, tiny = train_tokenizer(TEXTS, 340), preset("tiny")
    sizes = tiny.replace(
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        text=dataclasses.replace(tiny.text, num_layers=1),
        vocab_size=tokenizer.get_vocab_size(),
        **special_token_ids(tokenizer),
    )
    model = kind(options.of(config), sizes, tokenizer)
    params = jax.jit(lambda: model.init_params(seed))()
    with Checkpoints(folder / "checkpoints", writable=True) as checkpoints:
        record = model.record() | {"config": config.to_json()}
        checkpoints.save(TrainState(jnp.int32(1), params, {}), record, 1, None)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of an encoder."""
    return save_run(tmp_path_factory.mktemp("run"), "agcl", Encoder, EncoderOptions)


@pytest.fixture(scope="module")
def model(run):
    return aj.load(run, batch=4)


@pytest.fixture(scope="module")
def catalog(catalogue_folder, cache_dir):
    return aj.open_catalog(catalogue_folder, cache_dir=cache_dir)


def test_importing_the_package_imports_nothing_else_and_defines_no_flag():
    code = """
import sys, time
began = time.perf_counter()
import afmrl_jax as aj
seconds = time.perf_counter() - began
assert not {"jax", "absl", "numpy"} & set(sys.modules), "something else was imported"
assert seconds < 1, seconds
assert callable(aj.load) and "train" in dir(aj)
from absl import flags
assert not {"config", "workdir", "plan"} & set(flags.FLAGS), "a flag was defined"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = aj.lod


def test_texts_and_photos_become_vectors_of_unit_length_however_many_come(model):
    rows = ["red mug", aj.Row("red mug", (PHOTO,)), aj.Row("", [PHOTO, PHOTO]), "", "blue hat"]
    vectors = model.embed(rows)
    assert vectors.dtype == np.float32 and vectors.shape[0] == 5
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for one, vector in zip(rows, vectors):  # alone, and a text without patches
        assert model.embed(one).shape == (1, vectors.shape[1])
        np.testing.assert_allclose(model.embed(one)[0], vector, atol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 0.999  # the photo counts


def test_a_photo_of_any_mode_is_shown_as_training_sees_it(model):
    turned = PHOTO.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # by a quarter, clockwise
    opaque = PHOTO.copy()
    opaque.putalpha(255)
    plain, as_rgba, upright = model.embed([aj.Row("", (p,)) for p in (PHOTO, opaque, turned)])
    np.testing.assert_array_equal(plain, as_rgba)
    np.testing.assert_array_equal(plain, upright)


def test_a_catalogue_s_listings_are_embedded_by_view_and_with_attributes(model, catalog):
    listings = catalog.indices("test")
    vectors = model.embed_catalog(catalog, "test", view="text")
    titles = [catalog.listing(i) for i in listings]
    texts = ["\n".join(filter(None, (t.title, t.category, t.description))) for t in titles]
    np.testing.assert_allclose(vectors, model.embed(texts), atol=1e-6)
    oracle = model.embed_catalog(catalog, listings, attributes="oracle")
    given = model.embed_catalog(catalog, "test", attributes=[t.attributes for t in titles])
    np.testing.assert_array_equal(oracle, given)
    assert not np.allclose(oracle, model.embed_catalog(catalog, "test"))


def test_an_index_finds_what_was_put_in_and_refuses_another_model_s_vectors(model, run, tmp_path):
    vectors = model.embed(["red mug", "blue shirt", "grey lamp"])
    index = aj.build_index(vectors, ids=range(7, 10), model=model)
    ids, scores = index.search(model.embed("blue shirt"), k=2)
    assert ids.shape == scores.shape == (1, 2) and ids[0, 0] == 8
    assert scores[0, 0] == pytest.approx(1, abs=1e-5)
    index.save(tmp_path / "index")
    assert aj.load_index(tmp_path / "index").search(vectors).ids[:, 0].tolist() == [7, 8, 9]
    other = save_run(tmp_path / "other", "agcl", Encoder, EncoderOptions, seed=1)
    versions = [aj.load(path).version for path in (run, other)]
    assert versions[0] == model.version == index.model_version != versions[1]
    with pytest.raises(aj.UserError, match="embed both with one model"):
        index.search(vectors, model_version=versions[1])


def test_what_was_exported_is_the_model_of_its_run(model, run, tmp_path, cache_dir):
    out = tmp_path / "exported"
    fields = {"checkpoint": str(run), "out": str(out), "data.cache_dir": cache_dir}
    assert aj.train("configs/export.py", tmp_path / "w", **fields) == tmp_path / "w"
    exported = aj.load(out, batch=4)
    assert exported.version == model.version
    rows = ["red mug", aj.Row("", (PHOTO,))]
    np.testing.assert_array_equal(exported.embed(rows), model.embed(rows))


def test_other_parameters_make_other_vectors_of_another_version(model):
    before, version = model.embed("red mug"), model.version
    other = model.with_params(jax.tree.map(lambda x: x + 0.01, model.params))
    assert other.version != version == model.version
    assert not np.allclose(other.embed("red mug"), before)
    np.testing.assert_array_equal(model.embed("red mug"), before)


def test_an_evaluation_scores_each_task(model, catalog):
    scores = aj.evaluate(model, catalog, tasks="image->image, text->text", split="all")
    assert list(scores) == ["image->image", "text->text"]
    assert all(0 <= of["recall@1"] <= 1 and of["n_queries"] == 40 for of in scores.values())


def test_a_generator_describes_listings_with_confidence(catalog, tmp_path):
    run = save_run(tmp_path, "sft", Generator, GeneratorOptions)
    said = aj.load(run, batch=4).describe(catalog, "test")
    assert len(said) == len(catalog.indices("test"))
    for one in said:
        assert one.attributes.keys() <= one.confidence.keys()
        assert all(0 <= p <= 1 for p in one.confidence.values())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, c, r: aj.load("nowhere"), "nowhere"),
        (lambda m, c, r: aj.load(r, batch=0), "batch is 0: give a whole number"),
        (lambda m, c, r: aj.load(r, mesh={"fdsp": 1}), "no axis 'fdsp'"),
        (lambda m, c, r: aj.load(r, **{"data.prompt": "chat"}), "leave out data.prompt"),
        (lambda m, c, r: m.embed([]), "nothing to embed"),
        (lambda m, c, r: m.embed([{"text": "mug"}]), "row 0 is dict"),
        (lambda m, c, r: m.embed(aj.Row("mug", PHOTO)), "no tuple of PIL images"),
        (lambda m, c, r: m.embed_catalog(c, "tset"), "'tset' is no split"),
        (lambda m, c, r: m.embed_catalog(c, [99]), "has listings 0 to 39 alone"),
        (lambda m, c, r: m.embed_catalog(c, "test", view="title"), "give one of image.text"),
        (lambda m, c, r: m.embed_catalog(c, "test", attributes=[{}]), "1 mappings of attributes"),
        (lambda m, c, r: aj.build_index(np.eye(3), model="agcl"), "model is no encoder"),
        (lambda m, c, r: aj.build_index(np.eye(3), ids=[0, 0, 1], model=m), "must be unique"),
        (lambda m, c, r: aj.evaluate(m, c, tasks="imgae->text"), "did you mean"),
        (lambda m, c, r: aj.open_catalog("nowhere"), "nowhere"),
        (lambda m, c, r: aj.open_catalog("builtin", attribute="x"), "did you mean 'attributes"),
        (lambda m, c, r: aj.train("configs/agcl.py", "w", step=1), "did you mean 'steps'"),
        (lambda m, c, r: aj.train("configs/agcl.py", "w", steps="9"), "expected int, as"),
        (lambda m, c, r: aj.train("configs/agc.py", "w"), "did you mean configs/agcl.py"),
    ],
)
def test_a_wrong_argument_is_told_in_a_sentence(model, catalog, run, call, told):
    with pytest.raises(aj.UserError, match=told):
        call(model, catalog, run)
