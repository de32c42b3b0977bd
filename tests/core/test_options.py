import dataclasses
import math
from dataclasses import dataclass

import pytest
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, among, between, check_options


@dataclass(frozen=True)
class Rows(Options, section="data"):
    max_tokens: int = between(8)
    prompt: str = among("plain", "chat")


@dataclass(frozen=True)
class Loss(Options, section="loss"):
    temperature: float = between(1e-4, 10)
    symmetric: bool
    rows: Rows


def page(**loss) -> ConfigDict:
    values = {"temperature": 1, "symmetric": True} | loss
    return ConfigDict({"loss": values, "data": {"max_tokens": 64, "prompt": "plain", "more": 1}})


def test_a_section_is_read_into_the_fields_of_its_name():
    options = Loss.of(page())
    assert options == Loss(1.0, True, Rows(64, "plain"))
    assert type(options.temperature) is float  # though the page says 1


@pytest.mark.parametrize(
    "loss, told",
    [
        ({"temperature": 0.0}, "loss.temperature is 0.0: give 0.0001 to 10"),
        ({"temperature": math.nan}, "loss.temperature is nan: give a number"),
        ({"temperature": math.inf}, "loss.temperature is inf: give 0.0001 to 10"),
    ],
)
def test_a_value_out_of_its_range_is_named_as_a_flag_names_it(loss, told):
    with pytest.raises(UserError, match=told):
        Loss.of(page(**loss))


def test_a_word_that_is_none_of_them_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"data\.prompt is .chta.*mean .chat"):
        dataclasses.replace(Rows(8, "chat"), prompt="chta")


def test_a_field_that_a_page_lacks_is_named():
    with pytest.raises(UserError, match=r"loss\.symmetric is missing from the"):
        check_options(ConfigDict({"loss": {"temperature": 1.0}}), [Rows, Loss][1:])
