"""Methods and evaluators that a configuration names are told apart before anything is opened."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.checkpoints.record import check_unchanged, recorded
from afmrl_jax.configs import agcl as page
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import check_options
from afmrl_jax.core.pages import load_page
from afmrl_jax.programs import agcl, cit, rar, sft
from afmrl_jax.training.objective import abstract_parts

RUN = Path("runs/mine")


@pytest.mark.parametrize("program", [agcl, sft, rar])
@pytest.mark.parametrize(
    "names, told",
    [
        ("retrival", "evaluators is 'retrival', expected one of .*, module:NAME"),
        ("nowhere:judge", "there is no module nowhere"),
        ("json:judge", "json has no judge"),
    ],
)
def test_an_evaluator_that_stands_for_nothing_is_told_with_the_settings(program, names, told):
    config = load_page(f"configs/{program.__name__.rpartition('.')[2]}.py")
    check_options(config, program.OPTIONS)
    config.evaluators += f", {names}"
    with pytest.raises(UserError, match=told):
        check_options(config, program.OPTIONS)


def test_a_cycle_tells_of_a_later_stage_s_evaluator_and_method_before_its_first(tmp_path):
    config = load_page("configs/cit.py")
    config.again.evaluators = "retrival"
    with pytest.raises(UserError, match=r"again\.evaluators is 'retrival'"):
        cit.check_stages(config, cit.stages_of(config, tmp_path))
    config.again.update(evaluators="retrieval", method="aglc")
    with pytest.raises(UserError, match=r"again\.method is 'aglc'"):
        cit.check_stages(config, cit.stages_of(config, tmp_path))


def test_a_method_that_is_no_objective_is_told_what_it_lacks():
    config = page.get_config()
    config.method = "json:JSONDecoder"
    with pytest.raises(UserError, match="lacks batch_arrays, trainable, options, of, params"):
        check_options(config, agcl.OPTIONS)


def test_a_run_goes_on_with_the_fields_of_a_method_outside_the_package_unless_they_change():
    config = page.get_config().unlock()
    config.method, config.loss.margin = "triplet:Triplet", 0.2
    saved = config.to_json()
    assert recorded(saved, RUN)["loss"]["margin"] == 0.2
    check_unchanged(saved, config.to_json(), RUN)
    config.loss.margin = 0.3
    with pytest.raises(UserError, match=r"loss\.margin was 0\.2 and is now 0\.3"):
        check_unchanged(saved, config.to_json(), RUN)
    config.loss.slope = 1.0
    config.loss.margin = 0.2
    with pytest.raises(UserError, match=r"loss\.slope was None and is now 1\.0"):
        check_unchanged(saved, config.to_json(), RUN)
    method = json.loads(saved) | {"method": "agcl"}
    with pytest.raises(UserError, match=r"another version of agcl: loss\.margin is gone"):
        recorded(method, RUN)


class Mean:
    """An objective of two numbers: the mean of all embeddings' first ones, scaled."""

    batch_arrays, trainable, options = ("product",), "", ()

    def params(self, width):
        return {"scale": {"log": jax.ShapeDtypeStruct((), jnp.float32)}}

    def memory(self, width, batch):
        return {"seen": jax.ShapeDtypeStruct((2,), jnp.int32)}

    def __call__(self, trained, memory, embeddings, batch):
        value = jnp.exp(trained["scale"]["log"]) * embeddings[..., 0].mean()
        return value, {"seen": memory["seen"] + 1}, {"mean": value}


def parts_of(**changes):
    """The parts of a Mean with other members."""
    model = {"backbone": {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    batch = {"product": jax.ShapeDtypeStruct((2, 4, 2), jnp.int32)}
    return abstract_parts(type("Mean", (Mean,), changes)(), model, batch, 8)


def returning(value=0.0, memory=None, **metrics):
    def call(self, trained, past, embeddings, batch):
        return jnp.asarray(value), past if memory is None else memory, metrics

    return call


def test_parameters_and_memory_of_an_objective_are_said_by_their_shapes():
    params, memory = parts_of()
    assert params["scale"]["log"].shape == () and memory["seen"].shape == (2,)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"batch_arrays": ("tems",)}, "Mean.batch_arrays names tems: a batch has product"),
        ({"params": lambda *_: {"t": {"t": np.ones(())}}}, "other values than jax.ShapeDtypeStr"),
        ({"memory": lambda *_: None}, "Mean.memory returns other values"),
        ({"params": lambda *_: {"t": jax.ShapeDtypeStruct((), "f4")}}, "gives 't': expected {NAME"),
        ({"params": lambda *_: {"backbone": {}}}, "gives 'backbone'.* that the model lacks"),
        ({"__call__": returning(np.ones(3))}, r"a loss of shape \(3,\): expected one number"),
        ({"__call__": returning(hits=jnp.ones(8))}, "returns 'hits' with several numbers"),
        ({"__call__": returning(memory={})}, r"a memory of {}, but begins with {'seen': 'int32"),
    ],
)
def test_an_objective_of_another_form_is_told_before_anything_compiles(changes, told):
    with pytest.raises(UserError, match=told):
        parts_of(**changes)
