"""LoRA: a narrow pair of matrices beside each frozen kernel; only these pairs are trained.

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

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.types import Params
from afmrl_jax.models.layers import Linear

ADAPTER = ("lora_a", "lora_b")  # A [I, r] and B [r, *O], float32
BASE = ("base_a", "base_b")  # the base model's frozen adapters, with their scale within B


@dataclass(frozen=True)
class LoRA:
    """How a model is adapted. Raises UserError for impossible numbers, or a broken pattern."""

    rank: int
    alpha: float  # an adapter's scale is alpha / rank
    # A regular expression, searched in each kernel's path, as layers.0.attention.query.kernel.
    targets: str

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


def add_base_adapters(model: nnx.Module, adapters: Sequence[LoRA]) -> None:
    """Adds frozen adapters, of zeros, to the Linears that the base's training adapted.

    Their parameters come from `as_base_adapters`.
    """
    for path, module in _linears(model):
        if rank := sum(lora.rank for lora in adapters if re.search(lora.targets, path)):
            module.add_base_adapter(rank)


def _linears(model: nnx.Module) -> list[tuple[str, Linear]]:
    """Each Linear with its kernel's path."""
    return [
        (".".join(map(str, (*parts, "kernel"))).removeprefix("backbone."), module)
        for parts, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    ]


def split(params: Params, trainable: str = "") -> tuple[Params, Params]:
    """(trained, frozen): the adapters, and the other parameters.

    trainable: without adapters, a regular expression that is searched in each parameter's path, as
    layers.gate.kernel; those that match are trained, by default all.
    Raises UserError where no path matches, and where there are adapters and a `trainable` too.
    """
    adapters = _pick(params, lambda name: name in ADAPTER)
    if adapters:
        if trainable:
            raise UserError(
                f"the method trains the parameters {trainable!r}, and LoRA would train adapters: "
                "set model.lora_rank to 0"
            )
        return adapters, without_adapters(params)
    if not trainable:
        return params, {}
    trained = _matching(params, lambda path: bool(re.search(trainable, path)))
    if not trained:
        raise UserError(f"the method trains {trainable!r}, which is in no parameter's path")
    return trained, _matching(params, lambda path: not re.search(trainable, path))


def subset(params: Params, like: Params) -> Params:
    """The parameters that `like`, a tree with some of their names, has too."""
    if not isinstance(like, dict):
        return params
    return {name: subset(params[name], part) for name, part in like.items()}


def join(trained: Params, frozen: Params) -> Params:
    """The parameters before `split`; nothing is copied."""
    params = dict(trained)
    for name, part in frozen.items():
        params[name] = join(params[name], part) if name in params else part
    return params


def without_adapters(params: Params) -> Params:
    """The parameters without the trained adapters: those with which training began.

    They fit a model made without adapters; nothing is copied.
    """
    return _pick(params, lambda name: name not in ADAPTER)


def merge(params: Params, scale: float, dtype: DTypeLike) -> Params:
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


def as_base_adapters(params: Params, scale: float, dtype: DTypeLike) -> Params:
    """The parameters of an equal model in which all adapters are frozen ones of the base.

    scale: LoRA's. The other parameters become `dtype`, and nothing is added to them. They fit a
    model with `add_base_adapters`.
    """
    if not isinstance(params, dict):
        return params.astype(dtype)
    frozen = {n: as_base_adapters(part, scale, dtype) for n, part in _others(params).items()}
    if pairs := _pairs(params, scale):
        rank_axis = pairs[0][0].ndim - 2  # of B
        frozen["base_a"] = jnp.concatenate([a for a, _, _ in pairs], axis=-1)
        frozen["base_b"] = jnp.concatenate([s * b for _, b, s in pairs], axis=rank_axis)
    return frozen


def without_any_adapters(params: Params) -> Params:
    """The parameters without trained and base adapters; nothing is added to them."""
    return _pick(params, lambda name: name not in (*BASE, *ADAPTER))


def has_base_adapters(params: Params) -> bool:
    """Whether a model has adapters of its base."""
    return bool(_pick(params, lambda name: name in BASE))


def _others(params: Params) -> Params:
    return {name: part for name, part in params.items() if name not in (*BASE, *ADAPTER)}


def _pairs(params: Params, scale: float) -> list[tuple[jax.Array, jax.Array, float]]:
    """A, B and the scale of each adapter of one kernel, the base's first."""
    both = ((BASE, 1.0), (ADAPTER, scale))
    return [(params[a], params[b], s) for (a, b), s in both if a in params]


def fingerprint(params: Params) -> str:
    """A hash of the parameters' names, shapes, dtypes and bits, the same on every mesh.

    The checksums are sums of whole numbers, exact in any order of summation.
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


def _matching(params: Params, chosen: Callable[[str], bool], prefix: str = "") -> Params:
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


def _pick(params: Params, accepts: Callable[[str], bool]) -> Params:
    """The leaves with names that are accepted; branches without such leaves are left out."""
    picked = {}
    for name, part in params.items():
        if isinstance(part, dict):
            if branch := _pick(part, accepts):
                picked[name] = branch
        elif accepts(name):
            picked[name] = part
    return picked
