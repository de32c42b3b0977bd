"""The parts of both the decoder and the vision tower: linear maps, norms, and stacks of layers.

Layers come in groups. A group's parameters are stacked, with a leading axis, and run by a scan,
which compiles one layer however deep the model is; the value between two groups can be tapped.
Remat policies, by name: "none" keeps every activation for the backward pass; "full" keeps each
layer's input only, "attention" its attention's result as well, "dots" its matrix products' too.
Axes: I inputs · O outputs, of one or two axes.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.attention import MIXED
from afmrl_jax.models.partition import gathered, shard_rows

Layer = TypeVar("Layer", bound=nnx.Module)

# The activations that a layer keeps for the backward pass besides its input, from most to least.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(MIXED),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(MIXED),
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMATS = ("none", *REMAT_POLICIES)  # ordered from least recomputation to least memory
UNROLLED_LAYERS = 4  # layers; a loop over so few copies activations and spares little compile time


class Linear(nnx.Module):
    """x W + b, the matrix product in `dtype`, parameters in `param_dtype`.

    With an adapter (`models.lora`) x W + b + s (x A) B, where A and B are narrow and float32. The
    adapters with which the base model was trained, frozen, add as much again.
    """

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        bias: bool = True,
        scale: float,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        init = nnx.initializers.normal(scale)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, *outputs), param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype)) if bias else None
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        self.base_a, self.base_b = nnx.data(None), nnx.data(None)
        self.dtype, self.outputs = dtype, outputs

    def adapt(self, rank: int, scale: float, key: jax.Array) -> None:
        """Adds an adapter that changes nothing yet: A random, B zero.

        A's columns keep the size of x, whatever its width. Stacked layers get an adapter each.
        """
        *stack, inputs = self.kernel.shape[: -len(self.outputs)]
        noise = jax.random.normal(key, (*stack, inputs, rank), jnp.float32)
        self.lora_a = nnx.Param(noise * inputs**-0.5)
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, *self.outputs), jnp.float32))
        self.lora_scale = scale

    def add_base_adapter(self, rank: int) -> None:
        """Adds a frozen adapter of this rank, of zeros, whose scale is within B."""
        *stack, inputs = self.kernel.shape[: -len(self.outputs)]
        self.base_a = nnx.Param(jnp.zeros((*stack, inputs, rank), jnp.float32))
        self.base_b = nnx.Param(jnp.zeros((*stack, rank, *self.outputs), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., I]. Returns dtype[..., *O]."""
        return self._project(x, lambda array: array)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """The outputs cut along the first of their two axes, dtype[..., last axis of O] each.

        Each part is computed by its own product: cut out of a common result it would be copied.
        """
        return [
            self._project(x, operator.itemgetter((..., i, slice(None))))
            for i in range(self.outputs[0])
        ]

    def _project(self, x: jax.Array, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """part: parameter -> the columns of the outputs to compute."""
        # One flat token axis: with two, XLA's CPU weight gradient transposes cotangents in memory.
        tokens = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = self._product(tokens, part(self.kernel[...]))
        if self.bias is not None:
            y = y + part(self.bias[...]).astype(self.dtype)
        if self.lora_a is not None:
            low = self._product(tokens, self.lora_a[...]) * self.lora_scale
            y = y + self._product(low, part(self.lora_b[...]))
        if self.base_a is not None:
            y = y + self._product(self._product(tokens, self.base_a[...]), part(self.base_b[...]))
        return y.reshape(*x.shape[:-1], *y.shape[1:])

    def _product(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, matrix.astype(self.dtype), (((1,), (0,)), ((), ())))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def make_norm(kind: str, width: int, epsilon: float, **options: Any) -> nnx.Module:
    """LayerNorm where kind is "layer", RMSNorm where it is "rms"; options: rngs, dtypes."""
    if kind == "rms":
        return nnx.RMSNorm(width, epsilon=epsilon, **options)
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **options)


def check_remat(name: str) -> str:
    """The name itself; UserError where it is no remat policy."""
    if name not in REMATS:
        raise UserError(f"remat {name!r} does not exist; choose one of {', '.join(REMATS)}")
    return name


def stack_layers(
    make: Callable[[nnx.Rngs], Layer], groups: Sequence[int], rngs: nnx.Rngs
) -> nnx.List[Layer]:
    """Layers made with different keys: a module a group, its parameters stacked on a leading axis.

    groups: the number of layers of each group.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def stack(count: int) -> Layer:
        keys = jax.random.split(rngs.params(), count)
        return nnx.merge(graph, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))

    return nnx.List([stack(count) for count in groups])


def run_layers(
    layers: Layer,
    x: jax.Array,
    call: Callable[[Layer, jax.Array, Any], tuple[jax.Array, Any]],
    remat: str,
    xs: Any = None,
) -> tuple[jax.Array, Any]:
    """Feeds x through the stacked layers of one group in turn.

    call: (layer, x, the layer's slice of xs) -> (x, extra). xs: a pytree of arrays whose leading
    axis is the layers'. Returns x and the extras, stacked along the same axis.
    """
    graph, state = nnx.split(layers)
    unroll = len(jax.tree.leaves(state)[0]) <= UNROLLED_LAYERS

    def step(x: jax.Array, slices: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
        params, x_slice = slices
        layer = nnx.merge(graph, gathered(params, x.dtype))
        x, extra = call(layer, x, x_slice)
        return shard_rows(x), extra

    if remat != "none":
        # A loop keeps XLA from undoing the recomputation by itself; straight code does not.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return jax.lax.scan(step, shard_rows(x), (state, xs), unroll=unroll)
