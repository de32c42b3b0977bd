"""GradCache: the exact gradient of a contrastive loss over a batch that does not fit in memory.

The loss needs the embeddings of the whole batch at once, but not the activations behind them. So:
embed chunk by chunk and keep only the embeddings; differentiate the loss by the embeddings; then
embed each chunk again and pull its embeddings' gradient back to the parameters. It costs one more
forward pass, and reads the parameters three times a chunk. (Gao et al. 2021, arXiv 2101.06983.)

Axes: A micro-batches · C examples of one · V views of an example · E embedding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Rows = dict[str, jax.Array]


def value_and_grad(
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
        embeddings = jax.lax.map(lambda chunk: embed(params, chunk), rows)
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        value, (by_params, by_embedding) = both(params, embeddings)

        def accumulate(total, chunk_and_gradient):
            chunk, gradient = chunk_and_gradient
            _, pull_back = jax.vjp(lambda p: embed(p, chunk), params)
            return jax.tree.map(jnp.add, total, *pull_back(gradient)), None

        gradients, _ = jax.lax.scan(accumulate, by_params, (rows, by_embedding))
        return value, gradients

    def chosen(params: Params, rows: Rows):
        micro_batches = next(iter(rows.values())).shape[0]
        return direct(params, rows) if micro_batches == 1 else cached(params, rows)

    return chosen
