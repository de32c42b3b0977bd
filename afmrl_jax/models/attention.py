"""The one attention of the tower and the decoder: grouped heads, any mask, softmax in float32.

Scores are the largest array of a layer, S / d times its queries. They are computed a few rows at a
time, so that a TPU's vector memory or a CPU's cache holds them, and computed again in the backward
pass, for which only one number a query is kept: the logarithm of its sum of exponentials.
Axes: N rows · S tokens or patches · H query heads · K key/value heads (H is R·K) · d head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from afmrl_jax.models.partition import row_shards
from afmrl_jax.models.rope import Angles, rotate

SCORES = 24 * 2**20  # bytes of float32 scores at a time; v5e's vector memory holds five times that
MIXED = "mixed"  # name, in remat policies, of the results that the backward pass needs
LOWEST = -1e30  # score of a masked key; finite, because masked keys alone would give NaN


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    angles: Angles,
    mask: jax.Array,
    causal: bool,
) -> jax.Array:
    """Scaled dot-product attention; queries and keys are turned by their angles first.

    query: [N, S, H, d]; key, value: [N, S, K, d]; angles: as `rotary_angles` makes them; mask:
    bool[N, S, S] or bool[N, 1, S], True where a query (rows) may see a key (columns). Returns
    [N, S, H, d]. A query that sees no key (padding) gets a finite average of values, for nobody to
    read. Neither angles nor mask have a gradient.
    """
    # cuDNN's flash attention takes half precision only, and with a mask even lengths only.
    fused = (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] % 2 == 0
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 128
    )
    if not fused:
        return _attend(causal, query, key, value, angles, mask)
    if mask.shape[1] == 1:
        mask = jnp.broadcast_to(mask, (mask.shape[0], query.shape[1], mask.shape[2]))
    return jax.nn.dot_product_attention(
        rotate(query, angles),
        rotate(key, angles),
        value,
        mask=mask[:, None],
        is_causal=causal,
        implementation="cudnn",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal: bool, *inputs: Any) -> jax.Array:
    return _forward(causal, *inputs)[0]


def _forward(causal: bool, *inputs: Any) -> tuple[jax.Array, tuple]:
    results = _by_rows(functools.partial(_mix, causal), inputs)
    mixed, log_total = checkpoint_name(results, MIXED)
    return mixed, (inputs, mixed, log_total)


def _backward(causal: bool, residuals: tuple, gradient: jax.Array) -> tuple:
    inputs, mixed, log_total = residuals
    arrays = (*inputs, mixed, log_total, gradient)
    return *_by_rows(functools.partial(_mix_back, causal), arrays), None, None


_attend.defvjp(_forward, _backward)


def _mix(causal: bool, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """The result of `attend`, and the logarithm of each query's sum of exponentials,
    float32[N, K, R, S]. inputs: `attend`'s arrays."""
    query, key, value = _turned(*inputs[:4])
    scores = jnp.where(_visible(inputs[4], causal), _scores(query, key), LOWEST)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest).astype(value.dtype)
    # A column of ones beside the values makes the same product sum the weights.
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    mixed = _einsum("nkrqs,nskd->nqkrd", weights, jnp.concatenate([value, ones], -1))
    mixed, total = mixed[..., :-1], mixed[..., -1:]
    log_total = largest[..., 0] + jnp.log(jnp.transpose(total[..., 0], (0, 2, 3, 1)))
    return (mixed / total).astype(value.dtype).reshape(inputs[0].shape), log_total


def _mix_back(causal: bool, *arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value before they were turned.

    arrays: `attend`'s; then both results of `_mix`, and the gradient of the first.
    """
    angles, mask, mixed, log_total, gradient = arrays[3:]
    query, key, value = _turned(*arrays[:4])
    mixed, gradient = mixed.reshape(query.shape), gradient.reshape(query.shape)
    weights = jnp.exp(_scores(query, key) - log_total[..., None])
    weights = jnp.where(_visible(mask, causal), weights, 0)
    by_value = _einsum("nkrqs,nqkrd->nskd", weights.astype(value.dtype), gradient)
    # A query's weights sum to one, so softmax centres their gradients by the weighted mean.
    common = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)
    common = jnp.transpose(common, (0, 2, 3, 1))[..., None]
    by_weight = _einsum("nqkrd,nskd->nkrqs", gradient, value)
    by_score = (weights * (by_weight - common)).astype(query.dtype)
    by_query = _einsum("nkrqs,nskd->nqkrd", by_score, key)
    by_key = _einsum("nkrqs,nqkrd->nskd", by_score, query)
    cos, sin = angles
    scale = query.shape[-1] ** -0.5
    by_query = rotate(by_query.reshape(arrays[0].shape), (cos * scale, -sin * scale))
    return tuple(x.astype(value.dtype) for x in (by_query, rotate(by_key, (cos, -sin)), by_value))


def _turned(
    query: jax.Array, key: jax.Array, value: jax.Array, angles: Angles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The query, turned and scaled, as [N, S, K, R, d]; the key, turned; the value."""
    scale = query.shape[-1] ** -0.5
    turned = rotate(query, tuple(part * scale for part in angles))
    rows, length, groups, size = key.shape
    return turned.reshape(rows, length, groups, -1, size), rotate(key, angles), value


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    return _einsum("nqkrd,nskd->nkrqs", query, key)


def _visible(mask: jax.Array, causal: bool) -> jax.Array:
    """The mask, without later keys where causal. mask: bool[N, S or 1, S]. Returns
    bool[N, 1, 1, S or 1, S]."""
    if causal:
        mask = mask & jnp.tril(jnp.ones((mask.shape[-1], mask.shape[-1]), bool))
    return mask[:, None, None]


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_rows(function: Callable[..., Any], inputs: tuple) -> Any:
    """function(*inputs), computed for as many rows at a time as SCORES allows.

    inputs: arrays whose first axis is N; the first array is the query.
    """
    rows, length, heads, _ = inputs[0].shape
    shards = row_shards(rows) or 1
    most = max(1, SCORES // (4 * heads * length**2))
    block = max(n for n in range(1, rows // shards + 1) if rows // shards % n == 0 and n <= most)
    if block * shards == rows:
        return function(*inputs)

    # Every device loops over its shard of the rows: the loop's axis stands before the sharded one.
    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, -1, block, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, shards * block, *x.shape[3:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, shards, block, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(rows, *x.shape[3:])

    blocks = jax.tree.map(cut, inputs)
    return jax.tree.map(join, jax.lax.map(lambda block: function(*block), blocks))
