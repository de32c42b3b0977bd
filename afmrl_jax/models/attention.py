"""The one attention of the tower and the decoder: grouped heads, any mask, softmax in float32.

Scores are the largest array of a layer, S / D times its queries. They are made a few rows at a
time, so that a TPU's vector memory or a CPU's cache holds them, and made again in the backward
pass, which keeps one number of each query instead.
Axes: N rows · S tokens or patches · H query heads · K key/value heads (H is R·K) · D head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from afmrl_jax.models.partition import row_shards
from afmrl_jax.models.rope import Angles, rotate

SCORES = 24 * 2**20  # bytes of float32 scores at a time: v5e's vector memory holds five such
MIXED = "mixed"  # the name by which a remat policy keeps what the backward pass needs
LOWEST = -1e30  # a score that nobody attends to; finite, so that a query that sees nothing is too


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    angles: Angles,
    mask: jax.Array,
    causal: bool,
) -> jax.Array:
    """Scaled dot-product attention of queries and keys that are turned by their angles.

    query: [N, S, H, D]; key, value: [N, S, K, D]; angles: as `rotary_angles` makes them; mask:
    bool[N, S, S] or bool[N, 1, S], True where a query (rows) may see a key (columns). Returns
    [N, S, H, D]. A query that sees nothing (padding) gets an average of values: finite, and read by
    nobody. Neither angles nor mask have a gradient.
    """
    # cuDNN's flash attention: half precision, and with a mask an even length.
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
    kept = _by_rows(functools.partial(_mix, causal), inputs)
    mixed, size = checkpoint_name(kept, MIXED)
    return mixed, (inputs, mixed, size)


def _backward(causal: bool, kept: tuple, gradient: jax.Array) -> tuple:
    inputs, mixed, size = kept
    given = (*inputs, mixed, size, gradient)
    return *_by_rows(functools.partial(_mix_back, causal), given), None, None


_attend.defvjp(_forward, _backward)


def _mix(causal: bool, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """What `attend` returns, and the logarithm of each query's sum of exponentials,
    float32[N, K, R, S]."""
    query, key, value = _turned(*inputs[:4])
    scores = jnp.where(_seen(inputs[4], causal), _scores(query, key), LOWEST)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest).astype(value.dtype)
    # One more column of values, all ones, sums the weights with the same product.
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    mixed = _einsum("nkrqs,nskd->nqkrd", weights, jnp.concatenate([value, ones], -1))
    mixed, total = mixed[..., :-1], mixed[..., -1:]
    size = largest[..., 0] + jnp.log(jnp.transpose(total[..., 0], (0, 2, 3, 1)))
    return (mixed / total).astype(value.dtype).reshape(inputs[0].shape), size


def _mix_back(
    causal: bool,
    *given: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, as they were before they were turned."""
    angles, mask, mixed, size, gradient = given[3:]
    query, key, value = _turned(*given[:4])
    mixed, gradient = mixed.reshape(query.shape), gradient.reshape(query.shape)
    weights = jnp.exp(_scores(query, key) - size[..., None])
    weights = jnp.where(_seen(mask, causal), weights, 0)
    by_value = _einsum("nkrqs,nqkrd->nskd", weights.astype(value.dtype), gradient)
    # Of all weights of a query together: what they are sums to one.
    common = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)
    common = jnp.transpose(common, (0, 2, 3, 1))[..., None]
    by_weight = _einsum("nqkrd,nskd->nkrqs", gradient, value)
    by_score = (weights * (by_weight - common)).astype(query.dtype)
    by_query = _einsum("nkrqs,nskd->nqkrd", by_score, key)
    by_key = _einsum("nkrqs,nqkrd->nskd", by_score, query)
    cos, sin = angles
    scale = query.shape[-1] ** -0.5
    by_query = rotate(by_query.reshape(given[0].shape), (cos * scale, -sin * scale))
    return tuple(x.astype(value.dtype) for x in (by_query, rotate(by_key, (cos, -sin)), by_value))


def _turned(
    query: jax.Array, key: jax.Array, value: jax.Array, angles: Angles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query as [N, S, K, R, D], scaled, and key, both turned; value."""
    scale = query.shape[-1] ** -0.5
    turned = rotate(query, tuple(part * scale for part in angles))
    rows, length, groups, size = key.shape
    return turned.reshape(rows, length, groups, -1, size), rotate(key, angles), value


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    return _einsum("nqkrd,nskd->nkrqs", query, key)


def _seen(mask: jax.Array, causal: bool) -> jax.Array:
    """mask: bool[N, S or 1, S]. Returns bool[N, 1, 1, S or 1, S]."""
    if causal:
        mask = mask & jnp.tril(jnp.ones((mask.shape[-1], mask.shape[-1]), bool))
    return mask[:, None, None]


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_rows(function: Callable[..., Any], inputs: tuple) -> Any:
    """function(*inputs), as many rows at a time as SCORES holds.

    inputs: arrays whose first axis is N, the first of them the query.
    """
    rows, length, heads, _ = inputs[0].shape
    shards = row_shards(rows) or 1
    most = max(1, SCORES // (4 * heads * length**2))
    block = max(n for n in range(1, rows // shards + 1) if rows // shards % n == 0 and n <= most)
    if block * shards == rows:
        return function(*inputs)

    # Each device goes through its own rows: the split axis stays, behind the loop's.
    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(shards, -1, block, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, shards * block, *x.shape[3:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, shards, block, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(rows, *x.shape[3:])

    blocks = jax.tree.map(cut, inputs)
    return jax.tree.map(join, jax.lax.map(lambda block: function(*block), blocks))
