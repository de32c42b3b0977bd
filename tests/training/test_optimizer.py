import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afmrl_jax.checkpoints.state import abstract_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import AXES
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.training.optimizer import Optimizer, learning_rate, make_optimizer


def options(**changes):
    fields = {
        "name": "adamw",
        "learning_rate": 0.1,
        "warmup_share": 0.1,
        "final_share": 0.02,
        "weight_decay": 0.5,
        "b1": 0.9,
        "b2": 0.98,
        "clip_norm": 1.0,
    }
    return Optimizer(**fields | changes)


def test_the_rate_warms_up_and_ends_at_its_final_share():
    rate = learning_rate(options(), 100)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)],
        [0, 0.05, 0.1, 0.051, 0.002],  # half a cosine down: the mean of .1 and .002
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_reaches_matrices_and_nothing_else(name):
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}}
    optimizer = make_optimizer(options(name=name, warmup_share=0.0), 10)
    zeros = {"layer": {name: jnp.zeros_like(x) for name, x in params["layer"].items()}}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 0.5)
    assert not updates["layer"]["bias"].any() and not updates["layer"]["scale"].any()


def test_the_last_step_of_a_short_run_is_warm_where_the_share_rounds_to_all_of_it():
    rate = learning_rate(options(warmup_share=0.99), 50)  # 49.5 steps, that is 50
    np.testing.assert_allclose([rate(0), rate(7), rate(49)], [0, 0.1 * 7 / 49, 0.1], rtol=1e-5)
    np.testing.assert_allclose(learning_rate(options(warmup_share=0.6), 1)(0), 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "steps, changes, told",
    [
        (0, {}, "steps is 0"),
        (5, {"warmup_share": 1.0}, "warmup_share is 1"),
        (5, {"b1": 1.0}, "b1 is 1.0: give 0 to 0.999999"),
        (5, {"b2": 1.0}, "b2 is 1.0: give 0 to 0.999999"),
        (5, {"b2": math.nan}, "b2 is nan"),
        (5, {"learning_rate": math.inf}, "learning_rate is inf: give 0 to 1e.38"),
        (5, {"weight_decay": math.inf}, "weight_decay is inf: give 0 to 1000"),
        (5, {"clip_norm": -1.0}, "optimizer.clip_norm is -1.0: give 0 to"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(steps, changes, told):
    with pytest.raises(UserError, match=told):
        make_optimizer(options(**changes), steps)


def test_a_norm_of_zero_clips_nothing():
    params, gradients = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.full((2, 2), 1e3)}

    def direction(clip_norm):
        optimizer = make_optimizer(options(clip_norm=clip_norm, b1=0.0, b2=0.0), 10)
        state = optimizer.init(params)
        return jax.tree.leaves(optimizer.update(gradients, state, params)[1])

    # Without decay of the moments the second one is the square of the gradient that AdamW gets.
    assert max(float(x.max()) for x in direction(0.0)) == 1e6
    assert max(float(x.max()) for x in direction(2.0)) == 1.0


@pytest.mark.parametrize("changes", [{"b1": 0.999999, "b2": 0.0}, {"b1": 0.0, "b2": 0.999999}])
def test_momenta_at_their_borders_give_finite_updates(changes):
    params = {"kernel": jnp.ones((2, 2))}
    update = first_update(params, params, **changes)["kernel"]
    assert np.isfinite(update).all() and (update < 0).all()


PARAMS = {
    "layers": [{"qkv": {"kernel": (2, 3, 3, 4)}, "up": {"kernel": (2, 6, 4), "bias": (2, 4)}}],
    "merger": {"kernel": (4, 8)},
    "lm_head": {"kernel": (4, 9)},
    "embed": {"embedding": (9, 4)},
}


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def first_update(params, gradients, **changes):
    optimizer = make_optimizer(options(warmup_share=0.0, clip_norm=1e9, **changes), 10)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_muon_steps_along_an_orthogonal_matrix_of_each_layer_and_of_query_key_and_value_apart():
    params, gradients = random_like(PARAMS, 0), random_like(PARAMS, 1)
    updates = first_update(params, gradients, name="muon", weight_decay=0.0)
    kernels = {
        "qkv": [updates["layers"][0]["qkv"]["kernel"][n, :, i] for n in range(2) for i in range(3)],
        "up": list(updates["layers"][0]["up"]["kernel"]),
        "merger": [updates["merger"]["kernel"]],
    }
    for name, matrices in kernels.items():
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False)
            # .2 sqrt(widest side) times the rate, and singular values of some .7 to 1.2: five
            # iterations do not converge.
            size = 0.1 * 0.2 * max(matrix.shape) ** 0.5
            assert (values > 0.6 * size).all() and (values < 1.3 * size).all(), name
    first = gradients["merger"]["kernel"]
    u, _, vt = np.linalg.svd(first, full_matrices=False)
    along = -np.asarray(updates["merger"]["kernel"]).ravel() @ (u @ vt).ravel()
    assert along > 0.95 * np.linalg.norm(updates["merger"]["kernel"]) * np.linalg.norm(u @ vt)


def test_muon_leaves_heads_embeddings_and_biases_to_adamw():
    params, gradients = random_like(PARAMS, 0), random_like(PARAMS, 1)
    found = first_update(params, gradients, name="muon", weight_decay=0.0)
    adam = optax.nadam(0.1, b1=0.9, b2=0.98)
    wanted, _ = adam.update(gradients, adam.init(params), params)
    for tree in (found, wanted):
        del tree["merger"], tree["layers"][0]["qkv"], tree["layers"][0]["up"]["kernel"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_on_the_mesh_as_their_parameters_do(name):
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 1), AXES)
    params = {
        "layers": [{"up": {"kernel": (2, 8, 4), "bias": (2, 4)}}],
        "embed": {"embedding": (8, 4)},
    }
    params = random_like(params, 0)
    shapes = jax.eval_shape(lambda: params)
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )
    state = abstract_state(shapes, make_optimizer(options(name=name), 10), mesh)
    kernels = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (2, 8, 4)]
    assert kernels and all(
        x.sharding == shapes["layers"][0]["up"]["kernel"].sharding for x in kernels
    )
    counts = [x for x in jax.tree.leaves(state.opt_state) if not x.shape]
    assert counts and all(x.sharding.is_fully_replicated for x in counts)


def test_an_optimizer_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="'adam', expected one of adamw, muon"):
        make_optimizer(options(name="adam"), 5)
