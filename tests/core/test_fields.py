"""What a configuration is on a disk."""

import json
import math
from pathlib import Path

import pytest

from afmrl_jax.checkpoints.record import check_unchanged
from afmrl_jax.configs.agcl import get_config
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, to_json, with_limits


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_limits_that_are_off_are_json_and_come_back_as_they_were():
    config = get_config()
    text = to_json(config, indent=2)
    assert json.loads(text, parse_constant=refuse)["loss"]["mask_margin"] is None
    back = with_limits(json.loads(text))
    assert back == config.to_dict() and back["loss"]["mask_margin"] == math.inf


def test_a_configuration_written_with_infinity_is_still_the_same():
    config = get_config()
    before = config.to_json()
    assert "Infinity" in before
    check_unchanged(before, config, Path("runs"))
    config.loss.mask_margin = 0.1
    with pytest.raises(UserError, match=r"loss\.mask_margin was inf and is now 0\.1\. Give"):
        check_unchanged(before, config, Path("runs"))


@pytest.mark.parametrize(
    "value, limits, sentence",
    [
        (2**31, (0, 2**31 - 1), "give 0 to 2147483647"),
        (0.0, (1e-9, 1), "give more than 0, at most 1"),
        (-1, (0, math.inf), "give 0 or more"),
        (math.inf, (0, 1000), "x is inf: give 0 to 1000"),
        (math.nan, None, "x is nan: give a number"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_what_is_allowed(value, limits, sentence):
    with pytest.raises(UserError, match=sentence):
        check_ranges({"name": "adamw", "x": value}, {"x": limits} if limits else {})
