"""Methods and evaluators that a configuration names are told apart before anything is opened."""

import json
from pathlib import Path

import pytest

from afmrl_jax.checkpoints.record import check_unchanged, recorded
from afmrl_jax.configs import agcl as page
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import check_options
from afmrl_jax.core.pages import load_page
from afmrl_jax.programs import agcl, cit, rar, sft

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
    with pytest.raises(UserError, match="lacks options, of, params, memory"):
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
