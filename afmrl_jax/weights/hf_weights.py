"""Reads and writes the Qwen-VL family's Hugging Face checkpoints, strictly: a tensor that does not
fit is an error.

Their linear weights are [outputs, inputs], one tensor a layer; ours are [inputs, *outputs], a group
of layers stacked. Reading and writing hold one tensor at a time in memory beside the parameters: a
file is mapped, each device reads its shard of a tensor, and the tensor's pages are released.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import whole_files
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.rope import text_frequencies, vision_frequencies
from afmrl_jax.weights.safetensors_file import Tensor, read_header, write_file

log = logging.getLogger(__name__)

# Our modules -> the checkpoints'; {} is the number of a layer, or of a DeepStack merger.
MODULES = {
    "embed": "embed_tokens",
    "norm": "norm",
    "lm_head": "lm_head",
    "layers.attention_norm": "layers.{}.input_layernorm",
    "layers.attention.query": "layers.{}.self_attn.q_proj",
    "layers.attention.key": "layers.{}.self_attn.k_proj",
    "layers.attention.value": "layers.{}.self_attn.v_proj",
    "layers.attention.out": "layers.{}.self_attn.o_proj",
    "layers.attention.query_norm": "layers.{}.self_attn.q_norm",
    "layers.attention.key_norm": "layers.{}.self_attn.k_norm",
    "layers.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.gate": "layers.{}.mlp.gate_proj",
    "layers.up": "layers.{}.mlp.up_proj",
    "layers.down": "layers.{}.mlp.down_proj",
    "vision.patch_embed": "visual.patch_embed.proj",
    "vision.layers.attention_norm": "visual.blocks.{}.norm1",
    "vision.layers.attention.qkv": "visual.blocks.{}.attn.qkv",
    "vision.layers.attention.out": "visual.blocks.{}.attn.proj",
    "vision.layers.mlp_norm": "visual.blocks.{}.norm2",
}
_LN_Q_MERGER = {
    "vision.merger.norm": "visual.merger.ln_q",
    "vision.merger.up": "visual.merger.mlp.0",
    "vision.merger.down": "visual.merger.mlp.2",
}
# The modules whose names depend on the family.
FAMILIES = {
    "qwen2_vl": {
        "vision.layers.up": "visual.blocks.{}.mlp.fc1",
        "vision.layers.down": "visual.blocks.{}.mlp.fc2",
        **_LN_Q_MERGER,
    },
    "qwen2_5_vl": {
        "vision.layers.gate": "visual.blocks.{}.mlp.gate_proj",
        "vision.layers.up": "visual.blocks.{}.mlp.up_proj",
        "vision.layers.down": "visual.blocks.{}.mlp.down_proj",
        **_LN_Q_MERGER,
    },
    "qwen3_vl": {
        "vision.position_embed": "visual.pos_embed",
        "vision.layers.up": "visual.blocks.{}.mlp.linear_fc1",
        "vision.layers.down": "visual.blocks.{}.mlp.linear_fc2",
        "vision.merger.norm": "visual.merger.norm",
        "vision.merger.up": "visual.merger.linear_fc1",
        "vision.merger.down": "visual.merger.linear_fc2",
        "vision.deepstack.norm": "visual.deepstack_merger_list.{}.norm",
        "vision.deepstack.up": "visual.deepstack_merger_list.{}.linear_fc1",
        "vision.deepstack.down": "visual.deepstack_merger_list.{}.linear_fc2",
    },
}
# The prefixes of the decoder's names and of the tower's, in published files. A checkpoint of
# transformers' bare model has others; reading cuts any of them off.
PREFIXES = {
    "qwen2_vl": ("model.", ""),
    "qwen2_5_vl": ("model.", ""),
    "qwen3_vl": ("model.language_model.", "model."),
}
PREFIX = re.compile(r"^(model\.)?(language_model\.)?")

# The only tensors of a checkpoint that may be left unread: the head, where the model has no
# separate one (an embedder, or a model that shares the embedding table, which the head must equal),
# and the rotary frequencies that old versions stored, which must be those of the configuration.
TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"
FREQUENCIES = re.compile(r".*rotary\w*\.inv_freq")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # transformers' limit
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


class Target(NamedTuple):
    """One of our arrays, and the checkpoint's tensors that fill it."""

    index: int  # the array's place in the flattened tree
    names: tuple[str, ...]  # of the tensors, in order of layers; a single name if not stacked
    stacked: bool
    kernel: bool
    shape: tuple[int, ...]  # of one layer of the array
    hf_shape: tuple[int, ...]  # of one tensor


