"""Objectives that a configuration names: a memory, a user's own, a part of the parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from workdirs import check_bit_equal, logged, losses, state_of, stopped

from afmrl_jax import runner
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.core.options import Options, between
from afmrl_jax.losses.agcl import AGCL


@dataclasses.dataclass(frozen=True)
class Slope(Options, section="loss"):
    slope: float = between(0, 2)


@dataclasses.dataclass(frozen=True)
class LayersAlone(AGCL):
    """Trains the decoder's layers; the rest stays as it began."""

    trainable = r"^backbone\.layers\."
    options = (*AGCL.options, Slope)


def share_of_ones(trained):
    """An evaluator of a user's module."""

    def evaluate(state):
        count = sum(x.size for x in jax.tree.leaves(trained.params(state)))
        return {"step": float(state.step), "parameters": float(count)}

    return evaluate


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=4, eval_every=0, checkpoint_every=2)
    agcl_config.eval.tasks = "image->text"
    return agcl_config


def test_a_run_with_a_memory_stopped_and_started_again_ends_bit_equal(config, tmp_path):
    config.loss.memory_batches = 2
    runner.run(config, tmp_path / "run")
    memory = {name: x for name, x in state_of(tmp_path / "run").items() if "memory." in name}
    assert memory["memory.embedding"].shape[0] == 16 and memory["memory.filled"].all()
    runner.run(config, stopped(tmp_path / "run", tmp_path / "stopped"))
    check_bit_equal(tmp_path / "run", tmp_path / "stopped")
    assert losses(tmp_path / "run") == losses(tmp_path / "stopped")


def test_an_objective_of_a_user_s_module_trains_what_it_says_and_nothing_else(config, tmp_path):
    config.method, config.evaluators = f"{__name__}:LayersAlone", f"{__name__}:share_of_ones"
    with config.unlocked():
        config.loss.slope = 1.0  # a field that the package has not
    runner.run(config, tmp_path / "run")
    rows = logged(tmp_path / "run")
    assert rows[-1]["validation"] == 4.0
    state = state_of(tmp_path / "run")
    names = [name for name in state if name.startswith("params.")]
    assert names and all(name.startswith("params.backbone.layers.") for name in names)
    runner.run(config, stopped(tmp_path / "run", tmp_path / "stopped"))
    check_bit_equal(tmp_path / "run", tmp_path / "stopped")
    # Whoever reads the run gets the whole encoder: the base's parameters, and those trained.
    source = find_pretrained(str(tmp_path / "run"))
    params = source.load(abstract_params(source.model, make_mesh(dict(config.mesh))))
    began = source.model.init_params(config.seed)
    own = jax.tree.map(np.asarray, began)
    assert jax.tree.structure(params) == jax.tree.structure(own)
    assert rows[-1]["validation_parameters"] == sum(x.size for x in jax.tree.leaves(own))
    np.testing.assert_allclose(
        params["backbone"]["vision"]["patch_embed"]["kernel"],
        own["backbone"]["vision"]["patch_embed"]["kernel"],
        rtol=1e-6,
    )
    evaluated = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    with config.unlocked():
        del config.loss.slope
    config.update(method="agcl", evaluators="retrieval", init_from=str(tmp_path / "run"), steps=1)
    runner.run(config, tmp_path / "tuned")
    before = json.loads((tmp_path / "tuned" / "evaluation_before.json").read_text())
    assert before == evaluated


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("method", "aglc", 'did you mean "agcl"'),
        ("method", "nowhere:Class", "there is no module nowhere"),
        ("method", "json:Class", "json has no Class"),
        ("evaluators", "retrival", 'did you mean "retrieval"'),
    ],
)
def test_a_name_that_stands_for_nothing_is_told_before_anything_is_trained(
    config, tmp_path, field, value, told
):
    config[field] = value
    with pytest.raises(UserError, match=told):
        runner.run(config, tmp_path)
