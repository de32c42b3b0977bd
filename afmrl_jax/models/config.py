"""A Qwen-VL model's configuration: its sizes, its special tokens, and what its family computes.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL are one class; FAMILIES holds their differences. A configuration
is read from a Hugging Face config.json (`from_hf`) or taken from `presets`. This file imports no
jax, because data workers and the planner read these numbers too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.hf_fields import TEXT_DEFAULTS, VISION_DEFAULTS, number, part, whole, wholes

VISION_TOKEN = re.compile(r"<\|(vision|image|video)_\w+\|>")  # as Qwen's tokenizers name them


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; its patch merger makes vectors of the decoder's width.

    Families differ in the fields from `norm` on; FAMILIES has the values of most of them.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int  # pixels
    merge_size: int  # patches a side of a window that is merged into one token
    temporal_patch_size: int  # frames a patch; a still image is repeated
    in_channels: int = 3
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6
    norm: str = "layer"  # layer | rms
    activation: str = "quick_gelu"  # quick_gelu | silu | gelu_tanh
    gated: bool = False  # the MLP: down(activation(gate(x)) * up(x))
    patch_bias: bool = False
    window_size: int = 0  # pixels a side of an attention window; 0: none, patches see their image
    full_attention_layers: tuple[int, ...] = ()  # numbers of the layers without windows
    num_positions: int = 0  # size of a square table of learned positions, resampled to each image
    deepstack_layers: tuple[int, ...] = ()  # numbers of layers whose outputs enter the decoder

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channels x frames x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches a side of an attention window, in whole merge windows; 0 without windows."""
        return self.window_size // (self.merge_size * self.patch_size) * self.merge_size

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The number of layers that each scan runs: a scan ends after every DeepStack layer."""
        ends = (*(layer + 1 for layer in self.deepstack_layers), self.num_layers)
        return tuple(end - start for start, end in zip((0, *ends), ends) if end > start)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise UserError(
                f"model config: vision width {self.hidden_size} over {self.num_heads} heads; the "
                "2-D rotary embedding needs a whole head size that is a multiple of 4"
            )
        if self.window_size and not self.window_patches:
            raise UserError(
                f"model config: window_size {self.window_size} is smaller than one merged token, "
                f"{self.merge_size} x {self.patch_size} pixels; make it a multiple of that"
            )
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise UserError(
                f"model config: {self.num_positions} learned positions are no square table; give "
                "num_position_embeddings a square number"
            )
        taps, layers = self.deepstack_layers, range(self.num_layers)
        if list(taps) != sorted(set(taps)) or not all(tap in layers for tap in taps):
            raise UserError(
                f"model config: deepstack_visual_indexes {list(taps)} must be layers of the vision "
                f"tower, 0 to {self.num_layers - 1}, each once and in order"
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
    mrope_sections: tuple[int, ...]  # numbers of rotary frequencies of time, height and width
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    attention_bias: bool = True  # of query, key and value
    qk_norm: bool = False  # RMS norm of each head's query and key
    mrope_interleaved: bool = False  # frequencies take turns t h w t h w; otherwise three chunks

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


# The fields of VisionConfig and of TextConfig that an architecture fixes, whatever its size.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({}, {}),
    "qwen2_5_vl": ({"norm": "rms", "activation": "silu", "gated": True}, {}),
    "qwen3_vl": (
        {"activation": "gelu_tanh", "patch_bias": True},
        {"attention_bias": False, "qk_norm": True, "mrope_interleaved": True},
    ),
}


@dataclass(frozen=True)
class QwenVLConfig:
    """A whole model: tower, decoder, vocabulary."""

    vision: VisionConfig
    text: TextConfig
    vocab_size: int
    image_token_id: int  # takes the place of a merged image feature
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int  # ends an answer in training
    pad_token_id: int  # <|endoftext|> where a tokenizer is known, whatever the folder's padding is
    tie_embeddings: bool  # the head is the embedding table
    initializer_range: float = 0.02
    architecture: str = "qwen2_vl"  # a key of FAMILIES
    other_eos_token_ids: tuple[int, ...] = ()  # end an answer too, according to a folder's files

    def __post_init__(self) -> None:
        names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = [(name, getattr(self, name)) for name in (*names, "eos_token_id", "pad_token_id")]
        for name, token_id in (*ids, *(("eos_token_id", i) for i in self.other_eos_token_ids)):
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                raise UserError(
                    f"model config: {name} {token_id!r} is outside the vocabulary of "
                    f"{self.vocab_size} tokens; set {name} and vocab_size together"
                )
        if len(self.vision.deepstack_layers) > self.text.num_layers:
            raise UserError(
                f"model config: {len(self.vision.deepstack_layers)} DeepStack layers feed a "
                f"decoder of {self.text.num_layers}; it needs a layer for each"
            )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: training's first; padding's too, as in Qwen's files."""
        ends = (self.eos_token_id, self.pad_token_id, *self.other_eos_token_ids)
        return tuple(dict.fromkeys(ends))

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The number of layers of each decoder scan; the first scan receives DeepStack features."""
        first = len(self.vision.deepstack_layers)
        return tuple(count for count in (first, self.text.num_layers - first) if count)

    def replace(self, **changes: Any) -> "QwenVLConfig":
        """A copy with fields of this class changed: a vocabulary's size and its special tokens."""
        return dataclasses.replace(self, **changes)

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face config.json's content, laid out as this architecture is published.

        Qwen3-VL has a `text_config`, the older two are flat; `from_hf` reads it back equal.
        """
        vision, text, others = self.vision, self.text, self.other_eos_token_ids
        rope = {"mrope_section": list(text.mrope_sections)}
        if text.mrope_interleaved:
            rope |= {"rope_type": "default", "mrope_interleaved": True}
        else:
            rope |= {"type": "mrope"}
        decoder = {
            "vocab_size": self.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.mlp_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": text.norm_epsilon,
            "rope_theta": text.rope_theta,
            "rope_scaling": rope,
            "initializer_range": self.initializer_range,
            "eos_token_id": [self.eos_token_id, *others] if others else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.pad_token_id,  # published files call the padding token so
        }
        if self.architecture == "qwen3_vl":
            qwen3_fields = {
                "model_type": "qwen3_vl_text",
                "head_dim": text.head_dim,
                "attention_bias": text.attention_bias,
            }
            decoder = {"text_config": {**decoder, **qwen3_fields}}
        return {
            "architectures": [_CLASSES[self.architecture]],
            "model_type": self.architecture,
            **decoder,
            "tie_word_embeddings": self.tie_embeddings,
            "image_token_id": self.image_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "vision_config": {
                "depth": vision.num_layers,
                "num_heads": vision.num_heads,
                "in_channels": vision.in_channels,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "hidden_act": _ACTIVATIONS[vision.activation],
                **self._family_vision_to_hf(),
            },
        }

    def _family_vision_to_hf(self) -> dict[str, Any]:
        """The fields of `vision_config` whose names depend on the architecture."""
        vision, width = self.vision, self.text.hidden_size
        if self.architecture == "qwen2_vl":
            ratio = vision.mlp_size // vision.hidden_size
            return {"embed_dim": vision.hidden_size, "hidden_size": width, "mlp_ratio": ratio}
        sizes = {"hidden_size": vision.hidden_size, "intermediate_size": vision.mlp_size}
        sizes |= {"out_hidden_size": width, "model_type": self.architecture}
        if self.architecture == "qwen2_5_vl":
            full = list(vision.full_attention_layers)
            return {**sizes, "window_size": vision.window_size, "fullatt_block_indexes": full}
        return {
            **sizes,
            "num_position_embeddings": vision.num_positions,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
        }


_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
# Our names of activations -> transformers' names.
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
# The fields of a config.json that describe the decoder's rotary embedding.
_ROPE = ("rope_scaling", "rope_parameters", "rope_theta")


def from_hf(
    config: Mapping[str, Any], ends: Callable[[], Mapping[str, Any]] | None = None
) -> QwenVLConfig:
    """Reads a Hugging Face config.json's content as transformers 5 does, its defaults included.

    The decoder's fields stand in `text_config`, or beside it where there is none (Qwen2-VL and
    Qwen2.5-VL as published). ends: returns the fields eos_token_id, other_eos_token_ids and
    pad_token_id, for callers with the tokenizer, which is a better source than this file; called
    when all else is read.
    Raises UserError where the architecture is not one of ours, a field cannot be read, or the
    checkpoint needs something that this model does not compute.
    """
    architecture = config.get("model_type")
    if architecture not in list(FAMILIES):  # it may be anything that JSON holds
        raise UserError(
            f"config.json: model_type {architecture!r} is not supported; use a checkpoint of "
            f"{', '.join(FAMILIES)}"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"config.json: the weights are quantised (quantization_config, {method}), and this "
            "model computes with plain ones; use the checkpoint that is not quantised"
        )
    nested = part(config, "text_config")
    decoder = config if config.get("text_config") is None else nested
    if decoder is nested:
        _check_beside(architecture, config, nested)
    elif architecture == "qwen3_vl":
        raise UserError(
            "config.json: no text_config, which holds the sizes of a qwen3_vl decoder; fetch the "
            "file again"
        )
    vision = {**VISION_DEFAULTS[architecture], **part(config, "vision_config")}
    rope = _rope(architecture, decoder)
    decoder = {**TEXT_DEFAULTS[architecture], **decoder}
    _check_supported(architecture, decoder, vision, rope)
    text = {**config, **{key: value for key, value in nested.items() if value is not None}}
    ties = [config.get("tie_word_embeddings")]
    if architecture != "qwen3_vl":  # whose text_config's field transformers 5 does not read
        ties.append(nested.get("tie_word_embeddings"))
    return QwenVLConfig(
        vision=_vision_from_hf(architecture, vision),
        text=_text_from_hf(architecture, decoder, rope),
        vocab_size=whole(decoder, "vocab_size"),
        image_token_id=whole(config, "image_token_id", 151655, least=0),
        vision_start_token_id=whole(config, "vision_start_token_id", 151652, least=0),
        vision_end_token_id=whole(config, "vision_end_token_id", 151653, least=0),
        tie_embeddings=any(ties),
        initializer_range=number({"initializer_range": 0.02, **decoder}, "initializer_range"),
        architecture=architecture,
        **(ends() if ends else _ends_from_hf(text)),
    )


def _ends_from_hf(text: Mapping) -> dict[str, Any]:
    eos, *others = listed(text.get("eos_token_id")) or [151645]
    # Qwen's tokenizers pad with <|endoftext|>, which the published configs only call `bos`.
    pads = [*listed(text.get("pad_token_id")), *listed(text.get("bos_token_id")), eos]
    return {"eos_token_id": eos, "other_eos_token_ids": tuple(others), "pad_token_id": pads[0]}


def _check_beside(architecture: str, config: Mapping, nested: Mapping) -> None:
    """Raises UserError for a decoder's field that stands beside `text_config` and not in it, with
    another value than transformers' default: transformers would not read it."""
    stray = [
        name
        for name, value in TEXT_DEFAULTS[architecture].items()
        if name in config and name not in (*nested, *_ROPE) and config[name] != value
    ]
    if not any(name in nested for name in _ROPE):
        rope = _rope(architecture, nested)
        stray += [name for name in _ROPE if name in config and _rope(architecture, config) != rope]
    if stray:
        raise UserError(
            f"config.json: {', '.join(stray)} stands beside text_config, where transformers does "
            "not read it, and not in it; move it into text_config"
        )


