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
Rows = Any  # a tree of arrays


def value_and_grad(loss: Callable[[Params, Rows], tuple]) -> Callable[[Params, Rows], tuple]:
    """The mean loss of a batch and its gradient by the parameters.

    loss: (params, rows[C, ...]) -> (sum, denominator, *more), the two float32[]; the denominator
    depends on no parameter. Returns a function of (params, rows[A, C, ...]) ->
    ((sum / denominator, denominator, *more), gradients), all of them over the whole batch; 0 where
    the denominator is. more: what else the loss told of each micro-batch, [A, ...].
    """

    def apart(params: Params, rows: Rows):
        total, count, *more = loss(params, rows)
        return total, (count, more)

    part = jax.value_and_grad(apart, has_aux=True)

    def one(params: Params, rows: Rows):
        (total, (count, more)), gradients = part(params, rows)
        return (total, count, gradients), more

    def whole(params: Params, rows: Rows):
        first = jax.tree.map(lambda x: x[0], rows)
        if len(jax.tree.leaves(rows)[0]) == 1:
            sums, more = one(params, first)
            more = jax.tree.map(lambda x: x[None], more)
        else:
            shapes, _ = jax.eval_shape(one, params, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(totals, rows):
                sums, more = one(params, rows)
                return jax.tree.map(jnp.add, totals, sums), more

            sums, more = jax.lax.scan(add, zeros, rows)
        total, count, gradients = sums
        scale = 1 / jnp.maximum(count, 1)
        return (total * scale, count, *more), jax.tree.map(lambda x: x * scale, gradients)

    return whole
