"""Layers of one kind as one: parameters stacked along a leading axis, run by a scan.

A scan compiles one layer however deep the model is. Remat policies, by name: "none" keeps every
activation for the backward pass, "full" keeps each layer's input only, "dots" also keeps the
results of its matrix products.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from afmrl_jax.core.errors import UserError

Layer = TypeVar("Layer", bound=nnx.Module)

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(name: str) -> str:
    """The name itself; UserError where it is no remat policy."""
    if name != "none" and name not in REMAT_POLICIES:
        raise UserError(f"remat {name!r} does not exist; choose one of none, full, dots")
    return name


def stack_layers(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """`count` layers made with different keys, as one module whose parameters have a leading axis."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    return nnx.merge(graph, state)


def run_layers(
    layers: Layer, x: jax.Array, call: Callable[[Layer, jax.Array], jax.Array], remat: str
) -> jax.Array:
    """Feeds x through stacked layers in turn, `call(layer, x)` for each; returns the last's output."""
    graph, state = nnx.split(layers)

    def step(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
        return call(nnx.merge(graph, state), x), None

    if remat != "none":
        # Inside a scan the loop itself keeps XLA from undoing the recomputation.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, state)[0]
