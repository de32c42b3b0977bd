"""The values that a field may have."""

import json
import math

import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_range, load_named


@pytest.mark.parametrize(
    "value, limits, sentence",
    [
        (2**31, (0, 2**31 - 1), "give 0 to 2147483647"),
        (0.0, (1e-9, 1), "give more than 0, at most 1"),
        (-1, (0, math.inf), "give 0 or more"),
        (math.inf, (0, 1000), "x is inf: give 0 to 1000"),
        (math.nan, (0, 1), "x is nan: give 0 to 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_what_is_allowed(value, limits, sentence):
    with pytest.raises(UserError, match=sentence):
        check_range("x", value, *limits)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aglc", "x is 'aglc', expected one of agcl, module:NAME; did you mean \"agcl\""),
        ("nowhere:NAME", "x is 'nowhere:NAME', and there is no module nowhere: name one that"),
        ("json.nowhere:NAME", "there is no module json.nowhere"),
        ("json:NAME", "x is 'json:NAME', and json has no NAME"),
        ("json:", "x is 'json:': write it as module:NAME"),
        (":NAME", "x is ':NAME': write it as module:NAME"),
        (".json:loads", "x is '.json:loads': write it as module:NAME"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_with_its_field(name, says):
    with pytest.raises(UserError, match=says):
        load_named(name, {"agcl": "json:loads"}, "x")


def test_a_name_stands_for_a_part_of_a_module():
    assert load_named("agcl", {"agcl": "json:loads"}, "x") is json.loads
    assert load_named("json.decoder:JSONDecoder", {}, "x") is json.decoder.JSONDecoder


def test_a_module_that_lacks_another_says_which(tmp_path, monkeypatch):
    """Its name begins with the other's, and is not the other's."""
    (tmp_path / "nowhere_else.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="'nowhere'"):
        load_named("nowhere_else:NAME", {}, "x")
