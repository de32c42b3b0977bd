"""Named models: the published sizes of each family, and tiny ones that train on two CPU cores."""

import difflib
from typing import Any

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import FAMILIES, QwenVLConfig, TextConfig, VisionConfig

# The published models share one tokenizer.
_TOKENS = {
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}


def _vision(architecture: str, width: int, layers: int, mlp: int, **fields: Any) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=16,
        mlp_size=mlp,
        merge_size=2,
        temporal_patch_size=2,
        **fields,
        **FAMILIES[architecture][0],
    )


def _text(
    architecture: str, width: int, layers: int, heads: tuple[int, int], mlp: int, theta: float = 1e6
) -> TextConfig:
    """heads: numbers of query heads, of key/value heads."""
    return TextConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        mlp_size=mlp,
        mrope_sections=(24, 20, 20) if architecture == "qwen3_vl" else (16, 24, 24),
        rope_theta=theta,
        **FAMILIES[architecture][1],
    )


def _tiny(
    architecture: str, vision: dict[str, Any], sections: tuple[int, int, int]
) -> QwenVLConfig:
    """A model that trains from scratch on two CPU cores. Its tokenizer is trained there too: hence
    the small vocabulary."""
    return QwenVLConfig(
        vision=VisionConfig(
            hidden_size=96,
            num_layers=2,
            num_heads=3,
            mlp_size=384,
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            **vision,
            **FAMILIES[architecture][0],
        ),
        text=TextConfig(
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_size=384,
            mrope_sections=sections,
            rope_theta=1e4,
            **FAMILIES[architecture][1],
        ),
        vocab_size=4096,
        pad_token_id=0,
        eos_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        image_token_id=4,
        tie_embeddings=True,
        # 1 / sqrt(width): the published .02 suits widths of 2,000 and starves so narrow a model.
        initializer_range=0.08,
        architecture=architecture,
    )


def _published(
    architecture: str, vision: VisionConfig, text: TextConfig, vocab_size: int, tied: bool
) -> QwenVLConfig:
    return QwenVLConfig(
        vision=vision,
        text=text,
        vocab_size=vocab_size,
        tie_embeddings=tied,
        architecture=architecture,
        **_TOKENS,
    )


_QWEN2_VISION = _vision("qwen2_vl", 1280, 32, 5120, patch_size=14)
_QWEN2_5_VISION = _vision(
    *("qwen2_5_vl", 1280, 32, 3420),
    patch_size=14,
    window_size=112,
    full_attention_layers=(7, 15, 23, 31),
)
_QWEN3_VISION = {"patch_size": 16, "num_positions": 48**2}

PRESETS: dict[str, QwenVLConfig] = {
    "tiny": _tiny("qwen2_vl", {}, (4, 6, 6)),
    "tiny_qwen2_5": _tiny(
        "qwen2_5_vl", {"window_size": 64, "full_attention_layers": (1,)}, (4, 6, 6)
    ),
    "tiny_qwen3": _tiny("qwen3_vl", {"num_positions": 144, "deepstack_layers": (0,)}, (6, 5, 5)),
    "qwen2_vl_2b": _published(
        *("qwen2_vl", _QWEN2_VISION),
        _text("qwen2_vl", 1536, 28, (12, 2), 8960),
        vocab_size=151936,
        tied=True,
    ),
    "qwen2_vl_7b": _published(
        *("qwen2_vl", _QWEN2_VISION),
        _text("qwen2_vl", 3584, 28, (28, 4), 18944),
        vocab_size=152064,
        tied=False,
    ),
    "qwen2_5_vl_3b": _published(
        *("qwen2_5_vl", _QWEN2_5_VISION),
        _text("qwen2_5_vl", 2048, 36, (16, 2), 11008),
        vocab_size=151936,
        tied=True,
    ),
    "qwen2_5_vl_7b": _published(
        *("qwen2_5_vl", _QWEN2_5_VISION),
        _text("qwen2_5_vl", 3584, 28, (28, 4), 18944),
        vocab_size=152064,
        tied=False,
    ),
    "qwen3_vl_2b": _published(
        "qwen3_vl",
        _vision("qwen3_vl", 1024, 24, 4096, deepstack_layers=(5, 11, 17), **_QWEN3_VISION),
        _text("qwen3_vl", 2048, 28, (16, 8), 6144, theta=5e6),
        vocab_size=151936,
        tied=True,
    ),
    "qwen3_vl_8b": _published(
        "qwen3_vl",
        _vision("qwen3_vl", 1152, 27, 4304, deepstack_layers=(8, 16, 24), **_QWEN3_VISION),
        _text("qwen3_vl", 4096, 36, (32, 8), 12288, theta=5e6),
        vocab_size=151936,
        tied=False,
    ),
}


def preset(name: str) -> QwenVLConfig:
    """A named configuration; UserError with the nearest name where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
    raise UserError(f"model preset {name!r} does not exist; {hint}")
