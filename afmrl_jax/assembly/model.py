"""A model as programs use it: layers, tokenizer and row sizes put together.

A run's record holds all of these, so a checkpoint needs no other file. The encoder is in
encoder.py, the generator in generator.py.
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
from tokenizers import Tokenizer

from afmrl_jax.assembly.options import (
    DTYPES,
    EncoderOptions,
    GeneratorOptions,
    PresetOptions,
    TrainingOptions,
)
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.types import Params
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
from afmrl_jax.models.lora import LoRA, adapt, add_base_adapters
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights.hf_weights import with_head_of

log = logging.getLogger(__name__)

AnyOptions = EncoderOptions | GeneratorOptions


@dataclass(frozen=True)
class Assembly(abc.ABC):
    """The common parts of an encoder and a generator.

    options: None for a Hugging Face folder, which does not record how its model is used.
    """

    kind: ClassVar[str]  # name in a record
    options_type: ClassVar[type[AnyOptions]]
    options: AnyOptions | None
    model_config: QwenVLConfig
    tokenizer: Tokenizer | None  # None where only shapes matter
    chat_template: str = CHATML  # Jinja; "" where the model's folder has none
    remat: str = "none"  # one of REMATS: activations that the backward pass computes again
    lora: LoRA | None = None  # adapters in training; reading a checkpoint merges its adapters
    base_lora: tuple[LoRA, ...] = ()  # adapters of earlier runs, kept apart and frozen

    @abc.abstractmethod
    def assemble(self, **options: Any) -> Embedder | QwenVL:
        """The model without adapters; options: rngs, dtype, param_dtype and remat."""

    def build(self, rngs: nnx.Rngs) -> Embedder | QwenVL:
        """The model with its adapters, as in training."""
        dtype = DTYPES[self.options.model.dtype]
        # Frozen parameters are stored in the compute dtype; only trained ones need float32.
        param_dtype = dtype if self.lora else jnp.float32
        model = self.assemble(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=self.remat)
        add_base_adapters(model, self.base_lora)
        if self.lora:
            adapt(model, self.lora, rngs)
        return model

    def init_params(self, seed: int) -> Params:
        """Random parameters; float32, but frozen ones in the compute dtype."""
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(seed))))

    def graph(self) -> nnx.GraphDef:
        """The structure that `nnx.merge` needs beside parameters."""
        return _structure(self)[0]

    def make_processor(self, prompt: Prompt, **options: Any) -> Processor:
        """A processor of rows of the configured sizes. options: other arguments of Processor."""
        sizes = self.options.rows.sizes
        return Processor(self.tokenizer, self.model_config, sizes, prompt=prompt, **options)

    def abstract_rows(
        self,
        leading: tuple[int, ...],
        sharding: NamedSharding,
        *,
        answers: int = 0,
        length: int = 0,
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of the processor's arrays.

        answers: tokens of room for an answer. length: S, by default of the longest rows.
        """
        rows = self.options.rows
        tokens = length or rows.max_tokens + answers
        arrays = row_arrays(self.model_config, tokens, rows.max_patches, answers=answers > 0)
        return {
            name: jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)
            for name, array in arrays.items()
        }

    def for_training(self, training: TrainingOptions) -> Self:
        """The model with the adapters and the recomputation of training."""
        return dataclasses.replace(self, remat=training.remat, lora=training.lora)

    def record(self) -> dict[str, str]:
        """The strings that `from_record` needs beside the options."""
        return {
            "kind": self.kind,
            "model": json.dumps(self.model_config.to_hf()),
            "tokenizer": self.tokenizer.to_str(),
            "chat_template": self.chat_template,
            "base_lora": json.dumps([dataclasses.asdict(lora) for lora in self.base_lora]),
        }

    @classmethod
    def from_record(cls, options: AnyOptions | None, record: dict[str, str]) -> Self:
        """The model of a checkpoint. options: of the record's configuration, or None where the run
        trained the other kind of model."""
        tokenizer, template = Tokenizer.from_str(record["tokenizer"]), record["chat_template"]
        described = json.loads(record["model"])
        ends = functools.partial(_ends, described, tokenizer, template)
        # Of runs from before they were kept apart it is missing: those rounded them into kernels.
        base_lora = tuple(LoRA(**lora) for lora in json.loads(record.get("base_lora", "[]")))
        return cls(options, from_hf(described, ends), tokenizer, template, base_lora=base_lora)

    @classmethod
    def from_preset(cls, options: AnyOptions, start: PresetOptions, texts: Iterable[str]) -> Self:
        """A model from scratch, with a byte-level BPE tokenizer trained on `texts`."""
        tokenizer = train_tokenizer(texts, start.vocab_size)
        config = preset(start.preset).replace(
            vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
        )
        return cls(options, config, tokenizer)

    @classmethod
    def from_folder(cls, options: AnyOptions | None, folder: Path) -> Self:
        """The model and tokenizer of a Hugging Face folder, without its weights.

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
        return cls(options, config, tokenizer, template)

    @staticmethod
    def template_of(folder: Path) -> str:
        """The chat template of a Hugging Face folder; "" where it has none."""
        return chat_template(folder)


AnyAssembly = TypeVar("AnyAssembly", bound=Assembly)


def _ends(
    described: Mapping[str, Any], tokenizer: Tokenizer, template: str, folder: Path | None = None
) -> dict[str, Any]:
    """The stop tokens of answers and the padding token of rows: fields of a QwenVLConfig, the same
    for training, sampler, masks and exports.

    described: content of config.json. folder: the folder that holds it.

    In training an answer ends with the token that ends a turn of the chat template. A generated
    answer also ends with any other token that the model's files name as an end. Padding is masked,
    so the folder's padding token does not matter: rows are padded with <|endoftext|>.
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


def abstract_params(model: Assembly, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters."""
    return placed(nnx.to_pure_dict(_structure(model)[1]), mesh)


@functools.lru_cache(maxsize=8)  # a run asks several times, and building takes a while
def _structure(model: Assembly) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its parameters' shapes and dtypes."""
    return nnx.split(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))))


def placed(params: Params, mesh: Mesh) -> Params:
    """Abstract parameters with the shardings of models/partition.py."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        param_shardings(params, mesh),
    )