def _rope(architecture: str, decoder: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, mrope_section and the rotary embedding's other fields, by their new names."""
    fields = part(decoder, "rope_scaling") or part(decoder, "rope_parameters")
    defaults = TEXT_DEFAULTS[architecture]
    theta = decoder.get("rope_theta", defaults["rope_theta"])
    rope_type = fields.get("rope_type", fields.get("type", "default"))
    rope = {"mrope_section": defaults["mrope_section"], "rope_theta": theta, **fields}
    rope.pop("type", None)
    return rope | {"rope_type": "default" if rope_type == "mrope" else rope_type}


def _text_from_hf(architecture: str, text: Mapping, rope: Mapping) -> TextConfig:
    hidden_size, num_heads = whole(text, "hidden_size"), whole(text, "num_attention_heads")
    head_dim = hidden_size // num_heads
    kv_heads = text["num_key_value_heads"]
    return TextConfig(
        hidden_size=hidden_size,
        num_layers=whole(text, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads is None else whole(text, "num_key_value_heads"),
        head_dim=whole(text, "head_dim") if architecture == "qwen3_vl" else head_dim,
        mlp_size=whole(text, "intermediate_size"),
        mrope_sections=wholes(rope, "mrope_section"),
        rope_theta=number(rope, "rope_theta"),
        norm_epsilon=number(text, "rms_norm_eps"),
        **FAMILIES[architecture][1],
    )


def _vision_from_hf(architecture: str, vision: Mapping) -> VisionConfig:
    if architecture == "qwen2_vl":
        width = whole(vision, "embed_dim")
        fields = {"hidden_size": width, "mlp_size": int(width * number(vision, "mlp_ratio"))}
    else:
        fields = {
            "hidden_size": whole(vision, "hidden_size"),
            "mlp_size": whole(vision, "intermediate_size"),
        }
    if architecture == "qwen2_5_vl":
        fields["window_size"] = whole(vision, "window_size")
        fields["full_attention_layers"] = wholes(vision, "fullatt_block_indexes")
    if architecture == "qwen3_vl":
        fields["num_positions"] = whole(vision, "num_position_embeddings")
        fields["deepstack_layers"] = wholes(vision, "deepstack_visual_indexes")
    return VisionConfig(
        num_layers=whole(vision, "depth"),
        num_heads=whole(vision, "num_heads"),
        patch_size=whole(vision, "patch_size"),
        merge_size=whole(vision, "spatial_merge_size"),
        temporal_patch_size=whole(vision, "temporal_patch_size"),
        in_channels=whole(vision, "in_channels"),
        **fields,
        **FAMILIES[architecture][0],
    )


def _check_supported(architecture: str, text: Mapping, vision: Mapping, rope: Mapping) -> None:
    """Raises UserError for a field whose value this model does not compute."""
    family_vision, family_text = FAMILIES[architecture]
    activation = _ACTIVATIONS[family_vision.get("activation", "quick_gelu")]
    interleaved = family_text.get("mrope_interleaved", False)
    bias = family_text.get("attention_bias", True)
    out = vision["hidden_size" if architecture == "qwen2_vl" else "out_hidden_size"]
    values = {  # field -> its value, the supported ones
        "hidden_act": (text.get("hidden_act", "silu"), {"silu"}),
        "vision_config.hidden_act": (vision.get("hidden_act", activation), {activation}),
        "vision_config's output width": (out, {whole(text, "hidden_size")}),
        "use_sliding_window": (bool(text.get("use_sliding_window")), {False}),
        "rope_scaling.type": (rope["rope_type"], {"default"}),
        "rope_scaling.mrope_interleaved": (
            rope.get("mrope_interleaved", interleaved),
            {interleaved},
        ),
        "attention_bias": (text.get("attention_bias", bias), {bias}),
    }
    if architecture != "qwen3_vl" and text.get("head_dim") is not None:
        even = whole(text, "hidden_size") // whole(text, "num_attention_heads")
        values["head_dim"] = (text["head_dim"], {even})
    others = (name for name in text.get("layer_types") or () if name != "full_attention")
    values["layer_types"] = (next(others, "full_attention"), {"full_attention"})
    for name, (value, supported) in values.items():
        if not isinstance(value, str | int | float) or value not in supported:
            expected = " or ".join(map(repr, sorted(supported)))
            raise UserError(
                f"config.json: {name} is {value!r}, and this model computes only {expected}; "
                f"use a plain {architecture} checkpoint with the config.json that belongs to it"
            )


def listed(value: Any) -> list[Any]:
    """A file's value for special tokens as a list: the file may hold none, one or several."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
