"""Distillation of embeddings: a student's cosines are pulled to those of its teachers' vectors
(Park et al. 2019, arXiv 1904.05068, with cosines for distances), and its ranking of a batch to
theirs (Fang et al. 2021, arXiv 2101.04731).

With S_ij the student's cosine of query i and target j, T_ij the teachers', t the temperature, and
means over the pairs that a teacher knows,
    L = mean (S_ij - T_ij)^2 + r mean_i KL(softmax_j(T_ij / t) || softmax_j(S_ij / t)).

Axes: A micro-batches · C pairs of one micro-batch · V views of a pair · B = A C queries · M targets
· E embedding · K teachers · D numbers of all teachers' vectors.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.catalog.teachers import TeacherFiles
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.types import Metrics, Params, Rows
from afmrl_jax.losses.agcl import sides_on
from afmrl_jax.losses.contrastive import MASKED


@dataclass(frozen=True)
class Distillation(Options, section="loss"):
    """What of the teachers is learned."""

    temperature: float = between(1e-4, 10)
    ranking_weight: float = between(0, 1000)  # r


@dataclass(frozen=True)
class Distill:
    """The objective (`training.objective.Objective`) of configs/distill.py."""

    settings: Distillation
    mesh: Mesh

    batch_arrays = ("teacher", "teacher_weight")
    trainable = ""
    options = (Distillation, TeacherFiles)

    @classmethod
    def of(cls, config: Any, statistics: CorpusStatistics | None, mesh: Mesh) -> Self:
        return cls(Distillation.of(config), mesh)

    def params(self, width: int) -> Params:
        return {}

    def memory(self, width: int, batch: Rows) -> Rows:
        return {}

    def __call__(
        self, trained: Params, memory: Rows, embeddings: jax.Array, batch: Rows
    ) -> tuple[jax.Array, Rows, Metrics]:
        """The loss, of each device's queries against all targets.

        embeddings: float32[A, C, V, E]. batch: `teacher` float32[A, C, V, D] and `teacher_weight`
        float32[A, C, V, K], see `catalog.teachers.Teachers`.
        """
        cosines = _products(embeddings, self.mesh)
        weights = _products(batch["teacher_weight"], self.mesh)
        is_known = weights > 0
        taught = _products(batch["teacher"], self.mesh) / jnp.where(is_known, weights, 1)
        count = jnp.maximum(jnp.sum(is_known), 1)
        error = jnp.sum(jnp.where(is_known, cosines - taught, 0) ** 2) / count

        def log_shares(scores: jax.Array) -> jax.Array:
            logits = jnp.where(is_known, scores / self.settings.temperature, MASKED)
            return jax.nn.log_softmax(logits, axis=1)

        theirs, ours = log_shares(taught), log_shares(cosines)
        divergence = jnp.where(is_known, jnp.exp(theirs) * (theirs - ours), 0)
        queries = jnp.maximum(jnp.sum(is_known.any(axis=1)), 1)
        ranking = jnp.sum(divergence) / queries
        value = error + self.settings.ranking_weight * ranking
        metrics = {"cosine_error": jnp.sqrt(error), "ranking_divergence": ranking}
        return value, memory, metrics


def _products(array: jax.Array, mesh: Mesh) -> jax.Array:
    """[A, C, V, X] -> float32[B, M]: products of queries and targets."""
    queries, targets = sides_on(mesh, array)
    return jnp.einsum("bx,mx->bm", queries, targets, preferred_element_type=jnp.float32)
