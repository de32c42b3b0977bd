"""LoRA: a narrow pair of matrices beside each frozen kernel, the only ones that are trained.

y = x W + alpha / r (x A) B (Hu et al. 2021, https://arxiv.org/abs/2106.09685), computed by
`layers.Linear`. This module chooses the kernels that get adapters, splits the parameters into
trained and frozen ones, and merges adapters. A base model that has adapters already keeps them,
frozen, beside the new ones: in bfloat16 W + A B often rounds to W.
Parameters are nested dicts. Without adapters all parameters are trained.
Axes: I inputs · r rank · O outputs, of one or two axes; stacked layers have their axis before.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.layers import Linear

ADAPTER = ("lora_a", "lora_b")  # A [I, r] and B [r, *O], float32
BASE = ("base_a", "base_b")  # the base model's adapters, frozen, their scale within B


@dataclass(frozen=True)
class LoRA:
    """How a model is adapted. Raises UserError for impossible numbers, or a broken pattern."""

    rank: int
    alpha: float  # an adapter's scale is alpha / rank
    targets: str  # regex, searched in each kernel's path, as layers.0.attention.query.kernel

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
    """Gives an adapter, which changes nothing yet, to each Linear whose kernel's path fits.

    Raises UserError where no path fits, and lists the model's paths.
    """
    linears = _linears(model)
    adapted = [module for path, module in linears if re.search(lora.targets, path)]
    for module in adapted:
        module.adapt(lora.rank, lora.scale, rngs.params())
    if not adapted:
        paths = ", ".join(path for path, _ in linears)
        raise UserError(f"lora_targets {lora.targets!r} fits no kernel; the model has {paths}")


def hold(model: nnx.Module, adapters: Sequence[LoRA]) -> None:
    """Makes room in each Linear for the adapters with which the base was trained (`apart`)."""
    for path, module in _linears(model):
        if rank := sum(lora.rank for lora in adapters if re.search(lora.targets, path)):
            module.hold(rank)


def _linears(model: nnx.Module) -> list[tuple[str, Linear]]:
    """Each Linear with its kernel's path."""
    return [
        (".".join(map(str, (*parts, "kernel"))).removeprefix("backbone."), module)
        for parts, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    ]


def split(params: Any, trainable: str = "") -> tuple[Any, Any]:
    """(trained, frozen): the adapters and the rest. Without adapters the parameters in whose path,
    as layers.gate.kernel, the regular expression `trainable` is found, by default all, and the
    rest.

    Raises UserError where it is found nowhere, and where there are adapters beside it.
    """
    adapters = _pick(params, lambda name: name in ADAPTER)
    if adapters:
        if trainable:
            raise UserError(
                f"the method trains the parameters {trainable!r}, and LoRA would train adapters: "
                "set model.lora_rank to 0"
            )
        return adapters, without(params)
    if not trainable:
        return params, {}
    trained = _matching(params, lambda path: bool(re.search(trainable, path)))
    if not trained:
        raise UserError(f"the method trains {trainable!r}, which is in no parameter's path")
    return trained, _matching(params, lambda path: not re.search(trainable, path))


def subset(params: Any, like: Any) -> Any:
    """Of the parameters those that `like`, a tree with some of their names, has."""
    if not isinstance(like, dict):
        return params
    return {name: subset(params[name], part) for name, part in like.items()}


def join(trained: Any, frozen: Any) -> Any:
    """The parameters that `split` took apart; nothing is copied."""
    params = dict(trained)
    for name, part in frozen.items():
        params[name] = join(params[name], part) if name in params else part
    return params


def without(params: Any) -> Any:
    """The parameters without the trained adapters: those with which training began.

    They fit a model made without adapters; nothing is copied.
    """
    return _pick(params, lambda name: name not in ADAPTER)


def merge(params: Any, scale: float, dtype: DTypeLike) -> Any:
    """The parameters of an equal model without adapters: W + scale A B for each adapted W.

    scale: LoRA's. The sum is computed in float32 and rounded once; all parameters become `dtype`.
    """
    if not isinstance(params, dict):
        return params.astype(dtype)
    merged = {n: merge(part, scale, dtype) for n, part in _others(params).items()}
    if pairs := _pairs(params, scale):
        total = params["kernel"].astype(jnp.float32)
        for a, b, s in pairs:
            low_rank = jnp.matmul(
                a, b.reshape(*a.shape[:-2], a.shape[-1], -1), precision=jax.lax.Precision.HIGHEST
            )
            total = total + s * low_rank.reshape(total.shape)
        merged["kernel"] = total.astype(dtype)
    return merged


def apart(params: Any, scale: float, dtype: DTypeLike) -> Any:
    """The parameters of an equal model whose adapters are all its base's, frozen (`hold`).

    scale: LoRA's. The other parameters become `dtype`, and nothing is added to them.
    """
    if not isinstance(params, dict):
        return params.astype(dtype)
    held = {n: apart(part, scale, dtype) for n, part in _others(params).items()}
    if pairs := _pairs(params, scale):
        ranks = pairs[0][0].ndim - 2  # the axis of B
        held["base_a"] = jnp.concatenate([a for a, _, _ in pairs], axis=-1)
        held["base_b"] = jnp.concatenate([s * b for _, b, s in pairs], axis=ranks)
    return held


def plain(params: Any) -> Any:
    """The parameters without any adapter; nothing is added to them."""
    return _pick(params, lambda name: name not in (*BASE, *ADAPTER))


def is_apart(params: Any) -> bool:
    """Whether a model holds its base's adapters."""
    return bool(_pick(params, lambda name: name in BASE))


def _others(params: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in params.items() if name not in (*BASE, *ADAPTER)}


def _pairs(params: dict[str, Any], scale: float) -> list[tuple[jax.Array, jax.Array, float]]:
    """A, B and the scale of each adapter of one kernel, the base's first."""
    both = ((BASE, 1.0), (ADAPTER, scale))
    return [(params[a], params[b], s) for (a, b), s in both if a in params]


def fingerprint(params: Any) -> str:
    """A hash of the parameters' names, shapes, dtypes and bits, the same on every mesh.

    The checksums are sums of whole numbers, exact in any order of summation. params: arrays.
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
    """uint32[]: the sum of each number's bits times an odd weight of its position, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (position * 2 + 1), dtype=jnp.uint32)


def _matching(params: Any, chosen: Callable[[str], bool], prefix: str = "") -> Any:
    """The leaves with chosen paths; branches that hold none are left out."""
    matching = {}
    for name, part in params.items():
        path = f"{prefix}{name}"
        if isinstance(part, dict):
            if inner := _matching(part, chosen, f"{path}."):
                matching[name] = inner
        elif chosen(path):
            matching[name] = part
    return matching


def _pick(params: Any, accepts: Callable[[str], bool]) -> Any:
    """The leaves with names that are accepted; branches without such leaves are left out."""
    picked = {}
    for name, part in params.items():
        if isinstance(part, dict):
            if branch := _pick(part, accepts):
                picked[name] = branch
        elif accepts(name):
            picked[name] = part
    return picked
