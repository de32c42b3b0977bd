"""The attention against the same thing written out: values, gradients, masks, blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afmrl_jax.models import attention
from afmrl_jax.models.attention import attend
from afmrl_jax.models.layers import run_layers
from afmrl_jax.models.rope import rotary_angles, rotate

N, S, D = 4, 24, 16


def make(heads, groups, dtype, masked):
    """Query, key, value, angles, and a mask: two images, of a row each (segments), or padding."""
    random = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(random.normal(size=(N, S, h, D)), dtype) for h in (heads, groups, groups)
    )
    positions = jnp.asarray(random.integers(0, 30, (N, S, 2)), jnp.int32)
    axes, frequencies = np.tile([0, 1], D // 4), np.geomspace(1, 0.1, D // 2).astype(np.float32)
    angles = rotary_angles(positions, axes, frequencies)
    if masked == "segments":
        segments = jnp.asarray(np.sort(random.integers(0, 3, (N, S))))
        mask = segments[:, :, None] == segments[:, None, :]
    else:
        mask = jnp.asarray(random.random((N, 1, S)) < 0.8).at[:, :, 0].set(True)
    return query, key, value, angles, mask


def plain(query, key, value, angles, mask, causal):
    """The same in float32, all rows at once, and differentiated by JAX."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query, key = rotate(query, angles), rotate(key, angles)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    seen = mask & jnp.tril(jnp.ones((S, S), bool)) if causal else mask
    scores = jnp.einsum("nqhd,nshd->nhqs", query, key) * D**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("nhqs,nshd->nqhd", weights, value)


def both(function, inputs, causal):
    """Values, and gradients of the sum of their cubes."""

    def loss(*parts):
        mixed = function(*parts, *inputs[3:], causal).astype(jnp.float32)
        return jnp.sum(mixed**3), mixed

    gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs[:3])
    return mixed, *gradients


CASES = [(4, 4, "segments", False), (4, 2, "padding", True), (6, 1, "padding", False)]


@pytest.mark.parametrize("rows_at_once", [1, 2, N])
@pytest.mark.parametrize(("heads", "groups", "masked", "causal"), CASES)
def test_values_and_gradients_equal_plain_attention(
    monkeypatch, heads, groups, masked, causal, rows_at_once
):
    monkeypatch.setattr(attention, "SCORES", rows_at_once * heads * S * S * 4)
    inputs = make(heads, groups, jnp.float32, masked)
    for ours, theirs in zip(both(attend, inputs, causal), both(plain, inputs, causal)):
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(("heads", "groups", "masked", "causal"), CASES)
def test_bfloat16_differs_by_its_own_rounding_alone(heads, groups, masked, causal):
    """Inputs, weights, and what comes out are rounded to 8 bits, each 2**-9 of it: sums are not."""
    inputs = make(heads, groups, jnp.bfloat16, masked)
    ours, theirs = both(attend, inputs, causal), both(plain, inputs, causal)
    for one, other in zip(ours, theirs):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.abs(one - other).max() <= 2**-6 * np.abs(other).max()
        assert np.linalg.norm(one - other) <= 2**-7 * np.linalg.norm(other)


def test_large_scores_neither_overflow_nor_lose_the_sum():
    query, key, value, angles, mask = make(2, 2, jnp.float32, "padding")
    inputs = 100 * query, key, value, angles, mask
    for ours, theirs in zip(both(attend, inputs, True), both(plain, inputs, True)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


def test_a_query_that_sees_nothing_is_finite_and_moves_nothing():
    query, key, value, angles, _ = make(2, 2, jnp.float32, "padding")
    inputs = query, key, value, angles, jnp.zeros((N, 1, S), bool)
    mixed, *gradients = both(attend, inputs, False)
    np.testing.assert_allclose(
        mixed, jnp.broadcast_to(value.mean(1, keepdims=True), mixed.shape), atol=1e-5
    )
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_rows_go_through_in_blocks_and_none_is_left_out(monkeypatch):
    """What the backward pass holds of scores is a block's, whatever the number of rows."""
    heads = 4
    monkeypatch.setattr(attention, "SCORES", heads * S * S * 4)
    inputs = make(heads, heads, jnp.float32, "segments")
    text = jax.jit(lambda *x: both(attend, x, False)).lower(*inputs).as_text()
    assert f"tensor<1x{heads}x1x{S}x{S}xf32>" in text
    assert f"tensor<{N}x{heads}x1x{S}x{S}xf32>" not in text


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_only_full_remat_attends_once_more_for_the_backward_pass(remat):
    """Scores themselves are made twice, whatever is kept."""
    times = 3 if remat == "full" else 2

    class Layer(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones((5, 1)))  # of five layers

    query, _, _, angles, mask = make(2, 2, jnp.float32, "segments")

    def loss(x):
        def call(layer, x, _):
            return attend(x * layer.scale[...], x, x, angles, mask, False), None

        return jnp.sum(run_layers(Layer(), x, call, remat)[0])

    assert str(jax.make_jaxpr(jax.grad(loss))(query)).count(" exp ") == times
