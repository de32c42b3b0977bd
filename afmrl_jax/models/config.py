"""What a Qwen-VL model is made of: sizes and special tokens, from Hugging Face or a preset.

No jax here: data workers and the planner read these numbers too.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afmrl_jax.core.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; its patch merger puts out vectors of the decoder's width."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int  # pixels
    merge_size: int  # patches a side that are merged into one token
    temporal_patch_size: int  # frames in a patch; a still image is repeated
    in_channels: int = 3
    deepstack_layers: tuple[int, ...] = ()  # whose outputs the decoder's first layers receive
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x frames x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """How many layers each scan runs: the tower is cut after every layer that is tapped."""
        ends = (*(layer + 1 for layer in self.deepstack_layers), self.num_layers)
        return tuple(end - start for start, end in zip((0, *ends), ends) if end > start)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise UserError(
                f"model config: vision width {self.hidden_size} over {self.num_heads} heads; the "
                "2-D rotary embedding needs a whole head size that is a multiple of 4"
            )


@dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    mrope_sections: tuple[int, ...]  # rotary frequencies given to time, height and width
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: {self.num_heads} attention heads cannot share {self.num_kv_heads} "
                "key/value heads evenly; make one a multiple of the other"
            )
        if len(self.mrope_sections) != 3 or 2 * sum(self.mrope_sections) != self.head_dim:
            raise UserError(
                f"model config: mrope_section {list(self.mrope_sections)} must be three numbers "
                f"that sum to half the head size, {self.head_dim / 2:g}"
            )


@dataclass(frozen=True)
class QwenVLConfig:
    """A whole model: tower, decoder, vocabulary."""

    vision: VisionConfig
    text: TextConfig
    vocab_size: int
    image_token_id: int  # stands where a merged image feature goes
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    tie_embeddings: bool  # the head is the embedding table
    initializer_range: float = 0.02
    architecture: str = "qwen2_vl"

    def __post_init__(self) -> None:
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        for name in (*names, "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise UserError(
                    f"model config: {name} {getattr(self, name)} is outside the vocabulary of "
                    f"{self.vocab_size} tokens; set {name} and vocab_size together"
                )

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """How many decoder layers each scan runs: first those that receive DeepStack features."""
        first = len(self.vision.deepstack_layers)
        return tuple(count for count in (first, self.text.num_layers - first) if count)

    def replace(self, **changes: Any) -> "QwenVLConfig":
        """A copy with fields of this class changed: a vocabulary's size and its special tokens."""
        return dataclasses.replace(self, **changes)

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face config.json's content (flat layout); `from_hf` reads it back equal."""
        vision, text = self.vision, self.text
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.mlp_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": text.norm_epsilon,
            "rope_theta": text.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_sections)},
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_embeddings,
            "image_token_id": self.image_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "vision_config": {
                "depth": vision.num_layers,
                "embed_dim": vision.hidden_size,
                "hidden_size": text.hidden_size,
                "hidden_act": "quick_gelu",
                "mlp_ratio": vision.mlp_size // vision.hidden_size,
                "num_heads": vision.num_heads,
                "in_channels": vision.in_channels,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
        }


