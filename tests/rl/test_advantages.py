"""Group advantages: numbers worked by hand, and what must hold for any rewards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from afmrl_jax.rl.advantages import group_advantages

REWARDS = np.array([[0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [-0.1, 1, 1, 0.5]], np.float32)


def test_advantages_are_rewards_less_the_mean_over_the_std_of_their_group():
    groups = group_advantages(REWARDS, scale=True, epsilon=0.0)
    std = np.sqrt(3) / 4  # of 0, 0, 0, 1: the mean is 1/4, the variance 3/16
    np.testing.assert_allclose(groups.values[0], np.array([-0.25, -0.25, -0.25, 0.75]) / std, 1e-6)
    # of -.1, 1, 1, .5: the mean is .6, the deviations -.7, .4, .4, -.1, the variance .205
    expected = np.array([-0.7, 0.4, 0.4, -0.1]) / np.sqrt(0.205)
    np.testing.assert_allclose(groups.values[2], expected, 1e-5)
    np.testing.assert_allclose(groups.std, [std, 0, np.sqrt(0.205)], 1e-6)
    assert groups.values.dtype == groups.std.dtype == np.float32


def test_dr_grpo_does_not_divide_by_the_std():
    groups = group_advantages(REWARDS, scale=False)
    np.testing.assert_allclose(groups.values[2], [-0.7, 0.4, 0.4, -0.1], rtol=1e-6)


def test_a_group_of_equal_rewards_is_told_and_gets_no_advantage_at_all():
    groups = group_advantages(REWARDS, scale=True)
    assert groups.zero_variance.tolist() == [False, True, False]
    np.testing.assert_array_equal(groups.values[1], 0)  # though .1 is no number in binary


def test_differences_of_rounding_do_not_become_large_advantages():
    half = np.float32(0.5)
    groups = group_advantages(
        np.array([[half, half, np.nextafter(half, np.float32(1))]]), scale=True
    )
    assert not groups.zero_variance[0] and np.abs(groups.values).max() < 1e-3


@settings(max_examples=50)
@given(arrays(np.float32, (3, 5), elements=st.floats(-10, 10, width=32)), st.booleans())
def test_advantages_of_a_group_cancel_and_shifting_all_rewards_changes_nothing(rewards, scale):
    values = group_advantages(rewards, scale).values
    np.testing.assert_allclose(values.sum(axis=1), 0, atol=1e-4)
    shifted = group_advantages((rewards.astype(np.float64) + 1).astype(np.float64), scale).values
    np.testing.assert_allclose(shifted, values, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(np.zeros((3, 1)), "2 or more"), (np.zeros(3), "2 or more"), ([[0, np.nan]], "1 rewards")],
)
def test_rewards_that_can_not_be_compared_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        group_advantages(np.asarray(wrong), scale=True)
