"""GradCache: the exact gradient of a contrastive loss over a batch that does not fit in memory.

The loss needs the embeddings of the whole batch at once, but not the activations behind them. So:
embed chunk by chunk and keep only the embeddings; differentiate the loss by the embeddings; then
embed each chunk again and pull its embeddings' gradient back to the parameters. It costs one more
forward pass, and reads the parameters three times a chunk. (Gao et al. 2021, arXiv 2101.06983.)

Axes: A chunks · C examples of a chunk · V views of an example · E embedding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Rows = dict[str, jax.Array]


def value_and_grad(
    embed: Callable[[Params, Rows], jax.Array], loss: Callable[[jax.Array], tuple[jax.Array, Any]]
) -> Callable[[Params, Rows], tuple[tuple[jax.Array, Any], Params]]:
    """Like jax.value_and_grad(has_aux=True) of `loss(embeddings of all chunks)` by the parameters.

    embed: (params, rows[C, V, ...]) -> float32[C, V, E]; loss: float32[A, C, V, E] -> scalar, aux.
    Returns a function of (params, rows[A, C, V, ...]) -> ((loss, aux), gradients).
    """

    def direct(params: Params, rows: Rows):
        def total(params):
            return loss(embed(params, jax.tree.map(lambda x: x[0], rows))[None])

        return jax.value_and_grad(total, has_aux=True)(params)

    def cached(params: Params, rows: Rows):
        embeddings = jax.lax.map(lambda chunk: embed(params, chunk), rows)
        value, by_embedding = jax.value_and_grad(loss, has_aux=True)(embeddings)

        def accumulate(total, chunk_and_gradient):
            chunk, gradient = chunk_and_gradient
            _, pull_back = jax.vjp(lambda p: embed(p, chunk), params)
            return jax.tree.map(jnp.add, total, *pull_back(gradient)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradients, _ = jax.lax.scan(accumulate, zeros, (rows, by_embedding))
        return value, gradients

    def chosen(params: Params, rows: Rows):
        chunks = next(iter(rows.values())).shape[0]
        return direct(params, rows) if chunks == 1 else cached(params, rows)

    return chosen
