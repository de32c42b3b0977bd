"""Where parameters and rows lie on the mesh: one table from a parameter's path to its axes.

Over `tensor` matrices are split as in Megatron: the first matrix of a pair by columns, the second
by rows, so that a pair ends in one sum. `fsdp` splits the other side, which is gathered when a
layer runs.
"""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from afmrl_jax.core.mesh import BATCH_AXES
from afmrl_jax.core.types import Params

P = PartitionSpec

# The parameters that are cast to the compute dtype at each use.
MATRIX = re.compile(r"\b(kernel|(lora|base)_[ab]|embed\.embedding)\b")

# Searched in order. A specification names the axes behind the layers' axis, which stays whole.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"\bembed\.embedding\b", P("tensor", "fsdp")),
    (r"\bposition_embed\.embedding\b", P(None, "fsdp")),
    (r"\b(lm_head|head)\.kernel\b", P("fsdp", "tensor")),
    (r"\bhead\.bias\b", P("tensor")),
    (r"\b(query|key|value|gate|up|patch_embed)\.kernel\b", P("fsdp", "tensor")),
    (r"\b(query|key|value|gate|up|patch_embed)\.bias\b", P("tensor")),
    (r"\bqkv\.kernel\b", P("fsdp", None, "tensor")),
    (r"\bqkv\.bias\b", P(None, "tensor")),
    (r"\b(out|down)\.kernel\b", P("tensor", "fsdp")),
    (r"\b(out|down)\.bias\b", P(None)),
    (r"norm\.(scale|bias)\b", P(None)),
    # An adapter's rank stays whole; its outer sides are split as its kernel's.
    (r"\b(query|key|value|gate|up|patch_embed|qkv|lm_head)\.(lora|base)_a\b", P("fsdp", None)),
    (r"\b(query|key|value|gate|up|patch_embed|lm_head)\.(lora|base)_b\b", P(None, "tensor")),
    (r"\bqkv\.(lora|base)_b\b", P(None, None, "tensor")),
    (r"\b(out|down)\.(lora|base)_a\b", P("tensor", None)),
    (r"\b(out|down)\.(lora|base)_b\b", P(None, "fsdp")),
)


def param_shardings(tree: Params, mesh: Mesh) -> Params:
    """The sharding of each array of a tree of parameters, or of an optimiser's state made like one.

    tree: arrays or ShapeDtypeStructs. Returns the same tree of NamedSharding. A mesh axis that does
    not divide its dimension is left out; a scalar is replicated.
    Raises ValueError that lists every array without a rule.
    """
    unmatched = []

    def sharding(path: KeyPath, leaf: jax.ShapeDtypeStruct | jax.Array) -> NamedSharding | None:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = _spec(name, leaf.shape)
        if spec is None:
            unmatched.append(f"{name} {leaf.shape}")
            return None
        fitting = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in spec)
        return NamedSharding(mesh, P(*fitting))

    shardings = jax.tree_util.tree_map_with_path(sharding, tree)
    if unmatched:
        raise ValueError(f"no rule of partition.RULES fits {', '.join(unmatched)}; add one")
    return shardings


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by rows (their first axis) and whole otherwise.

    Without it XLA may split activations like the parameters. Does nothing outside `jax.set_mesh`,
    or where the rows cannot be split evenly.
    """
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES)) if row_shards(x.shape[0]) else x


def row_shards(rows: int) -> int:
    """The number of shards into which the mesh splits so many rows; 0 outside `jax.set_mesh`, or
    where it cannot split them evenly."""
    sizes = jax.sharding.get_abstract_mesh().shape
    if not all(axis in sizes for axis in BATCH_AXES):
        return 0
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    return 0 if rows % shards else shards


def gathered(params: Params, dtype: DTypeLike) -> Params:
    """Parameters of one layer as it multiplies them: matrices in `dtype`, whole along `fsdp`.

    params: a tree whose paths end as RULES name them, without a stacked axis. Without this gather
    XLA's TPU compiler multiplies a shard at a time while it passes shards on ("collective matmul"),
    and 1/16 of a matrix's rows fills a small part of the matrix unit: twice the time of the whole
    step, by the compiler's estimate. Gradients are summed whole and then cut. A custom rule that
    asks for the shards of the sum alone makes the compiler multiply by shards again, and it turns
    even an explicit reduce-scatter of 16 chips on two axes of the torus into a sum and a cut.

    Does nothing outside `jax.set_mesh`, or where `fsdp` has one device.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return params

    def gather(path: KeyPath, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = _spec(name, leaf.shape)
        if spec is None or not MATRIX.search(name):
            return leaf
        sizes = jax.sharding.get_abstract_mesh().shape
        whole = [a if a == "tensor" and size % sizes[a] == 0 else None for a, size in spec]
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), P(*whole))

    return jax.tree_util.tree_map_with_path(gather, params)


def _spec(name: str, shape: tuple[int, ...]) -> list[tuple[str | None, int]] | None:
    """(mesh axis, size) of each dimension; None where no rule fits the name and number of axes."""
    if not shape:
        return []
    stacked = (None,) if re.search(r"\blayers\.", name) else ()
    for pattern, spec in RULES:
        if re.search(pattern, name) and len(stacked) + len(spec) == len(shape):
            return list(zip((*stacked, *spec), shape))
    return None
