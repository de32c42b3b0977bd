"""What a method adds to an encoder, and how a configuration names it."""

from typing import Any, Protocol, Self

import jax
from jax.sharding import Mesh

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.fields import load_named
from afmrl_jax.models import lora
from afmrl_jax.training.gradients import gradcache
from afmrl_jax.training.step import Batch, Gradient, Memory, Metrics, Params

METHODS = {"agcl": "afmrl_jax.losses.agcl:AGCL"}  # config.method -> module:Class


class Objective(Protocol):
    """A loss of a batch's embeddings, with parameters and a memory of its own.

    batch_arrays: the batch's arrays that it reads; all others are rows of the model.
    trainable: a regular expression searched in the paths of the model's parameters, as
    `backbone.layers.gate.kernel`: those where it is found are trained, "" all. The others are
    frozen. The objective's own parameters are always trained.
    """

    batch_arrays: tuple[str, ...]
    trainable: str

    @classmethod
    def of(cls, config: Any, statistics: CorpusStatistics, mesh: Mesh) -> Self:
        """The objective of a whole configuration. statistics: of the training attributes."""

    def params(self, width: int) -> Params:
        """Abstract parameters beside the encoder's, as {"head": ...}; {} without. They begin at
        zero. width: E, of an embedding."""

    def memory(self, width: int, batch: Batch) -> Memory:
        """What is carried from step to step and not trained, abstract; {} without. It begins at
        zero, lies whole on every device, and is saved. batch: abstract `batch_arrays`."""

    def __call__(
        self, trained: Params, memory: Memory, embeddings: jax.Array, batch: Batch
    ) -> tuple[jax.Array, Memory, Metrics]:
        """The loss, float32[], the next memory, and metrics.

        trained: the parameters that are trained. embeddings: float32[A, C, V, E], with A micro-
        batches, C examples of one and V views of an example. batch: `batch_arrays`, [A, C, V, ...].
        """


def find_objective(name: str) -> type[Objective]:
    """The class that `config.method` names. Raises UserError for an unknown one."""
    return load_named(name, METHODS, "method")


def objective_gradient(objective: Objective, embed: Any, heads: Params) -> Gradient:
    """The objective's gradient for `make_step`, by GradCache.

    embed: (model's parameters, rows) -> embeddings. heads: `objective.params`.
    """

    def gradient(trained: Params, frozen: Params, memory: Memory, batch: Batch):
        arrays = {name: batch[name] for name in objective.batch_arrays}
        rows = {name: x for name, x in batch.items() if name not in arrays}

        def loss(trained: Params, embeddings: jax.Array):
            value, following, metrics = objective(trained, memory, embeddings, arrays)
            return value, (following, metrics)

        def embedded(trained: Params, rows: Batch) -> jax.Array:
            return embed(lora.join(without_heads(trained, heads), frozen), rows)

        (value, (following, metrics)), gradients = gradcache(embedded, loss)(trained, rows)
        return (value, following, metrics), gradients

    return gradient


def without_heads(trained: Params, heads: Params) -> Params:
    """The model's part of the trained parameters."""
    return {name: part for name, part in trained.items() if name not in heads}
