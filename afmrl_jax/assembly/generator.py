"""The generator as programs use it: a Qwen-VL model that answers a listing with its attributes.

`find_pretrained(path, Generator)` finds one again; `Answerer` lets it answer.
Axes: N rows · T tokens of an answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.core.mesh import local_rows, put_batch, replicated
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.prompts import ChatPrompt
from afmrl_jax.losses.language import answer_cross_entropy
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.sampler import Sampling, forbidden_ids, generate, sample_keys


@dataclass(frozen=True)
class Answer:
    """An answer as it was generated. closed: whether it ended by itself.

    tokens: int32[T], without the one that ended it. log_probs: float32[T], the policy's.
    """

    text: str
    closed: bool
    tokens: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True)
class Generator(Assembly):
    """Listings' rows to answers. Of the configuration's data it uses the sizes of a row,
    `instruction`, said as the system, and `max_answer`, the most tokens of an answer."""

    kind = "generator"

    def assemble(self, **options: Any) -> QwenVL:
        return QwenVL(self.model_config, **options)

    def processor(self, *, answers: bool) -> Processor:
        """Rows as the sampler goes on from them; or, to learn from, with room for their answers."""
        data = self.settings.data
        return self.make_processor(
            ChatPrompt(self.chat_template, data.instruction),
            max_answer=data.max_answer if answers else 0,
            # Answers that all end at one place lie in few chunks of the loss.
            pad_left=True,
        )

    def answer_loss(
        self, chunk: int
    ) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
        """A pure function (params, rows with answers) -> (sum in nats, number of answer tokens).

        chunk: positions of each row whose logits are alive at once.
        """
        graph = self.graph()

        def loss(params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, params)
            return answer_cross_entropy(
                model(rows), model.logits, rows["tokens"], rows["answer_mask"], chunk
            )

        return loss

    def sampling(self, temperature: float = 0.0) -> Sampling:
        """How answers are drawn, greedily at temperature 0, and how they end."""
        config, named = self.model_config, self.tokenizer
        return Sampling(
            self.settings.data.max_answer,
            stop=config.end_token_ids,
            forbidden=forbidden_ids(named, config.vocab_size) if named else (),
            pad=config.pad_token_id,
            temperature=temperature,
        )

    def read(self, tokens: np.ndarray, log_probs: np.ndarray, truncated: bool) -> Answer:
        """One answer of the sampler's; tokens, log_probs: [T], through the stop token."""
        end = len(tokens) if truncated else len(tokens) - 1
        tokens, log_probs = tokens[:end], log_probs[:end]
        # A special token is no attribute: it stays in sight, so that the format is broken.
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return Answer(text, not truncated, tokens, log_probs)


class Answerer:
    """Lets a generator answer many listings greedily, the same on every process.

    batch: rows at once, of all processes.
    """

    def __init__(self, generator: Generator, mesh: Mesh, batch: int):
        """Raises UserError where the mesh cannot split the batch."""
        self._generator, self._mesh, self._batch = generator, mesh, batch
        self._local = local_rows(mesh, batch, "eval.batch")
        self._processor = generator.processor(answers=False)
        graph, sampling = generator.graph(), generator.sampling()

        def answer(params: Any, rows: dict[str, jax.Array]):
            keys = sample_keys(jax.random.key(0), range(batch), 1)  # one sample; nothing is drawn
            samples = generate(graph, params, rows, keys, sampling)
            lengths = samples.mask.sum(-1, dtype=jnp.int32)
            return samples.tokens, samples.log_probs, lengths, samples.truncated

        self._answer = jax.jit(answer, out_shardings=replicated(mesh))

    def answers(
        self, params: Any, listings: np.ndarray, row: Callable[[int, int], Row]
    ) -> Iterator[Answer]:
        """The answers to listings, in their order.

        params: the generator's. listings: int[N], indices. row: (index, most images of a row) ->
        the question; it is asked for this process's listings only.
        """
        under_way: tuple[tuple[jax.Array, ...], int] | None = None
        for batch, real in batches_of(listings, self._batch):
            shown = [row(int(i), self._processor.max_images) for i in batch[self._local]]
            rows = put_batch(self._processor(shown), self._mesh, axis=0, rows=self._batch)
            # Returns at once: the device answers while the next batch is made here.
            begun = self._answer(params, rows), real
            if under_way:
                yield from self._read(*under_way)
            under_way = begun
        if under_way:
            yield from self._read(*under_way)

    def _read(self, out: tuple[jax.Array, ...], real: int) -> Iterator[Answer]:
        """Waits for a batch; real: how many of its rows are no filling."""
        tokens, log_probs, lengths, truncated = (np.asarray(x)[:, 0] for x in out)
        for n in range(real):
            end = lengths[n]
            yield self._generator.read(tokens[n, :end], log_probs[n, :end], truncated[n])


def batches_of(listings: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of one size, the last filled up with its first; beside each how many are real."""
    for start in range(0, len(listings), batch):
        piece = listings[start : start + batch]
        yield np.concatenate([piece, np.repeat(piece[:1], batch - len(piece))]), len(piece)
