"""The base that ships with the package, and the program that made it."""

import json

import jax
import numpy as np

import afmrl_jax as aj
from afmrl_jax import runner
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import TrainingOptions
from afmrl_jax.assembly.pretrained import BASE_FOLDER, find_pretrained
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.configs import agcl, pretrain, sft
from afmrl_jax.core.mesh import make_mesh


def test_a_base_in_training_is_judged_by_view(catalogue_folder, cache_dir, tmp_path):
    config = pretrain.get_config("tiny")
    config.update(steps=1, log_every=1, eval_every=0, checkpoint_every=0)
    config.data.update(path=str(catalogue_folder), cache_dir=cache_dir, buckets=1, max_answer=16)
    config.eval.update(batch=4, validation_listings=4, listings=4, samples=0)
    runner.run(config, tmp_path)
    views = json.loads((tmp_path / "evaluation.json").read_text())["by_view"]
    assert list(views) == ["image+text", "image", "text"]


def test_the_shipped_base_starts_an_encoder_and_a_generator():
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    parameters = []
    for model_class, page in {Encoder: agcl, Generator: sft}.items():
        settings, source = page.get_config(), find_pretrained("base", model_class, begin=True)
        options = model_class.options_type.of(settings)
        model = source.for_training(options, TrainingOptions.of(settings))
        with jax.set_mesh(mesh):
            params = source.load(abstract_params(model, mesh))
        parameters.append(jax.tree.leaves(params))
    assert len(parameters[0]) == len(parameters[1]) > 20
    assert all(map(np.array_equal, *parameters))


def test_the_shipped_base_names_attributes_of_products_that_it_never_saw():
    """Of 85% of the world's held-out pairs, as its card says; a chance of 24% is the majority's."""
    catalog = SyntheticCatalog(families={"test": 2})
    listings = np.arange(len(catalog))
    said = aj.load("base", batch=len(catalog)).describe(catalog, listings)
    true = [catalog.listing(int(index)).attributes for index in listings]
    right = [one.attributes.get(name) == x for one, t in zip(said, true) for name, x in t.items()]
    assert len(right) > 100 and np.mean(right) > 0.7
    assert "How it was made" in (BASE_FOLDER / "README.md").read_text(encoding="utf-8")
