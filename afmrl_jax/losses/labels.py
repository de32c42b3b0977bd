"""The attribute-label head: a linear layer that predicts attributes from an embedding; a baseline.

Labels are the most frequent "name=value" pairs of the training catalogue. The labels of a name
share a softmax. A listing's loss is the mean, over its attributes that are labels, of
    log(sum over the labels k of its name of e^(z_k)) - z_label,    z = sqrt(E) e W + b.
The squares of an embedding's numbers add up to 1; the factor gives them the variance that a linear
layer expects. The head begins at zero: all values of a name are equally likely.

Axes: ... leading axes of listings · E embedding · L labels · G names · T term slots.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.options import Options, between
from afmrl_jax.core.types import Metrics


@dataclass(frozen=True)
class LabelHead(Options, section="loss"):
    """A label head beside the encoder, and the weight of its loss."""

    head_weight: float = between(0, 1000)  # weight of its loss, in nats an attribute; 0: no head
    head_labels: int = between(1)  # labels at most, the most frequent pairs


@dataclass(frozen=True)
class Labels:
    """The labels of a head. They are terms of BM25's statistics, as a batch holds them."""

    terms: np.ndarray  # int32[L], ascending: the labels' ids among the statistics' terms
    names: np.ndarray  # int32[L], ascending from 0: the number of each label's name

    @property
    def n_names(self) -> int:
        return int(self.names[-1]) + 1

    def abstract_head(self, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters of a head for embeddings of `width` numbers."""
        shapes = {"kernel": (width, len(self.terms)), "bias": (len(self.terms),)}
        return {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}


def frequent_labels(statistics: CorpusStatistics, most: int) -> Labels:
    """The `most` most frequent pairs, less those of names that have only one value among them.

    Raises UserError where no name has two values.
    """
    frequencies = statistics.document_frequencies
    # Terms that hold a "=" are pairs; the others are words of values.
    pairs = [(term_id, term) for term_id, term in enumerate(frequencies) if "=" in term]
    kept = sorted(pairs, key=lambda pair: (-frequencies[pair[1]], pair[0]))[:most]
    values = Counter(_name(term) for _, term in kept)
    # The statistics' terms are in alphabetical order, so those of a name are neighbours.
    kept = sorted((term_id, _name(term)) for term_id, term in kept if values[_name(term)] > 1)
    if not kept:
        raise UserError(
            f"none of the {most} most frequent attributes of the training listings has two values "
            "to tell apart: raise loss.head_labels, name attributes with data.attributes, or set "
            "loss.head_weight to 0"
        )
    terms, names = zip(*kept)
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return Labels(np.array(terms, np.int32), np.array([places[n] for n in names], np.int32))


def _name(term: str) -> str:
    return term.partition("=")[0]


def label_loss(
    head: Mapping[str, jax.Array], embeddings: jax.Array, terms: jax.Array, labels: Labels
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The sum of the listings' losses, in nats, and the number of listings that have labels.

    head: kernel float[E, L], bias float[L]. embeddings: float[..., E]. terms: int32[..., T], as
    `CorpusStatistics.encode` gives them. Terms that are no labels, and listings without labels, do
    not count.
    Returns (sum, count, metrics), all scalars: head_loss, the mean; head_accuracy, the mean share
    of a listing's labels whose logit is above all others of their name.
    """
    scaled = math.sqrt(embeddings.shape[-1]) * embeddings
    logits = jnp.matmul(scaled, head["kernel"], precision=lax.Precision.HIGHEST) + head["bias"]
    place = jnp.minimum(jnp.searchsorted(labels.terms, terms), len(labels.terms) - 1)  # [..., T]
    labelled = jnp.asarray(labels.terms)[place] == terms
    name = jnp.asarray(labels.names)[place]

    def over_names(reduce: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
        """[..., L] -> [..., G]. The axes of listings stay apart, because one of them is sharded."""
        rows = jnp.moveaxis(values, -1, 0)
        rows = reduce(rows, labels.names, labels.n_names, indices_are_sorted=True)
        return jnp.moveaxis(rows, 0, -1)

    def of_terms(values: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, places, axis=-1)

    best = over_names(jax.ops.segment_max, lax.stop_gradient(logits))
    above = logits - best[..., labels.names]
    normaliser = jnp.log(over_names(jax.ops.segment_sum, jnp.exp(above)))
    label_logits = of_terms(above, place)
    losses = of_terms(normaliser, name) - label_logits
    # A tie is no answer: a head that gives all values one logit scores 0, not 1.
    ties = of_terms(over_names(jax.ops.segment_sum, jnp.float32(above == 0)), name)
    right = (label_logits == 0) & (ties == 1)

    label_counts = jnp.sum(labelled, axis=-1)

    def total(values: jax.Array) -> jax.Array:
        means = jnp.sum(jnp.where(labelled, values, 0), axis=-1) / jnp.maximum(label_counts, 1)
        return jnp.sum(means)

    loss, count = total(losses), jnp.sum(label_counts > 0, dtype=logits.dtype)
    at_least_one = jnp.maximum(count, 1)
    metrics = {"head_loss": loss / at_least_one, "head_accuracy": total(right) / at_least_one}
    return loss, count, metrics
