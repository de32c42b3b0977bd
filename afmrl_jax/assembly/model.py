"""A model as programs use it: layers, tokenizer and row sizes put together from a configuration.

A run's record holds all of it but the parameters, so a checkpoint needs nothing beside it. The
encoder is in encoder.py, the generator in generator.py.
"""

import abc
import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, among, between
from afmrl_jax.data.images import check_preprocessor
from afmrl_jax.data.processor import Processor, checked_ids, row_arrays
from afmrl_jax.data.prompts import CHATML, Prompt, chat_template, end_of_turn
from afmrl_jax.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    named_end_ids,
    special_token_ids,
    train_tokenizer,
)
from afmrl_jax.models.config import QwenVLConfig, from_hf
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.layers import REMATS
from afmrl_jax.models.lora import LoRA, adapt, hold
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights.hf_weights import with_head_of

log = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class ModelFields(Options, section="model"):
    """How a model computes, and which of its parameters are trained."""

    dtype: str = among(*DTYPES)
    remat: str = among(*REMATS)
    lora_rank: int = between(0)  # 0: all parameters are trained
    lora_alpha: float = between(1e-6, 10_000)  # an adapter counts alpha / rank
    lora_targets: str  # searched in kernels' paths


@dataclass(frozen=True)
class PresetFields(Options, section="model"):
    """A model from scratch."""

    preset: str  # a name of models/presets.py
    vocab_size: int = between(1)  # of its tokenizer


@dataclass(frozen=True)
class EmbeddingFields(Options, section="model"):
    """What an encoder makes of its last state."""

    embedding_dim: int = between(0)  # first dimensions kept; 0: all


@dataclass(frozen=True)
class RowFields(Options, section="data"):
    """The rows that a model reads."""

    instruction: str
    max_tokens: int = between(1)
    max_patches: int = between(1)
    min_pixels: int = between(1)
    max_pixels: int = between(1)


@dataclass(frozen=True)
class Assembly(abc.ABC):
    """What an encoder and a generator have in common.

    settings: a configuration, of which its `model` and `data` parts are used.
    """

    kind: ClassVar[str]  # how a record names it
    settings: ConfigDict
    model_config: QwenVLConfig
    tokenizer: Tokenizer | None  # None where only shapes matter
    chat_template: str = CHATML  # Jinja; "" where the model's folder has none
    lora: LoRA | None = None  # in training; a checkpoint's adapters are merged when it is read
    base_lora: tuple[LoRA, ...] = ()  # or kept apart, frozen, by a run that trains others

    @abc.abstractmethod
    def assemble(self, **options: Any) -> Embedder | QwenVL:
        """The model without adapters; options: rngs, dtype, param_dtype and remat."""

    def build(self, rngs: nnx.Rngs) -> Embedder | QwenVL:
        """The model as it is trained. Raises UserError for an unknown `model.dtype`."""
        settings = self.settings.model
        if settings.dtype not in DTYPES:
            raise UserError(f"model.dtype is {settings.dtype!r}: use {' or '.join(DTYPES)}")
        dtype = DTYPES[settings.dtype]
        # What no optimizer adds small steps to is kept as it is multiplied.
        param_dtype = dtype if self.lora else jnp.float32
        model = self.assemble(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=settings.remat)
        hold(model, self.base_lora)
        if self.lora:
            adapt(model, self.lora, rngs)
        return model

    def init_params(self, seed: int) -> Any:
        """Fresh parameters as a nested dict; float32, but frozen ones in `model.dtype`."""
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(seed))))

    def graph(self) -> nnx.GraphDef:
        """What `nnx.merge` needs beside parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))[0]

    def make_processor(self, prompt: Prompt, **more: Any) -> Processor:
        """Rows of the configuration's sizes; more: the Processor's other arguments."""
        data = self.settings.data
        return Processor(
            self.tokenizer,
            self.model_config,
            max_tokens=data.max_tokens,
            max_patches=data.max_patches,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            prompt=prompt,
            **more,
        )

    def abstract_rows(
        self,
        leading: tuple[int, ...],
        sharding: NamedSharding,
        *,
        answers: int = 0,
        length: int = 0,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The processor's arrays, as it makes them with room for `answers` tokens; length: S, of
        the longest rows by default."""
        data = self.settings.data
        tokens = length or data.max_tokens + answers
        arrays = row_arrays(self.model_config, tokens, data.max_patches, answers=answers > 0)
        return {
            name: jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)
            for name, array in arrays.items()
        }

    def record(self) -> dict[str, str]:
        """What `from_record` needs beside the configuration."""
        return {
            "kind": self.kind,
            "model": json.dumps(self.model_config.to_hf()),
            "tokenizer": self.tokenizer.to_str(),
            "chat_template": self.chat_template,
            "base_lora": json.dumps([dataclasses.asdict(lora) for lora in self.base_lora]),
        }

    @classmethod
    def from_record(cls, settings: ConfigDict, record: dict[str, str]) -> Self:
        """The model of a checkpoint."""
        tokenizer, template = Tokenizer.from_str(record["tokenizer"]), record["chat_template"]
        described = json.loads(record["model"])
        ends = functools.partial(_ends, described, tokenizer, template)
        # Of runs from before they were kept apart it is missing: those rounded them into kernels.
        base_lora = tuple(LoRA(**lora) for lora in json.loads(record.get("base_lora", "[]")))
        return cls(settings, from_hf(described, ends), tokenizer, template, base_lora=base_lora)

    @classmethod
    def from_preset(cls, settings: ConfigDict, texts: Iterable[str]) -> Self:
        """A model from scratch, with a byte-level BPE trained on `texts`."""
        tokenizer = train_tokenizer(texts, settings.model.vocab_size)
        config = preset(settings.model.preset).replace(
            vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
        )
        return cls(settings, config, tokenizer)

    @classmethod
    def from_folder(cls, settings: ConfigDict | None, folder: Path) -> Self:
        """The model and tokenizer of a Hugging Face folder; its weights are read apart.

        Raises UserError where the folder has no config.json or it is not JSON, where its files
        belong to different models, or weights are damaged.
        """
        path = folder / "config.json"
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(described, dict):
                raise UserError("config.json holds no object: fetch it again")
            tokenizer, template = load_tokenizer(folder), cls.template_of(folder)
            ends = functools.partial(_ends, described, tokenizer, template, folder)
            config = from_hf(described, ends)
            checked_ids(tokenizer, config)
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no config.json, which belongs to the weights there: fetch it too"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        except UserError as error:
            place = "" if str(folder) in str(error) else f"{folder}: "
            raise UserError(f"{place}{error}") from None
        config = with_head_of(folder, config)
        check_preprocessor(folder, config)
        return cls(settings, config, tokenizer, template)

    @staticmethod
    def template_of(folder: Path) -> str:
        """The chat template of a Hugging Face folder; "" where it has none."""
        return chat_template(folder)


