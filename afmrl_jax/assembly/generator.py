"""The generator as programs use it: a Qwen-VL model that answers a listing with its attributes.

`find_pretrained(path, Generator)` finds a trained one; `LoadedGenerator` computes its answers.
Axes: N rows · T tokens of an answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.assembly.options import GeneratorOptions
from afmrl_jax.core.types import Params, Rows
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.prompts import ChatPrompt
from afmrl_jax.losses.language import answer_cross_entropy
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.sampler import Sampling, forbidden_ids


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    closed: whether it ended by itself. tokens: int32[T], without the stop token. log_probs:
    float32[T], of the policy.
    """

    text: str
    closed: bool
    tokens: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Generator(Assembly):
    """Listings' rows to answers; the instruction is the system message of the chat."""

    kind = "generator"
    options_type = GeneratorOptions

    def assemble(self, **options: Any) -> QwenVL:
        return QwenVL(self.model_config, **options)

    def processor(self, *, answers: bool, instruction: str | None = None) -> Processor:
        """The processor of prompts for the sampler; with `answers`, of rows for training, with room
        for an answer. instruction: in place of that of the rows."""
        rows = self.options.rows
        words = rows.instruction if instruction is None else instruction
        return self.make_processor(
            ChatPrompt(self.chat_template, words),
            max_answer=rows.max_answer if answers else 0,
            # Answers then end in the same column, and lie in few chunks of the loss.
            pad_left=True,
        )

    def answer_loss(self, chunk: int) -> Callable[[Params, Rows], tuple[jax.Array, jax.Array]]:
        """A pure function (params, rows with answers) -> (sum in nats, number of answer tokens).

        chunk: positions of each row whose logits are in memory at once.
        """
        graph = self.graph()

        def loss(params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, params)
            return answer_cross_entropy(
                model(rows), model.logits, rows["tokens"], rows["answer_mask"], chunk
            )

        return loss

    def sampling(self, temperature: float = 0.0) -> Sampling:
        """How answers are drawn, greedily at temperature 0, and how they end."""
        config, tokenizer = self.model_config, self.tokenizer
        return Sampling(
            self.options.rows.max_answer,
            stop=config.end_token_ids,
            forbidden=forbidden_ids(tokenizer, config.vocab_size) if tokenizer else (),
            pad=config.pad_token_id,
            temperature=temperature,
        )

    def read(self, tokens: np.ndarray, log_probs: np.ndarray, truncated: bool) -> Answer:
        """An answer of the sampler. tokens, log_probs: [T], through the stop token."""
        end = len(tokens) if truncated else len(tokens) - 1
        tokens, log_probs = tokens[:end], log_probs[:end]
        # Special tokens stay in the text, where they break the format.
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return Answer(text, not truncated, tokens, log_probs)


def batches_of(listings: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of listings, int64[batch], and the number of each without padding: the last batch is
    padded with its first listing."""
    for start in range(0, len(listings), batch):
        piece = listings[start : start + batch]
        yield np.concatenate([piece, np.repeat(piece[:1], batch - len(piece))]), len(piece)
