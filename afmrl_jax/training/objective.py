"""What a method adds to an encoder, and how a configuration names it."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import load_named
from afmrl_jax.core.options import Options
from afmrl_jax.models import lora
from afmrl_jax.training.gradients import gradcache
from afmrl_jax.training.step import Batch, Gradient, Memory, Metrics, Params

Parts = tuple[Params, Memory]
METHODS = {  # config.method -> module:Class
    "agcl": "afmrl_jax.losses.agcl:AGCL",
    "distill": "afmrl_jax.losses.distill:Distill",
}


class Objective(Protocol):
    """A loss of a batch's embeddings, with parameters and a memory of its own.

    batch_arrays: the batch's arrays that it reads; all others are rows of the model.
    trainable: a regular expression searched in the paths of the model's parameters, as
    `backbone.layers.gate.kernel`: those where it is found are trained, "" all. The others are
    frozen. The objective's own parameters are always trained.
    options: the settings that `of` reads; a page may hold their fields.
    """

    batch_arrays: tuple[str, ...]
    trainable: str
    options: tuple[type[Options], ...]

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
    """The class that `config.method` names. Raises UserError for an unknown one, and for what is no
    objective."""
    objective = load_named(name, METHODS, "method")
    parts = ("batch_arrays", "trainable", "options", "of", "params", "memory")
    if lacking := [part for part in parts if not hasattr(objective, part)]:
        raise UserError(
            f"method is {name!r}, which lacks {', '.join(lacking)}: see Objective in "
            "training/objective.py"
        )
    return objective


@dataclass(frozen=True)
class Method(Options, section=""):
    """Which objective is trained; its settings are read beside it."""

    method: str  # a name of METHODS, or module:Class

    def __post_init__(self) -> None:
        super().__post_init__()
        find_objective(self.method)

    def further(self) -> tuple[type[Options], ...]:
        return find_objective(self.method).options


def abstract_parts(objective: Objective, model: Params, batch: Batch, width: int) -> Parts:
    """The objective's parameters and memory, abstract.

    model: the model's trained parameters. batch: arrays [A, C, V, ...]. width: E. Raises UserError
    where they, the loss, the next memory or the metrics have another form than `Objective` says.
    """
    name = type(objective).__name__
    if missing := [array for array in objective.batch_arrays if array not in batch]:
        raise UserError(
            f"{name}.batch_arrays names {', '.join(missing)}: a batch has {', '.join(batch)}"
        )
    arrays = {array: batch[array] for array in objective.batch_arrays}
    params, memory = objective.params(width), objective.memory(width, arrays)
    for kind, parts in {"params": params, "memory": memory}.items():
        leaves = jax.tree.leaves(parts)
        if not isinstance(parts, dict) or any(not _is_abstract(leaf) for leaf in leaves):
            raise UserError(
                f"{name}.{kind} returns other values than jax.ShapeDtypeStruct in a dict: say the "
                "shapes alone, as all begins at zero; make another beginning a setting, and train "
                "the distance from it"
            )
    if flat := [key for key, part in params.items() if not isinstance(part, dict) or key in model]:
        raise UserError(
            f"{name}.params gives {flat[0]!r}: expected {{NAME: {{...}}}}, with a NAME that the "
            f"model lacks; it has {', '.join(model)}"
        )
    shape = (*next(iter(batch.values())).shape[:3], width)
    embeddings = jax.ShapeDtypeStruct(shape, jnp.float32)
    value, following, metrics = jax.eval_shape(
        objective, model | params, memory, embeddings, arrays
    )
    if value.shape:
        raise UserError(f"{name} returns a loss of shape {value.shape}: expected one number")
    if wide := [metric for metric, x in metrics.items() if x.shape]:
        raise UserError(f"{name} returns {wide[0]!r} with several numbers: a metric is one")
    if _shapes(following) != _shapes(memory):
        raise UserError(
            f"{name} returns a memory of {_shapes(following)}, but begins with {_shapes(memory)}"
        )
    return params, memory


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _shapes(arrays: Any) -> str:
    named = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", arrays)
    return str(dict(sorted(named.items()))) if isinstance(named, dict) else str(named)


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
