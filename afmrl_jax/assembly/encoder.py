"""The encoder: rows of listings in, embeddings out."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from afmrl_jax.assembly.model import Assembly
from afmrl_jax.core.mesh import local_rows, put_batch, replicated
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.prompts import chat_template, embedder_template, embedding_prompt
from afmrl_jax.models.embedder import Embedder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder(Assembly):
    """Listings' rows to embeddings."""

    kind = "encoder"

    def assemble(self, **options: Any) -> Embedder:
        dim = self.settings.model.embedding_dim or None
        return Embedder(self.model_config, embedding_dim=dim, **options)

    @staticmethod
    def template_of(folder: Path) -> str:
        return embedder_template(folder, chat_template(folder))

    def embed(self) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
        """A pure function (params, rows[..., N, S]) -> float32[..., N, E]; leading axes stay."""
        graph = self.graph()

        def embed(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
            leading = rows["tokens"].shape[:-1]
            n = math.prod(leading)  # not -1, which rows without patches leave open
            flat = {k: v.reshape(n, *v.shape[len(leading) :]) for k, v in rows.items()}
            vectors = nnx.merge(graph, params)(flat)
            return vectors.reshape(*leading, vectors.shape[-1])

        return embed

    def processor(self) -> Processor:
        data = self.settings.data
        return self.make_processor(
            embedding_prompt(data.prompt, self.chat_template, data.instruction)
        )


def host_embedder(
    embed: Callable[[Any, dict[str, jax.Array]], jax.Array], mesh: Mesh, batch: int
) -> tuple[Callable[[Any, dict[str, np.ndarray]], jax.Array], np.ndarray]:
    """A function (params, this process's rows) -> float32[batch, E] on every device, and which of
    the batch's rows are this process's. Raises UserError where the mesh cannot split the batch.
    """
    jitted = jax.jit(embed, out_shardings=replicated(mesh))

    def embed_rows(params: Any, rows: dict[str, np.ndarray]) -> jax.Array:
        return jitted(params, put_batch(rows, mesh, axis=0, rows=batch))

    return embed_rows, local_rows(mesh, batch, "eval.batch")
