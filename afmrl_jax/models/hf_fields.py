"""The fields of a Hugging Face config.json: defaults for missing fields, and checked readers.

Each reader raises UserError, naming the field, where its value is of another kind.
"""

import math
from collections.abc import Mapping
from typing import Any

from afmrl_jax.core.errors import UserError

# The defaults of transformers 5. Configs saved by transformers 4 leave out fields that equal them.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "qwen3_vl": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "mrope_section": [24, 20, 20],
    },
}
TEXT_DEFAULTS["qwen2_5_vl"] = TEXT_DEFAULTS["qwen2_vl"]
_TOWER = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **_TOWER,
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,  # the merger's output; the tower's width is embed_dim
        "mlp_ratio": 4,
        "patch_size": 14,
    },
    "qwen2_5_vl": {
        **_TOWER,
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "qwen3_vl": {
        **_TOWER,
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within the configuration; an empty one where the field is missing or null."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _unreadable(name, value, "an object")
    return value


def whole(
    config: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1
) -> int:
    """A whole number of at least `least`."""
    value = config.get(name, default)
    if type(value) is not int or value < least:
        raise _unreadable(name, value, f"a whole number from {least} on")
    return value


def wholes(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A list of whole numbers."""
    values = config.get(name)
    if not isinstance(values, list | tuple) or any(type(value) is not int for value in values):
        raise _unreadable(name, values, "a list of whole numbers")
    return tuple(values)


def number(config: Mapping[str, Any], name: str) -> float:
    """A finite number above 0."""
    value = config.get(name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise _unreadable(name, value, "a number above 0")
    return float(value)


def _unreadable(name: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"config.json: {name} is {value!r}; expected {expected}: correct it, or fetch it again"
    )
