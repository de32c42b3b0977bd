"""Running the program as its own process; a generator that is taught already."""

import dataclasses
import sys

import jax
import optax
import pytest

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import GeneratorOptions
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState, abstract_state, init_state
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.answers import question_and_answer
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset


@pytest.fixture(scope="module", autouse=True)
def quick_compilations(request):
    """Where a module says QUICK, nothing is made fast, here and in the processes that it starts:
    most of the time would go into compiling what runs a few times."""
    if not getattr(request.module, "QUICK", False):
        yield
        return
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        jax.clear_caches()  # or what other modules compiled would be used here, and not there
        jax.config.update(name, True)
        yield
    jax.config.update(name, before)
    jax.clear_caches()


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
def wholes(tmp_path_factory):
    return tmp_path_factory.mktemp("agcl")


@pytest.fixture(scope="module")
def whole(request, wholes):
    """The workdir of a run of agcl_config that nothing stopped; made by the first who needs it, one
    for the modules that are QUICK and one for the others: bits differ."""
    return wholes / ("quick" if getattr(request.module, "QUICK", False) else "whole")


@pytest.fixture(scope="session")
def taught(catalogue_folder, cache_dir, tmp_path_factory):
    """The workdir of a generator of one layer that has learned the training listings' answers."""
    from afmrl_jax.configs.sft import get_config

    settings = get_config()
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
    workdir = tmp_path_factory.mktemp("taught")
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
    return workdir
