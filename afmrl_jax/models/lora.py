"""LoRA: a narrow pair of matrices beside each frozen kernel, the only ones that are trained.

y = x W + alpha / r (x A) B (Hu et al. 2021, https://arxiv.org/abs/2106.09685), computed by
`layers.Linear`; here are which kernels get one, the parameters taken apart, and the merge.
Parameters are nested dicts; in those of a model without adapters all are trained, none is frozen.
Axes: D inputs · r rank · O outputs, of one or two axes; stacked layers have their axis before.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.layers import Linear

ADAPTER = ("lora_a", "lora_b")  # A [D, r] and B [r, *O], float32


@dataclass(frozen=True)
class LoRA:
    """How a model is adapted. Raises UserError for numbers that cannot be, or a broken pattern."""

    rank: int
    alpha: float  # an adapter counts alpha / rank
    targets: str  # searched in each kernel's path, such as layers.0.attention.query.kernel

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"LoRA of rank {self.rank} and alpha {self.alpha:g}: both must be above 0"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"lora_targets {self.targets!r} is no pattern: {error}") from None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapt(model: nnx.Module, lora: LoRA, rngs: nnx.Rngs) -> None:
    """Gives adapters, which change nothing yet, to each Linear whose kernel's path fits.

    Raises UserError where none does, naming the paths that there are.
    """
    paths, fitting = [], 0
    for parts, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            path = ".".join(map(str, (*parts, "kernel"))).removeprefix("backbone.")
            paths.append(path)
            if re.search(lora.targets, path):
                module.adapt(lora.rank, lora.scale, rngs.params())
                fitting += 1
    if not fitting:
        raise UserError(
            f"lora_targets {lora.targets!r} fits no kernel; the model has {', '.join(paths)}"
        )


def split(params: Any) -> tuple[Any, Any]:
    """(trained, frozen): the adapters and the rest; all and {} where there are no adapters."""
    adapters = _pick(params, lambda name: name in ADAPTER)
    return (adapters, without(params)) if adapters else (params, {})


def join(trained: Any, frozen: Any) -> Any:
    """The parameters that `split` took apart; nothing is copied."""
    both = dict(trained)
    for name, part in frozen.items():
        both[name] = join(both[name], part) if name in both else part
    return both


def without(params: Any) -> Any:
    """The parameters as if the adapters were not there: what training began with.

    They fit a model made without adapters; nothing is copied.
    """
    return _pick(params, lambda name: name not in ADAPTER)


def merge(params: Any, scale: float, dtype: DTypeLike) -> Any:
    """The parameters of an equal model without adapters: W + scale A B for each W that has them.

    scale: LoRA's. The sum is computed in float32 and rounded once; all parameters become `dtype`.
    """
    if not isinstance(params, dict):
        return params.astype(dtype)
    merged = {n: merge(part, scale, dtype) for n, part in params.items() if n not in ADAPTER}
    if "lora_a" in params:
        a, b, kernel = params["lora_a"], params["lora_b"], params["kernel"]
        low_rank = jnp.matmul(
            a, b.reshape(*a.shape[:-2], a.shape[-1], -1), precision=jax.lax.Precision.HIGHEST
        )
        total = kernel.astype(jnp.float32) + scale * low_rank.reshape(kernel.shape)
        merged["kernel"] = total.astype(dtype)
    return merged


def fingerprint(params: Any) -> str:
    """Tells these parameters from any others, on whatever mesh: names, shapes, dtypes and all bits.

    A checksum in whole numbers, exact in any order of summation. params: arrays.
    """
    sums = jax.jit(lambda tree: jax.tree.map(_checksum, tree))(params)
    content = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(number))
        for (path, leaf), number in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sums)
        )
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _checksum(x: jax.Array) -> jax.Array:
    """uint32[]: each number's bits, times an odd weight of its place, summed modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (place * 2 + 1), dtype=jnp.uint32)


def _pick(params: Any, wanted: Callable[[str], bool]) -> Any:
    """The leaves with wanted names; branches that hold none are left out."""
    found = {}
    for name, part in params.items():
        if isinstance(part, dict):
            if inner := _pick(part, wanted):
                found[name] = inner
        elif wanted(name):
            found[name] = part
    return found
