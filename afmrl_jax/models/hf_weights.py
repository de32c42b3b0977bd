"""Reads and writes Hugging Face checkpoints of Qwen2-VL, strictly: every name fits, or it is told.

Their linear weights are [outputs, inputs], one tensor a layer; ours are [inputs, *outputs], all
layers stacked. Tensors are memory-mapped, and each device reads only what its shard needs.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import QwenVLConfig

# Their name -> our path; {} is the number of a layer, the first index of our stacked array.
TABLE = {
    "model.embed_tokens.weight": "embed.embedding",
    "model.layers.{}.input_layernorm.weight": "layers.attention_norm.scale",
    "model.layers.{}.self_attn.q_proj.weight": "layers.attention.query.kernel",
    "model.layers.{}.self_attn.q_proj.bias": "layers.attention.query.bias",
    "model.layers.{}.self_attn.k_proj.weight": "layers.attention.key.kernel",
    "model.layers.{}.self_attn.k_proj.bias": "layers.attention.key.bias",
    "model.layers.{}.self_attn.v_proj.weight": "layers.attention.value.kernel",
    "model.layers.{}.self_attn.v_proj.bias": "layers.attention.value.bias",
    "model.layers.{}.self_attn.o_proj.weight": "layers.attention.out.kernel",
    "model.layers.{}.post_attention_layernorm.weight": "layers.mlp_norm.scale",
    "model.layers.{}.mlp.gate_proj.weight": "layers.gate.kernel",
    "model.layers.{}.mlp.up_proj.weight": "layers.up.kernel",
    "model.layers.{}.mlp.down_proj.weight": "layers.down.kernel",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "lm_head.kernel",
    "visual.patch_embed.proj.weight": "vision.patch_embed.kernel",
    "visual.blocks.{}.norm1.weight": "vision.layers.attention_norm.scale",
    "visual.blocks.{}.norm1.bias": "vision.layers.attention_norm.bias",
    "visual.blocks.{}.attn.qkv.weight": "vision.layers.attention.qkv.kernel",
    "visual.blocks.{}.attn.qkv.bias": "vision.layers.attention.qkv.bias",
    "visual.blocks.{}.attn.proj.weight": "vision.layers.attention.out.kernel",
    "visual.blocks.{}.attn.proj.bias": "vision.layers.attention.out.bias",
    "visual.blocks.{}.norm2.weight": "vision.layers.mlp_norm.scale",
    "visual.blocks.{}.norm2.bias": "vision.layers.mlp_norm.bias",
    "visual.blocks.{}.mlp.fc1.weight": "vision.layers.up.kernel",
    "visual.blocks.{}.mlp.fc1.bias": "vision.layers.up.bias",
    "visual.blocks.{}.mlp.fc2.weight": "vision.layers.down.kernel",
    "visual.blocks.{}.mlp.fc2.bias": "vision.layers.down.bias",
    "visual.merger.ln_q.weight": "vision.merger.norm.scale",
    "visual.merger.ln_q.bias": "vision.merger.norm.bias",
    "visual.merger.mlp.0.weight": "vision.merger.up.kernel",
    "visual.merger.mlp.0.bias": "vision.merger.up.bias",
    "visual.merger.mlp.2.weight": "vision.merger.down.kernel",
    "visual.merger.mlp.2.bias": "vision.merger.down.bias",
}
HEAD = "lm_head.weight"

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


@dataclass(frozen=True)
class Target:
    """One of our arrays: its place in the flattened tree, and their tensors that fill it."""

    index: int
    names: tuple[str, ...]  # in order of layers; one where the array is not stacked
    stacked: bool
    kernel: bool
    shape: tuple[int, ...]  # ours, of one layer
    their_shape: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view in our layout of one of their tensors."""
        if self.kernel:
            return np.moveaxis(tensor.reshape(*self.shape[1:], self.shape[0]), -1, 0)
        return tensor.reshape(self.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer of our array in their layout."""
        array = np.moveaxis(array, 0, -1) if self.kernel else array
        return np.ascontiguousarray(array.reshape(self.their_shape))


def targets(params: Any, config: QwenVLConfig) -> list[Target]:
    """How each array of a QwenVL's or an Embedder's parameters is filled.

    params: the module's nnx.State, of arrays or ShapeDtypeStructs.
    Raises ValueError where an array has no name in a Hugging Face checkpoint.
    """
    ours = {path: name for name, path in TABLE.items()}
    vision = config.vision
    sides = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    result = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        path = re.sub(r"\.(raw_)?value$", "", path).removeprefix("backbone.")
        number = re.search(r"\blayers\.(\d+)\.", path)
        path = re.sub(r"\blayers\.\d+\.", "layers.", path)
        if path not in ours:
            raise ValueError(f"parameter {path} has no name in hf_weights.TABLE; add it")
        name, kernel = ours[path], path.endswith(".kernel")
        stacked = "{}" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        if path == "vision.patch_embed.kernel":
            their_shape = (shape[1], vision.in_channels, *sides)
        elif kernel:
            their_shape = (math.prod(shape[1:]), shape[0])
        else:
            their_shape = (math.prod(shape),) if path.endswith(".bias") else shape
        if stacked:
            groups = (vision if path.startswith("vision.") else config).layer_groups
            first = sum(groups[: int(number[1])])
            names = tuple(map(name.format, range(first, first + leaf.shape[0])))
        else:
            names = (name,)
        result.append(Target(index, names, stacked, kernel, shape, their_shape))
    return result


def load(directory: Path, params: Any, config: QwenVLConfig) -> Any:
    """A checkpoint's weights in the shape, dtype and sharding of `params`.

    directory: holds model.safetensors, or shards with model.safetensors.index.json.
    params: nnx.State of a QwenVL or Embedder, its leaves ShapeDtypeStructs (with shardings, or the
    first device takes all) or arrays. Returns the same tree of arrays.
    Raises UserError that tells every tensor missing, unexpected or of another shape. A language
    head is passed over where the model has none.
    """
    tensors = _open(Path(directory))
    leaves, tree = jax.tree.flatten(params)
    plan = targets(params, config)
    _check(Path(directory), tensors, plan)
    for target in plan:
        leaf = leaves[target.index]
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
            jax.devices()[0]
        )

        def read(index: tuple[slice, ...], target: Target = target, dtype=leaf.dtype) -> np.ndarray:
            if not target.stacked:
                return target.to_ours(tensors[target.names[0]])[index].astype(dtype)
            layers = [target.to_ours(tensors[name]) for name in target.names[index[0]]]
            return np.stack([layer[index[1:]].astype(dtype) for layer in layers])

        leaves[target.index] = jax.make_array_from_callback(leaf.shape, sharding, read)
    return jax.tree.unflatten(tree, leaves)


def save(directory: Path, params: Any, config: QwenVLConfig) -> None:
    """Writes model.safetensors and config.json as transformers reads them; params as in `load`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(to_hf(params, config)), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")


def to_hf(params: Any, config: QwenVLConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and tensors, one after another, of our parameters."""
    leaves = jax.tree.leaves(params)
    for target in targets(params, config):
        array = np.asarray(leaves[target.index])
        for name, layer in zip(target.names, array if target.stacked else [array]):
            yield name, target.to_theirs(layer)


def _check(directory: Path, tensors: dict[str, np.ndarray], plan: list[Target]) -> None:
    expected = {name: target.their_shape for target in plan for name in target.names}
    optional = set() if HEAD in expected else {HEAD}
    told = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys() - optional),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if problems := [
        f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for kind, names in told.items()
        if names
    ]:
        raise UserError(
            f"{directory}: the weights do not fit the model, {'; '.join(problems)}; "
            "use the config.json that belongs to them"
        )


def _open(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, memory-mapped."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return _open_file(directory / "model.safetensors")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: no weight_map of names to files; download it again") from None
    return {
        name: tensor for shard in shards for name, tensor in _open_file(directory / shard).items()
    }


def _open_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file (https://huggingface.co/docs/safetensors: the format's layout).

    NumPy alone cannot name bfloat16, and the library's own reader copies whole tensors.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError):
        raise UserError(
            f"{path}: not found or empty; expected the weights of a Hugging Face checkpoint"
        ) from None
    try:
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        return {
            name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            .view(DTYPES[entry["dtype"]])
            .reshape(entry["shape"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
        raise UserError(
            f"{path}: not a whole safetensors file of float tensors; download it again"
        ) from None
