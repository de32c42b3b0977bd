"""AGCL as a training objective: the contrastive loss of pairs, a label head beside it, and a memory
of past batches' targets as further negatives (cross-batch memory, Wang et al. 2020, arXiv
1912.06798).

Axes: A micro-batches · C pairs of one micro-batch · V views of a pair (query, target, hard
negatives) · B = A C pairs · M = B (V - 1) targets · P slots of the memory · E embedding · T term
slots.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.mesh import batch_sharding, replicated
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.types import Metrics, Params
from afmrl_jax.losses.contrastive import Contrastive, contrastive_loss
from afmrl_jax.losses.labels import LabelHead, Labels, frequent_labels, label_loss

log = logging.getLogger(__name__)

HEAD = "head"  # the name of the label head's parameters
Arrays = Mapping[str, jax.Array]
AbstractArrays = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class PastBatches(Options, section="loss"):
    """Negatives from past batches."""

    memory_batches: int = between(0)  # past batches whose targets are kept; 0: none


@dataclass(frozen=True)
class AGCL:
    """The objective (`training.objective.Objective`) of configs/agcl.py.

    labels: the head's; None without a head. memory_batches: how many past batches give their
    targets as further negatives. These embeddings are of the encoder as it was then, and have no
    gradient; their products and attributes weight and mask them like other negatives. They are
    candidates of queries only: the direction from targets to queries (`symmetric`) has none.
    """

    contrastive: Contrastive
    labels: Labels | None
    head_weight: float
    memory_batches: int
    mesh: Mesh

    batch_arrays = ("product", "true_product", "terms", "query_weights", "document_weights")
    trainable = ""
    options = (Contrastive, LabelHead, PastBatches)

    @classmethod
    def of(cls, config: Any, statistics: CorpusStatistics | None, mesh: Mesh) -> Self:
        """The objective of a whole configuration.

        statistics: of the training listings' attributes; they give the head's labels. None where
        there is no head.
        """
        head, labels = LabelHead.of(config), None
        if head.head_weight:
            labels = frequent_labels(statistics, head.head_labels)
            log.info("the head tells %d values of %d attributes", len(labels.terms), labels.n_names)
        past = PastBatches.of(config).memory_batches
        return cls(Contrastive.of(config), labels, head.head_weight, past, mesh)

    def params(self, width: int) -> dict[str, AbstractArrays]:
        """The label head's parameters; {} without one."""
        return {HEAD: self.labels.abstract_head(width)} if self.labels else {}

    def memory(self, width: int, batch: AbstractArrays) -> AbstractArrays:
        """The slots for past targets, the newest first; {} without a memory.

        width: E. batch: `batch_arrays`, [A, C, V, ...].
        embedding float32[P, E]; product and true_product int32[P], terms int32[P, T],
        query_weights and document_weights float32[P, T] of their listings; filled bool[P].
        """
        if not self.memory_batches:
            return {}
        micro_batches, pairs, views = batch["product"].shape
        slots = self.memory_batches * micro_batches * pairs * (views - 1)
        arrays = {
            name: jax.ShapeDtypeStruct((slots, *batch[name].shape[3:]), batch[name].dtype)
            for name in self.batch_arrays
        }
        embedding = jax.ShapeDtypeStruct((slots, width), jnp.float32)
        filled = jax.ShapeDtypeStruct((slots,), jnp.bool)
        return arrays | {"embedding": embedding, "filled": filled}

    def __call__(
        self, trained: Params, memory: Arrays, embeddings: jax.Array, batch: Arrays
    ) -> tuple[jax.Array, Arrays, Metrics]:
        """The mean loss, the next memory, and metrics. The loss is of each device's queries against
        all targets, and of the head for every view.

        trained: the parameters; only the head's are read. embeddings: float32[A, C, V, E].
        batch: `batch_arrays`, [A, C, V, ...].
        """
        info, targets = {}, {}
        arrays = {"embedding": embeddings, **{name: batch[name] for name in self.batch_arrays}}
        for name, array in arrays.items():
            query, target = sides_on(self.mesh, array)
            info[f"query_{name}"], info[f"target_{name}"], targets[name] = query, target, target
        queries = info.pop("query_embedding")
        total, count, metrics = contrastive_loss(
            queries, info.pop("target_embedding"), info, self.contrastive, memory
        )
        value = total / count
        if self.labels:
            total, count, head_metrics = label_loss(
                trained[HEAD], embeddings, batch["terms"], self.labels
            )
            value += self.head_weight * total / jnp.maximum(count, 1)
            metrics |= head_metrics
        return value, self._remembered(memory, targets), metrics

    def _remembered(self, memory: Arrays, targets: Arrays) -> Arrays:
        """The memory with a batch's targets first; the oldest targets leave it."""
        if not memory:
            return {}
        filled = jnp.ones(len(targets["product"]), bool)
        newest = jax.lax.stop_gradient({**targets, "filled": filled})
        return {
            name: jnp.concatenate([newest[name], past])[: len(past)]
            for name, past in memory.items()
        }


def sides_on(mesh: Mesh, array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sides`: each device has its share of the queries, and all targets."""
    queries, targets = sides(array)
    queries = jax.lax.with_sharding_constraint(queries, batch_sharding(mesh))
    return queries, jax.lax.with_sharding_constraint(targets, replicated(mesh))


def sides(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[A, C, V, ...] -> queries [B, ...], targets [M, ...], the positives first.

    The mesh splits C, so C becomes the major part of B: nothing moves between devices.
    """
    array = jnp.swapaxes(array, 0, 1)
    parts = [array[:, :, view].reshape(-1, *array.shape[3:]) for view in range(array.shape[2])]
    return parts[0], jnp.concatenate(parts[1:])
