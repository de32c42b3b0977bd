"""What a training run carries from step to step, born in its shardings.

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32[], the steps done. params, those that are trained, and opt_state: float32.

    memory: what a method carries from step to step and does not train, as embeddings of past
    batches; nested dicts of arrays, {} where there is nothing.
    Frozen parameters are no part of the state: neither donated nor saved.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    memory: Any = field(default_factory=dict)


def abstract_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, memory: Any = None
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed.

    params, memory: abstract, with shardings. The optimizer's moments lie as their parameters do.
    """
    placed = {path: x.sharding for path, x in jax.tree.leaves_with_path(params)}
    whole = replicated(mesh)

    def place(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        """A moment's path ends as its parameter's, however optimizers are nested around it."""
        ends = (path[start:] for start in range(len(path)))
        sharding = next((placed[end] for end in ends if end in placed), whole)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, params, opt_state, memory or {})


def init_state(
    params: Any | Callable[[], Any],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """The state at step 0, computed by the devices that keep it: never whole on one of them. Its
    memory is zeros.

    params: parameters already in their shardings, or a function that makes them.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=_shardings(abstract.params))()
    opt_state = jax.jit(optimizer.init, out_shardings=_shardings(abstract.opt_state))(params)
    step = jax.device_put(jnp.int32(0), abstract.step.sharding)
    return TrainState(step, params, opt_state, zeros(abstract.memory))


def zeros(abstract: Any) -> Any:
    """Arrays of zeros as `abstract` says, in its shardings."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)
