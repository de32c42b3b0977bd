"""The encoder: rows of listings in, embeddings out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.assembly.options import EncoderOptions
from afmrl_jax.core.types import Params, Rows
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.prompts import chat_template, embedder_template, embedding_prompt
from afmrl_jax.models.embedder import Embedder


@dataclass(frozen=True)
class Encoder(Assembly):
    """Listings' rows to embeddings."""

    kind = "encoder"
    options_type = EncoderOptions

    def assemble(self, **options: Any) -> Embedder:
        dim = self.options.model.embedding_dim or None
        return Embedder(self.model_config, embedding_dim=dim, **options)

    @staticmethod
    def template_of(folder: Path) -> str:
        return embedder_template(folder, chat_template(folder))

    def embed(self) -> Callable[[Params, Rows], jax.Array]:
        """A pure function (params, rows[..., N, S]) -> float32[..., N, E] for any leading axes."""
        graph = self.graph()

        def embed(params: Params, rows: Rows) -> jax.Array:
            leading = rows["tokens"].shape[:-1]
            n = math.prod(leading)  # reshape cannot infer it for rows without patches
            flat = {k: v.reshape(n, *v.shape[len(leading) :]) for k, v in rows.items()}
            vectors = nnx.merge(graph, params)(flat)
            return vectors.reshape(*leading, vectors.shape[-1])

        return embed

    def processor(self) -> Processor:
        rows = self.options.rows
        return self.make_processor(
            embedding_prompt(rows.prompt, self.chat_template, rows.instruction)
        )
