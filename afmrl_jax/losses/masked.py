"""Statistics over the entries that a mask keeps, computed on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def masked_quantiles(
    values: jax.Array, mask: jax.Array, levels: Sequence[float], steps: int = 16
) -> jax.Array:
    """Quantiles of the values where mask is True; 0 where it is True nowhere.

    A quantile is the smallest value with a share `level` of the values at or below it, to within
    (max - min) / 2^steps.
    values: float32, any shape. mask: bool, the same shape. levels: L shares in [0, 1].
    Returns float32[L].
    The method is bisection on counts: a sort would gather a sharded matrix, this only adds scalars.
    """
    count = jnp.sum(mask, dtype=jnp.float32)
    kept = jnp.where(mask, values, jnp.inf)
    highest = jnp.max(jnp.where(mask, values, -jnp.inf))
    counts = jnp.asarray(levels, jnp.float32) * count

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        below = [jnp.sum(kept <= m, dtype=jnp.float32) for m in middle]
        enough = jnp.stack(below) >= counts
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    start = (jnp.full_like(counts, jnp.min(kept)), jnp.full_like(counts, highest))
    return jnp.where(count > 0, lax.fori_loop(0, steps, halve, start)[1], 0.0)
