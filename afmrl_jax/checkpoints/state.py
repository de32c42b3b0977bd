"""The state of a training run, which steps update, and its initial arrays in their shardings.

The source of randomness is the data stream, a pure function of the step, so there is no key here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from afmrl_jax.core.mesh import replicated
from afmrl_jax.core.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32[], number of finished steps. params (the trained ones) and opt_state: float32.

    memory: arrays of a method that steps update without training, as embeddings of past batches;
    nested dicts, {} for methods without a memory.
    Frozen parameters are no part of the state: neither donated nor saved.
    """

    step: jax.Array
    params: Params
    opt_state: Any  # tree of arrays
    memory: Params = field(default_factory=dict)


def abstract_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    memory: Params | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed.

    params, memory: abstract, with shardings. The optimizer's moments get those of their parameters.
    """
    placed = {path: x.sharding for path, x in jax.tree.leaves_with_path(params)}
    whole = replicated(mesh)

    def place(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        """A moment's path ends with its parameter's, however deep optimizers are nested."""
        ends = (path[start:] for start in range(len(path)))
        sharding = next((placed[end] for end in ends if end in placed), whole)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, params, opt_state, memory or {})


def init_state(
    params: Params | Callable[[], Params],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """The state at step 0, with a memory of zeros. Each device computes its shards alone: the whole
    state need not fit on one.

    params: parameters already in their shardings, or a function that makes them.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=_shardings(abstract.params))()
    opt_state = jax.jit(optimizer.init, out_shardings=_shardings(abstract.opt_state))(params)
    step = jax.device_put(jnp.int32(0), abstract.step.sharding)
    return TrainState(step, params, opt_state, zeros(abstract.memory))


def zeros(abstract: Params) -> Params:
    """Arrays of zeros with the shapes, dtypes and shardings of `abstract`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)


def _shardings(abstract: Params) -> Params:
    return jax.tree.map(lambda x: x.sharding, abstract)
