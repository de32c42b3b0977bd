"""What an encoder and a generator need of a configuration, and of a run's record again."""

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

    instruction: str  # said before each row, or as the system of a chat
    max_tokens: int = between(1)  # of a row, images included
    max_patches: int = between(1)  # of a row, over all its images
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
    """The rows of a generator, and the answers behind them."""

    max_answer: int = between(2)  # tokens, the end of the turn among them


@dataclass(frozen=True)
class Computation(Options, section="model"):
    """How a model computes."""

    dtype: str = among(*DTYPES)


@dataclass(frozen=True)
class Embedding(Computation):
    """How an encoder computes, and what it keeps of its last state."""

    embedding_dim: int = between(0)  # first dimensions kept; 0: all


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
    """Which parameters are trained, and what the backward pass computes again."""

    remat: str = among(*REMATS)
    lora_rank: int = between(0)  # 0: all parameters are trained
    lora_alpha: float = between(1e-6, 10_000)  # an adapter counts alpha / rank
    lora_targets: str  # searched in kernels' paths

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained; None where all parameters are."""
        if not self.lora_rank:
            return None
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)


@dataclass(frozen=True)
class PresetOptions(Options, section="model"):
    """A model from scratch."""

    preset: str  # a name of models/presets.py
    vocab_size: int = between(1)  # of the tokenizer that is trained for it


def sections(options: EncoderOptions | GeneratorOptions) -> dict[str, dict[str, Any]]:
    """The part of a configuration that `of` makes these options from."""
    return {"model": dataclasses.asdict(options.model), "data": dataclasses.asdict(options.rows)}
