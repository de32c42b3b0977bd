"""Quantiles by bisection against a sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.losses.masked import masked_quantiles


def test_quantiles_are_those_of_a_sort_over_the_kept_values():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 40)).astype(np.float32)
    mask = rng.random((30, 40)) < 0.3
    levels = (0.0, 0.1, 0.5, 0.99, 1.0)
    expected = np.quantile(values[mask], levels, method="inverted_cdf")
    found = masked_quantiles(jnp.asarray(values), jnp.asarray(mask), levels, steps=24)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_quantiles_of_equal_values_are_that_value(value):
    found = masked_quantiles(jnp.full((4, 4), value), jnp.eye(4, dtype=bool), (0.1, 0.9))
    np.testing.assert_array_equal(found, [value, value])


def test_quantiles_of_nothing_are_zero():
    found = masked_quantiles(jnp.ones((4, 4)), jnp.zeros((4, 4), bool), (0.1, 0.9))
    np.testing.assert_array_equal(found, [0, 0])
