"""The update of parameters, which every training program shares."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from afmrl_jax.checkpoints.state import TrainState, init_state
from afmrl_jax.core.mesh import replicated
from afmrl_jax.core.types import Metrics, Params
from afmrl_jax.planning.report import Part
from afmrl_jax.training.goodput import abstract_host

Memory = Any  # the same: what a method carries from step to step and does not train
Batch = dict[str, Any]
Gradient = Callable[
    [Params, Params, Memory, Batch], tuple[tuple[jax.Array, Memory, Metrics], Params]
]
StepFunction = Callable[[Params, TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    flops: Callable[[Batch], jax.Array],
) -> StepFunction:
    """The jitted function (frozen, state, batch) -> (state, metrics), the state donated.

    gradient: (trained, frozen, memory, batch) -> ((value, memory, metrics), gradients by trained).
    Where its metrics hold `is_empty`, bool[], a batch that is empty moves neither parameters nor
    the optimizer's moments.
    abstract: the state's shapes and shardings. flops: of a batch, useful ones of the whole step.
    batch: beside the gradient's arrays `host`, which the loop adds and reads among the metrics;
    and, where several updates learn from one batch, `advance`, int32[], the steps that are done
    with this one: 0 but for the last.
    metrics: the gradient's, and loss, gradient_norm, finite (bool), flops, host; each is whole on
    every device.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    @functools.partial(
        jax.jit, donate_argnames="state", out_shardings=(shardings, replicated(mesh))
    )
    def step(frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arrays = dict(batch)
        host, advance = arrays.pop("host"), arrays.pop("advance", 1)
        (value, memory, metrics), gradients = gradient(state.params, frozen, state.memory, arrays)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        norm, change = optax.global_norm(gradients), optax.global_norm(updates)
        metrics = dict(metrics)
        is_empty = metrics.pop("is_empty", None)
        if is_empty is None:
            trained = optax.apply_updates(state.params, updates)
        else:
            trained, opt_state = jax.lax.cond(
                is_empty,
                lambda: (state.params, state.opt_state),
                lambda: (optax.apply_updates(state.params, updates), opt_state),
            )
        metrics |= {
            "loss": value,
            "gradient_norm": norm,
            "finite": jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(change),
            "host": host,
            "flops": flops(arrays),
        }
        return TrainState(state.step + advance, trained, opt_state, memory), metrics

    return step


@dataclass(frozen=True)
class TrainStep:
    """A step before anything is computed: its function, and what its arguments look like."""

    function: StepFunction  # jitted
    optimizer: optax.GradientTransformation
    abstract: TrainState
    frozen: Params  # abstract parameters beside the state's; {} where all are trained
    heads: Params = field(default_factory=dict)  # of the state's parameters, those of no model

    def initial(self, params: Params | Callable[[], Params]) -> TrainState:
        """The state at step 0. params: those that are trained, or a function that makes them."""
        return init_state(params, self.optimizer, self.abstract)

    def part(
        self,
        batch: Batch,
        *,
        intermediates: dict[str, float],
        useful: float,
        name: str = "step",
    ) -> Part:
        """The step as planning compiles it.

        batch: abstract, with shardings. intermediates, useful: as `Part` says.
        """
        state = self.abstract
        batch = batch | {"host": abstract_host(state.step.sharding.mesh)}
        named = {
            "parameters": (self.frozen, state.params),
            "optimizer": state.opt_state,
            "batch": batch,
        }
        if state.memory:
            named["memory"] = state.memory
        return Part(name, self.function, (self.frozen, state, batch), named, intermediates, useful)
