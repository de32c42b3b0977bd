"""Exact gradients of batches that do not fit in memory at once: GradCache and accumulation.

GradCache is for a contrastive loss, which needs the embeddings of the whole batch at once, but not
the activations behind them. So: embed micro-batch by micro-batch and keep only the embeddings;
differentiate the loss by the embeddings; then embed each micro-batch again and pull its embeddings'
gradient back to the parameters. It costs one more forward pass, and reads the parameters three
times a micro-batch. (Gao et al. 2021, arXiv 2101.06983.)

Accumulation is for a loss that is a sum and a denominator. Sums and gradients of sums add up
exactly; a mean of means would weigh a short answer in one micro-batch more than in another.

Axes: A micro-batches · C examples of one · V views of an example · E embedding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from afmrl_jax.core.types import Params

Rows = Any  # a tree of arrays


def gradcache(
    embed: Callable[[Params, Rows], jax.Array],
    loss: Callable[[Params, jax.Array], tuple[jax.Array, Any]],
) -> Callable[[Params, Rows], tuple[tuple[jax.Array, Any], Params]]:
    """Like jax.value_and_grad(has_aux=True) of `loss(params, embeddings of the batch)` by params.

    embed: (params, rows[C, V, ...]) -> float32[C, V, E].
    loss: (params, float32[A, C, V, E]) -> scalar, aux; it may use parameters that embed does not.
    Returns a function of (params, rows[A, C, V, ...]) -> ((loss, aux), gradients).
    """

    def direct(params: Params, rows: Rows):
        def total(params):
            return loss(params, embed(params, jax.tree.map(lambda x: x[0], rows))[None])

        return jax.value_and_grad(total, has_aux=True)(params)

    def cached(params: Params, rows: Rows):
        embeddings = jax.lax.map(lambda part: embed(params, part), rows)
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        value, (by_params, by_embedding) = both(params, embeddings)

        def add(total, part_and_gradient):
            part, gradient = part_and_gradient
            _, pull_back = jax.vjp(lambda p: embed(p, part), params)
            return jax.tree.map(jnp.add, total, *pull_back(gradient)), None

        gradients, _ = jax.lax.scan(add, by_params, (rows, by_embedding))
        return value, gradients

    def chosen(params: Params, rows: Rows):
        micro_batches = next(iter(rows.values())).shape[0]
        return direct(params, rows) if micro_batches == 1 else cached(params, rows)

    return chosen


def accumulate(loss: Callable[[Params, Rows], tuple]) -> Callable[[Params, Rows], tuple]:
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

    def of_micro_batch(params: Params, rows: Rows):
        (total, (count, more)), gradients = part(params, rows)
        return (total, count, gradients), more

    def whole(params: Params, rows: Rows):
        first = jax.tree.map(lambda x: x[0], rows)
        if len(jax.tree.leaves(rows)[0]) == 1:
            sums, more = of_micro_batch(params, first)
            more = jax.tree.map(lambda x: x[None], more)
        else:
            shapes, _ = jax.eval_shape(of_micro_batch, params, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(totals, rows):
                sums, more = of_micro_batch(params, rows)
                return jax.tree.map(jnp.add, totals, sums), more

            sums, more = jax.lax.scan(add, zeros, rows)
        total, count, gradients = sums
        scale = 1 / jnp.maximum(count, 1)
        return (total * scale, count, *more), jax.tree.map(lambda x: x * scale, gradients)

    return whole
