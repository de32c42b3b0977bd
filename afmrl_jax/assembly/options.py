"""The fields of a configuration, or of a run's record, that make an encoder or a generator."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from afmrl_jax.core.options import Options, among, between
from afmrl_jax.data.processor import RowSizes
from afmrl_jax.models.layers import REMATS
from afmrl_jax.models.lora import LoRA

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class RowOptions(Options, section="data"):
    """The rows that a model reads."""

    instruction: str  # text before each row, or the system message of a chat
    max_tokens: int = between(1)  # of a row, images included
    max_patches: int = between(1)  # of all images of a row
    min_pixels: int = between(1)  # area to which a smaller image is enlarged
    max_pixels: int = between(1)  # area to which a larger image is reduced

    @property
    def sizes(self) -> RowSizes:
        """The sizes of a prompt's row."""
        return RowSizes(self.max_tokens, self.max_patches, self.min_pixels, self.max_pixels)


@dataclass(frozen=True)
class EncoderRows(RowOptions):
    """The rows of an encoder."""

    prompt: str = among("plain", "chat")


@dataclass(frozen=True)
class GeneratorRows(RowOptions):
    """The rows of a generator, and the answers that follow them."""

    max_answer: int = between(2)  # tokens, the end of the turn included


@dataclass(frozen=True)
class Computation(Options, section="model"):
    """The dtype of a model's computation."""

    dtype: str = among(*DTYPES)


@dataclass(frozen=True)
class Embedding(Computation):
    """The dtype of an encoder's computation, and the size of its embedding."""

    embedding_dim: int = between(0)  # first dimensions of the last state that are kept; 0: all


@dataclass(frozen=True)
class EncoderOptions(Options):
    """All of a configuration that changes an encoder's vectors."""

    model: Embedding
    rows: EncoderRows


@dataclass(frozen=True)
class GeneratorOptions(Options):
    """All of a configuration that changes a generator's answers."""

    model: Computation
    rows: GeneratorRows


@dataclass(frozen=True)
class TrainingOptions(Options, section="model"):
    """The trained parameters, and the activations that the backward pass computes again."""

    remat: str = among(*REMATS)
    lora_rank: int = between(0)  # 0: all parameters are trained
    lora_alpha: float = between(1e-6, 10_000)  # an adapter is scaled by alpha / rank
    lora_targets: str  # regular expression, searched in the paths of kernels

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained; None where all parameters are trained."""
        if not self.lora_rank:
            return None
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)


@dataclass(frozen=True)
class PresetOptions(Options, section="model"):
    """A model from scratch."""

    preset: str  # a name of models/presets.py
    vocab_size: int = between(1)  # of its tokenizer, which is trained as well


def sections(options: EncoderOptions | GeneratorOptions) -> dict[str, dict[str, Any]]:
    """The sections of a configuration from which `of` makes these options."""
    return {"model": dataclasses.asdict(options.model), "data": dataclasses.asdict(options.rows)}
