"""The values that a field may have."""

import math

import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_range


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
