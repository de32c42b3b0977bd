"""What planning refuses, and the search for better; test_sharded_step.py plans a step for TPUs."""

import dataclasses
import importlib.util

import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.planning import report
from afmrl_jax.planning import search as planning_search
from afmrl_jax.planning.search import Choice, Trial, search
from afmrl_jax.programs import agcl, plan

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="XLA's TPU compiler is not installed",
)
HALF = tuple({"slice": 1, "data": 1, "fsdp": 4, "tensor": 1}.items())


@pytest.fixture
def config(agcl_config):
    agcl_config.update(batch=16, micro_batches=2)
    agcl_config.mesh.fsdp = 4
    agcl_config.model.update(dtype="bfloat16", remat="full")
    return agcl_config


@needs_compiler
@pytest.mark.parametrize(
    "topology, told",
    [("v5e16", "is no topology: write it as"), ("v5e:3x5", "XLA knows no TPUs v5e:3x5")],
)
def test_a_topology_that_does_not_exist_is_told(config, tmp_path, topology, told):
    with pytest.raises(UserError, match=told):
        plan.main(config, tmp_path, topology)


def test_only_programs_that_train_are_planned(config, tmp_path):
    with config.unlocked():
        config.program = "evaluate"
    with pytest.raises(UserError, match="knows programs that train, as agcl, and not evaluate"):
        plan.main(config, tmp_path, "local")


def test_a_field_out_of_its_range_is_refused_before_anything_is_compiled(config, tmp_path):
    config.micro_batches, config.mesh.fsdp = 0, 1
    with pytest.raises(UserError, match="micro_batches is 0: give 1 or more"):
        plan.main(config, tmp_path, "local")


def test_a_run_that_cannot_fit_is_refused_with_the_table_before_anything_is_made(config):
    config.mesh.fsdp = 1
    config.model.preset = "qwen2_vl_7b"
    config.model.remat = "none"
    (part,) = agcl.plan(config, make_mesh(dict(config.mesh)))
    with pytest.raises(UserError, match=r"step does not fit the memory of cpu") as told:
        report.check_fits(part, make_mesh(dict(config.mesh)))
    assert "| parameters | optimizer |" in str(told.value) and "| no " in str(told.value)


def costs(choice):
    """A step of 64 pairs on 4 devices, worked out by hand: what is kept must fit into 10."""
    fsdp = dict(choice.mesh)["fsdp"]
    kept = {"none": 8.0, "dots": 4.0, "attention": 1.5, "full": 1.0}[choice.remat]
    needed = 16 / fsdp + kept * 8 / choice.micro_batches
    seconds = {"none": 1.0, "dots": 1.1, "attention": 1.2, "full": 1.3}[choice.remat]
    seconds += 0.002 * choice.micro_batches * fsdp
    fits = needed <= 10
    return Trial(choice, fits, seconds if fits else None, needed)


def test_the_search_ends_with_the_quickest_of_what_fits():
    asked = costs(Choice(HALF, "none", 1))
    assert not asked.fits
    tried = search(costs, asked, batch=64, devices=4)
    assert len(tried) <= planning_search.TRIES and tried[0] is asked
    best = min((one for one in tried if one.fits), key=lambda one: one.seconds)
    # Over four devices 4 of the 10 are gone: "full" needs 2 (1.316 s), "dots" 8 (1.164 s).
    assert best.choice == Choice(HALF, "none", 16) and best.seconds == pytest.approx(1.128)


def test_a_search_in_which_nothing_fits_ends():
    def never(choice):
        return dataclasses.replace(costs(choice), fits=False, seconds=None)

    tried = search(never, never(Choice(HALF, "none", 1)), batch=64, devices=4)
    assert [one.choice.micro_batches for one in tried] == [1, 1, 2, 4, 8, 16]
    assert "Nothing that was tried fits" in planning_search.advice(tried)