def targets(params: Any, config: QwenVLConfig) -> list[Target]:
    """The target of each array of a QwenVL's or an Embedder's parameters.

    params: the module's nnx.State, of arrays or ShapeDtypeStructs.
    Raises ValueError where an array has no name in a Hugging Face checkpoint.
    """
    vision = config.vision
    conv = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    plan = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        path = re.sub(r"\.(raw_)?value$", "", path).removeprefix("backbone.")
        name, number = _hf_name(path, config)
        stacked, kernel = re.match(r"(vision\.)?layers\.", path) is not None, "kernel" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        if path == "vision.patch_embed.kernel":
            hf_shape = (shape[1], *conv)
        elif kernel:
            hf_shape = (math.prod(shape[1:]), shape[0])
        else:
            hf_shape = (math.prod(shape),) if path.endswith(".bias") else shape
        numbers = [number]
        if stacked:
            groups = (vision if path.startswith("vision.") else config).layer_groups
            numbers = range(sum(groups[:number]), sum(groups[: number + 1]))
        names = tuple(name.format(number) for number in numbers)
        plan.append(Target(index, names, stacked, kernel, shape, hf_shape))
    return plan


def _hf_name(path: str, config: QwenVLConfig) -> tuple[str, int]:
    """A published checkpoint's name for our parameter, and the number in our path: of a group of
    layers or of a merger, 0 in a path without a number."""
    module, _, leaf = re.sub(r"\.\d+\.", ".", path).rpartition(".")
    hf_module = (MODULES | FAMILIES[config.architecture]).get(module)
    if hf_module is None or leaf not in ("kernel", "scale", "embedding", "bias"):
        raise ValueError(f"parameter {path} has no name in hf_weights.MODULES; add it")
    text, tower = PREFIXES[config.architecture]
    prefix = tower if path.startswith("vision.") else "" if path.startswith("lm_head") else text
    number = re.search(r"\.(\d+)\.", path)
    suffix = "bias" if leaf == "bias" else "weight"
    return f"{prefix}{hf_module}.{suffix}", int(number[1]) if number else 0


