"""Running the program as its own process; an encoder and a generator that are trained already."""

import contextlib
import dataclasses
import functools
import sys

import jax
import optax
import pytest
from artifacts import made_once, smallest_agcl

from afmrl_jax import runner
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import GeneratorOptions
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState, abstract_state, init_state
from afmrl_jax.configs import export, sft
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.answers import question_and_answer
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset


@pytest.fixture
def command():
    """A function (config, workdir) -> the command line that runs a configuration made here."""

    def flat(config, prefix=""):
        for name, value in config.items():
            if hasattr(value, "items"):
                yield from flat(value, f"{prefix}{name}.")
            elif name != "program":
                yield f"--config.{prefix}{name}={value}"

    def build(config, workdir):
        return [
            *(sys.executable, "-m", "afmrl_jax.main", f"--config=configs/{config.program}.py"),
            *(f"--workdir={workdir}", *flat(config)),
        ]

    return build


@pytest.fixture(scope="session")
def whole(catalogue_folder, cache_dir, shared_folder):
    """The workdir of a run of agcl_config that nothing stopped; what it printed is in printed.txt
    beside it."""

    def make(workdir):
        with (shared_folder / "printed.txt").open("w") as file, contextlib.redirect_stdout(file):
            runner.run(smallest_agcl(catalogue_folder, cache_dir), workdir)

    return made_once(shared_folder / "whole", make)


@pytest.fixture(scope="session")
def run_export():
    """A function (checkpoint, out, **fields) that exports."""

    def run(checkpoint, out, **changes):
        config = export.get_config()
        config.update(checkpoint=str(checkpoint), out=str(out))
        config.update_from_flattened_dict(changes)
        runner.run(config, out.parent / "w")

    return run


@pytest.fixture(scope="session")
def exported(whole, run_export):
    """The folder of its export."""
    return made_once(whole.with_name("exported"), functools.partial(run_export, whole))


@pytest.fixture(scope="session")
def taught(catalogue_folder, cache_dir, shared_folder):
    """The workdir of a generator of one layer that has learned the training listings' answers."""
    make = functools.partial(teach, catalogue_folder, cache_dir)
    return made_once(shared_folder / "taught", make)


def teach(catalogue_folder, cache_dir, workdir):
    settings = sft.get_config()
    sizes = {"max_tokens": 64, "max_answer": 16, "max_patches": 16}
    settings.data.update(path=str(catalogue_folder), cache_dir=cache_dir, **sizes)
    settings.data.update(min_pixels=256, max_pixels=1024, instruction="color type")
    words = ["system user assistant color: type: red green blue grey mug shirt lamp shoe hat new"]
    tokenizer, tiny = train_tokenizer(words * 4, 340), preset("tiny")
    parts = {part: getattr(tiny, part) for part in ("vision", "text")}
    one_layer = {name: dataclasses.replace(part, num_layers=1) for name, part in parts.items()}
    ids = special_token_ids(tokenizer) | {"vocab_size": tokenizer.get_vocab_size()}
    generator = Generator(
        GeneratorOptions.of(settings), tiny.replace(**one_layer, **ids), tokenizer
    )
    catalog = open_catalogue(CatalogOptions.of(settings), workdir)
    processor, loss = generator.processor(answers=True), generator.answer_loss(64)
    shown = [question_and_answer(catalog, int(i), processor) for i in catalog.indices("train")]
    rows = processor(shown)
    mesh, adam = make_mesh(dict(settings.mesh)), optax.adam(4e-3)
    abstract = abstract_state(abstract_params(generator, mesh), adam, mesh)
    state = init_state(lambda: generator.init_params(0), adam, abstract)

    @jax.jit
    def step(state):
        gradients = jax.grad(lambda params: loss(params, rows)[0] / len(shown))(state.params)
        updates, moments = adam.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments)

    for _ in range(40):
        state = step(state)
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        record = generator.record() | {"config": settings.to_json()}
        checkpoints.save(state, record, int(state.step), None)
