"""Gradient accumulation: a batch in micro-batches, with the gradient of the whole.

A loss is a sum and a denominator. Sums and gradients of sums add up exactly; a mean of means would
weigh a short answer in one micro-batch more than in another.

Axes: A micro-batches · C rows of one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Rows = dict[str, jax.Array]


def value_and_grad(
    loss: Callable[[Params, Rows], tuple[jax.Array, jax.Array]],
) -> Callable[[Params, Rows], tuple[tuple[jax.Array, jax.Array], Params]]:
    """The mean loss of a batch and its gradient by the parameters.

    loss: (params, rows[C, ...]) -> (sum, denominator), float32[]; the denominator depends on no
    parameter. Returns a function of (params, rows[A, C, ...]) -> ((sum / denominator, denominator),
    gradients), all of them over the whole batch; 0 where the denominator is.
    """
    part = jax.value_and_grad(loss, has_aux=True)

    def whole(params: Params, rows: Rows):
        first = jax.tree.map(lambda x: x[0], rows)
        if next(iter(rows.values())).shape[0] == 1:
            (total, count), gradients = part(params, first)
        else:
            shapes = jax.eval_shape(part, params, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(totals, rows):
                return jax.tree.map(jnp.add, totals, part(params, rows)), None

            ((total, count), gradients), _ = jax.lax.scan(add, zeros, rows)
        scale = 1 / jnp.maximum(count, 1)
        return (total * scale, count), jax.tree.map(lambda x: x * scale, gradients)

    return whole