def resolve(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint: a local folder, or that of a name on the hub
    ("Qwen/Qwen2-VL-2B-Instruct"), which is downloaded unless it is in the hub's cache.

    Raises UserError where there is no such folder, and the hub does not deliver one.
    """
    folder = Path(path_or_id).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path_or_id)):
        raise UserError(
            f"{path_or_id}: no such folder; give one, or a name on the hub like "
            "Qwen/Qwen2-VL-2B-Instruct"
        )
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's, the network's, a full disk's: the advice is the same
        raise UserError(
            f"{path_or_id}: no such folder, and huggingface.co did not give it "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            "); correct the name, or download it where there is a network and give its folder"
        ) from None


def with_head_of(directory: Path, config: QwenVLConfig) -> QwenVLConfig:
    """The configuration, with the head untied where the weights hold a head that differs from the
    embedding table. Then the weights count and not config.json, as in transformers 5.

    directory: as in `load`, or without weights. Raises UserError where the weights are damaged.
    """
    if not any((directory / name).exists() for name in (SINGLE, INDEX)):
        return config
    if not config.tie_embeddings or not _head_differs(_open(directory)):
        return config
    log.warning(
        "%s: config.json says that the head is the embedding table (tie_word_embeddings), and the "
        "weights hold a head of other numbers, which is used, as transformers does; set "
        "tie_word_embeddings to false there",
        directory,
    )
    return config.replace(tie_embeddings=False)


def _head_differs(tensors: dict[str, Tensor]) -> bool:
    """Whether there is a head with other numbers than the embedding table."""
    if TABLE not in tensors or HEAD not in tensors:
        return False
    head, table = tensors[HEAD], tensors[TABLE]
    if head.shape != table.shape:
        return True
    rows = range(0, head.shape[0], 4096)
    differs = any(
        (head.view()[start : start + 4096] != table.view()[start : start + 4096]).any()
        for start in rows
    )
    head.release()
    table.release()
    return bool(differs)


def load(directory: Path, params: Any, config: QwenVLConfig) -> Any:
    """A checkpoint's weights in the shape, dtype and sharding of `params`.

    directory: holds model.safetensors, or shards with model.safetensors.index.json.
    params: nnx.State of a QwenVL or Embedder, its leaves ShapeDtypeStructs (their shardings
    NamedSharding, or the first device takes all) or arrays. Returns the same tree of arrays.
    Raises UserError that lists every damaged file; else every tensor that is missing, unexpected or
    of another shape; else a tensor that the model computes itself and that has other numbers.
    """
    directory = Path(directory)
    tensors = _open(directory)
    leaves, tree = jax.tree.flatten(params)
    plan = targets(params, config)
    if config.tie_embeddings and TABLE not in tensors and HEAD in tensors:
        tensors[TABLE] = tensors[HEAD]  # some writers store shared numbers under one of two names
    _check_names_and_shapes(directory, tensors, plan)
    _check_unread(directory, tensors, config)
    for target in plan:
        leaf = leaves[target.index]
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        array = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
        for layer, name in enumerate(target.names):
            tensor = tensors[PREFIX.sub("", name)]
            array = _place(array, _put(tensor, target, sharding), layer, target.kernel, sharding)
            array.block_until_ready()
            tensor.release()
        leaves[target.index] = array
    return jax.tree.unflatten(tree, leaves)


def _put(tensor: Tensor, target: Target, sharding: Sharding) -> jax.Array:
    """A tensor on the devices, still in its dtype; each device reads only its shard."""
    shape = target.shape
    view = tensor.view().reshape((*shape[1:], shape[0]) if target.kernel else shape)
    if isinstance(sharding, NamedSharding):
        axes = [*sharding.spec, *[None] * len(shape)][target.stacked :][: len(shape)]
        axes = axes[1:] + axes[:1] if target.kernel else axes
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(view.shape, sharding, lambda part: view[part])


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _place(
    array: jax.Array, tensor: jax.Array, layer: int, kernel: bool, sharding: Sharding
) -> jax.Array:
    """The array with one layer written in place. Even a tensor that fills the whole array is
    copied into it, because the tensor's memory is a mapped file."""
    tensor = jnp.moveaxis(tensor, -1, 0) if kernel else tensor
    tensor = tensor.astype(array.dtype)
    tensor = tensor.reshape((1,) * (array.ndim - tensor.ndim) + tensor.shape)
    array = jax.lax.dynamic_update_slice(array, tensor, (layer, *[0] * (array.ndim - 1)))
    if isinstance(sharding, NamedSharding):
        return jax.lax.with_sharding_constraint(array, sharding)
    return array


def save(
    directory: Path,
    params: Any,
    config: QwenVLConfig,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and weights, named as in published checkpoints, for transformers to read.

    params: as in `load`, arrays that this process holds whole. dtype: of the tensors in the files;
    None keeps each parameter's. Weights are one file, or shards of at most `max_shard_bytes` (or
    one tensor) and their index. The files get their names when all are written; they replace those
    of an earlier save.
    """
    directory = Path(directory)
    leaves = jax.tree.leaves(params)
    entries = _entries(targets(params, config))
    dtypes = {t.index: np.dtype(dtype or leaves[t.index].dtype) for _, t, _ in entries}
    sizes = [dtypes[t.index].itemsize * math.prod(t.hf_shape) for _, t, _ in entries]
    shards, filled = [[]], 0
    for entry, size in zip(entries, sizes):
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    texts = {"config.json": config.to_hf()}
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name, _, _ in shard}
        texts[INDEX] = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    with whole_files(directory, [*files, *texts]) as temporary:
        for file, shard in zip(files, shards):
            header = {name: (dtypes[t.index], t.hf_shape) for name, t, _ in shard}
            tensors = (_fetch(leaves[t.index], t, layer, dtypes[t.index]) for _, t, layer in shard)
            write_file(temporary[file], header, tensors)
        for file, content in texts.items():
            temporary[file].write_text(json.dumps(content, indent=2) + "\n")
    for stale in {SINGLE, INDEX, *(p.name for p in directory.glob("model-*-of-*.safetensors"))}:
        if stale not in [*files, *texts]:
            (directory / stale).unlink(missing_ok=True)


def to_hf(params: Any, config: QwenVLConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's names and tensors of our parameters (as in `save`), one after another."""
    leaves = jax.tree.leaves(params)
    for name, target, layer in _entries(targets(params, config)):
        leaf = leaves[target.index]
        yield name, _fetch(leaf, target, layer, leaf.dtype)


def _entries(plan: list[Target]) -> list[tuple[str, Target, int]]:
    """(name, target, number in the stack) of each tensor, layer after layer, so that only the first
    and last layer of a shard are cut."""
    entries = [(name, target, n) for target in plan for n, name in enumerate(target.names)]
    return sorted(entries, key=lambda entry: re.sub(r"\d+", lambda m: m[0].zfill(4), entry[0]))


def _fetch(leaf: Any, target: Target, layer: int, dtype: np.dtype) -> np.ndarray:
    """One tensor of the checkpoint, on the host."""
    if not isinstance(leaf, jax.Array) and target.stacked:
        leaf, layer = leaf[layer : layer + 1], 0  # else all layers would be copied to the device
    anonymous = target._replace(index=0, names=())  # arrays of one shape share a compilation
    return np.asarray(_to_hf_layout(leaf, layer, anonymous, dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _to_hf_layout(array: jax.Array, layer: int, target: Target, dtype: np.dtype) -> jax.Array:
    array = array[layer] if target.stacked else array
    array = jnp.moveaxis(array, 0, -1) if target.kernel else array
    return array.reshape(target.hf_shape).astype(dtype)


def _check_names_and_shapes(
    directory: Path, tensors: dict[str, Tensor], plan: list[Target]
) -> None:
    """Raises UserError unless the tensors, by their names without prefix, are those of the plan."""
    expected = {PREFIX.sub("", name): (name, t.hf_shape) for t in plan for name in t.names}
    problems = {
        "missing": sorted(full for name, (full, _) in expected.items() if name not in tensors),
        "unexpected": sorted(
            tensor.name
            for name, tensor in tensors.items()
            if name not in expected and name != HEAD and not FREQUENCIES.fullmatch(name)
        ),
        "of another shape": [
            f"{tensors[name].name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, (_, shape) in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if not any(problems.values()):
        return
    counts = [f"{len(names)} {how} ({_some(names)})" for how, names in problems.items() if names]
    cure = "use the config.json that belongs to them"
    if problems["missing"] == [HEAD]:
        cure = (
            "an embedder has no language head: name a model that has one, or, where the head is "
            "the embedding table, set tie_word_embeddings to true in config.json"
        )
    elif any("lora_" in name for name in problems["unexpected"]):
        cure = "LoRA's matrices stand apart in them: merge them first (PEFT's merge_and_unload)"
    raise UserError(f"{directory}: the weights do not fit the model, {'; '.join(counts)}; {cure}")


def _check_unread(directory: Path, tensors: dict[str, Tensor], config: QwenVLConfig) -> None:
    """Raises UserError where a tensor that is not read differs from the model's numbers."""
    if config.tie_embeddings and _head_differs(tensors):
        raise UserError(
            f"{directory}: {tensors[HEAD].name} is not the embedding table, which the model has in "
            "its place; set tie_word_embeddings to false in config.json"
        )
    tower = vision_frequencies(config.vision)[1][: config.vision.head_dim // 4]
    text = text_frequencies(config.text)[1]
    for name in filter(FREQUENCIES.fullmatch, tensors):
        stored, computed = tensors[name].view(), tower if name.startswith("visual.") else text
        # Half precision rounds the frequencies; another rope_theta or head size is far off.
        if stored.shape != computed.shape or not np.allclose(
            stored.astype(np.float32), computed, rtol=1e-2, atol=1e-6
        ):
            raise UserError(
                f"{directory}: {tensors[name].name} holds other rotary frequencies than those of "
                "config.json, with which the model computes; use the config.json that belongs to "
                "the weights"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _open(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, memory-mapped, by its name without prefix.

    Raises UserError that lists the problems of every file.
    """
    if (directory / SINGLE).exists():
        weight_map = None
        files = [SINGLE]
    else:
        weight_map = _weight_map(directory / INDEX)
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in files:
        try:
            header = read_header(directory / file)
        except UserError as error:
            problems.append(str(error))
            continue
        if weight_map is not None:
            listed = {name for name, place in weight_map.items() if place == file}
            for names, problem in (
                (listed - header.keys(), f"lacks what {INDEX} promises"),
                (header.keys() - listed, f"holds what {INDEX} does not list there"),
            ):
                if names:
                    problems.append(f"{directory / file} {problem}: {_some(sorted(names))}")
        for name, tensor in header.items():
            other = tensors.setdefault(PREFIX.sub("", name), tensor)
            if other is not tensor:
                problems.append(f"{directory / file}: {name} is there twice, also as {other.name}")
    if problems:
        raise UserError("\n".join([*problems, "download the checkpoint again"]))
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index. Raises UserError, also for a file in another folder."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except FileNotFoundError:
        raise UserError(
            f"{index.parent}: neither {SINGLE} nor {INDEX}; expected the folder of a Hugging Face "
            "checkpoint with safetensors weights"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index}: no weight_map of names to files; download it again") from None
    for file in files.values():
        if "/" in file or "\\" in file or not file.endswith(".safetensors") or "\0" in file:
            raise UserError(
                f"{index}: weight_map names the file {file!r}; expected the plain name of a "
                ".safetensors file beside the index; do not trust this checkpoint"
            )
    return files