def from_hf(config: Mapping[str, Any]) -> QwenVLConfig:
    """Reads a Hugging Face config.json's content, flat or with a `text_config` (transformers 5).

    Raises UserError where the architecture is not one of ours, a number is missing, or the
    checkpoint asks for something that this model does not compute.
    """
    architecture = config.get("model_type")
    if architecture != "qwen2_vl":
        raise UserError(
            f"config.json: model_type {architecture!r} is not supported; use a qwen2_vl checkpoint"
        )
    nested = config.get("text_config") or {}
    text = {**config, **{key: value for key, value in nested.items() if value is not None}}
    vision = _need(config, "vision_config")
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    _check_supported(text, vision, rope)
    hidden_size, num_heads = _need(text, "hidden_size"), _need(text, "num_attention_heads")
    eos = _first(text.get("eos_token_id", 151645))
    pad = _first(text.get("pad_token_id"))
    return QwenVLConfig(
        vision=VisionConfig(
            hidden_size=_need(vision, "embed_dim"),
            num_layers=_need(vision, "depth"),
            num_heads=_need(vision, "num_heads"),
            mlp_size=int(_need(vision, "embed_dim") * vision.get("mlp_ratio", 4)),
            patch_size=_need(vision, "patch_size"),
            merge_size=vision.get("spatial_merge_size", 2),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        ),
        text=TextConfig(
            hidden_size=hidden_size,
            num_layers=_need(text, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=text.get("num_key_value_heads") or num_heads,
            head_dim=hidden_size // num_heads,
            mlp_size=_need(text, "intermediate_size"),
            mrope_sections=tuple(_need(rope, "mrope_section")),
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
            norm_epsilon=text.get("rms_norm_eps", 1e-6),
        ),
        vocab_size=_need(text, "vocab_size"),
        image_token_id=_need(text, "image_token_id"),
        vision_start_token_id=_need(text, "vision_start_token_id"),
        vision_end_token_id=text.get("vision_end_token_id", 151653),
        eos_token_id=eos,
        # Qwen's tokenizers pad with <|endoftext|>, which the published configs only call `bos`.
        pad_token_id=pad if pad is not None else _first(text.get("bos_token_id", eos)),
        tie_embeddings=any(part.get("tie_word_embeddings") for part in (config, nested)),
        initializer_range=text.get("initializer_range", 0.02),
        architecture=architecture,
    )


def _check_supported(text: Mapping, vision: Mapping, rope: Mapping) -> None:
    found = {
        "hidden_act": (text.get("hidden_act", "silu"), {"silu"}),
        "vision_config.hidden_act": (vision.get("hidden_act", "quick_gelu"), {"quick_gelu"}),
        "use_sliding_window": (bool(text.get("use_sliding_window")), {False}),
        "rope_scaling.type": (rope.get("rope_type") or rope.get("type"), {"mrope", "default"}),
    }
    for name, (value, supported) in found.items():
        if value not in supported:
            raise UserError(
                f"config.json: {name} is {value!r}, and this model computes only "
                f"{' or '.join(map(repr, sorted(supported)))}; use a plain qwen2_vl checkpoint"
            )


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise UserError(
            f"config.json: no {name}; expected the config.json of a qwen2_vl checkpoint, whole"
        )
    return config[name]


def _first(value: Any) -> Any:
    """Of several end tokens the first; some configs list them."""
    return value[0] if isinstance(value, list | tuple) else value


def _qwen2_vl(text: TextConfig, vocab_size: int, tie_embeddings: bool) -> QwenVLConfig:
    """The published sizes share one vision tower and one tokenizer."""
    vision = VisionConfig(
        hidden_size=1280,
        num_layers=32,
        num_heads=16,
        mlp_size=5120,
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
    )
    return QwenVLConfig(
        vision=vision,
        text=text,
        vocab_size=vocab_size,
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_id=151645,
        pad_token_id=151643,
        tie_embeddings=tie_embeddings,
    )


PRESETS: dict[str, QwenVLConfig] = {
    # Trains from scratch on two CPU cores, its tokenizer too: hence the small vocabulary.
    "tiny": QwenVLConfig(
        vision=VisionConfig(
            hidden_size=96,
            num_layers=2,
            num_heads=3,
            mlp_size=384,
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
        ),
        text=TextConfig(
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_size=384,
            mrope_sections=(4, 6, 6),
            rope_theta=1e4,
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
    ),
    "qwen2_vl_2b": _qwen2_vl(
        TextConfig(
            hidden_size=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            mlp_size=8960,
            mrope_sections=(16, 24, 24),
        ),
        vocab_size=151936,
        tie_embeddings=True,
    ),
    "qwen2_vl_7b": _qwen2_vl(
        TextConfig(
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            mlp_size=18944,
            mrope_sections=(16, 24, 24),
        ),
        vocab_size=152064,
        tie_embeddings=False,
    ),
}


def preset(name: str) -> QwenVLConfig:
    """A named configuration; UserError with the nearest name where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
    raise UserError(f"model preset {name!r} does not exist; {hint}")