AnyAssembly = TypeVar("AnyAssembly", bound=Assembly)


def lora_of(settings: ConfigDict) -> LoRA | None:
    """How training adapts the model; None where it trains all parameters."""
    model = settings.model
    if not model.lora_rank:
        return None
    return LoRA(model.lora_rank, model.lora_alpha, model.lora_targets)


def _ends(
    described: Mapping[str, Any], tokenizer: Tokenizer, template: str, folder: Path | None = None
) -> dict[str, Any]:
    """What ends an answer and what pads rows: fields of a QwenVLConfig, the same for training,
    sampler, masks and exports. described: config.json's content; folder: where it lies.

    Training ends answers as the chat template ends a turn. An answer that is generated ends there
    too, and at each other token that any of the model's files calls its end. Padding is masked, so
    that what a folder pads with does not matter: rows are padded with <|endoftext|>.
    """
    ids = special_token_ids(tokenizer)
    pad = {**described, **(described.get("text_config") or {})}.get("pad_token_id")
    if folder and pad not in (None, ids["pad_token_id"]):
        log.info(
            "%s: config.json pads with token %s, which is not used: rows are padded with %s, %d, "
            "and padding is masked",
            *(folder, pad, END_OF_TEXT, ids["pad_token_id"]),
        )
    eos = tokenizer.token_to_id(end_of_turn(template, tokenizer))
    named = (ids["eos_token_id"], *named_end_ids(tokenizer, described, folder))
    others = [i for i in dict.fromkeys(named) if i not in (eos, ids["pad_token_id"])]
    return {
        "eos_token_id": eos,
        "other_eos_token_ids": tuple(others),
        "pad_token_id": ids["pad_token_id"],
    }


def abstract_params(enc: Assembly, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters."""
    return placed(jax.eval_shape(lambda: enc.init_params(0)), mesh)


def placed(params: Any, mesh: Mesh) -> Any:
    """Abstract parameters with the shardings that partition's rules give them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        param_shardings(params, mesh),
    )
