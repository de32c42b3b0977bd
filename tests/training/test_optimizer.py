import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.training.optimizer import learning_rate, make_optimizer


def config(**changes):
    fields = {
        "learning_rate": 0.1,
        "warmup_share": 0.1,
        "final_share": 0.02,
        "weight_decay": 0.5,
        "b1": 0.9,
        "b2": 0.98,
        "clip_norm": 1.0,
    }
    return ConfigDict(fields | changes)


def test_the_rate_warms_up_and_ends_at_its_final_share():
    rate = learning_rate(config(), 100)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)],
        [0, 0.05, 0.1, 0.051, 0.002],  # half a cosine down: the mean of .1 and .002
        rtol=1e-5,
    )


def test_decay_reaches_matrices_and_nothing_else():
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}}
    optimizer = make_optimizer(config(warmup_share=0.0), 10)
    zeros = {"layer": {name: jnp.zeros_like(x) for name, x in params["layer"].items()}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 0.5)
    assert not updates["layer"]["bias"].any() and not updates["layer"]["scale"].any()


@pytest.mark.parametrize(
    "steps, changes, told", [(0, {}, "steps is 0"), (5, {"warmup_share": 1.0}, "warmup_share is 1")]
)
def test_a_schedule_that_cannot_be_is_refused(steps, changes, told):
    with pytest.raises(UserError, match=told):
        make_optimizer(config(**changes), steps)
