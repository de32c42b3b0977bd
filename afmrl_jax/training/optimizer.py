"""AdamW, or Muon, with warm-up and cosine, the decay on matrices only."""

import math
import re
from dataclasses import dataclass

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from afmrl_jax.core.fields import check_range
from afmrl_jax.core.options import Options, among, between
from afmrl_jax.models.lora import ADAPTER


@dataclass(frozen=True)
class Optimizer(Options, section="optimizer"):
    """Which optimizer, and its schedule."""

    name: str = among("adamw", "muon")
    learning_rate: float = between(0, 1e38)  # what float32 holds
    warmup_share: float = between(0, 0.99)  # of the updates
    final_share: float = between(0, 1)  # of the learning rate, where the cosine ends
    weight_decay: float = between(0, 1000)  # matrices only
    b1: float = between(0, 0.999999)  # 1 would remember no gradient, and divide by 0
    b2: float = between(0, 0.999999)
    clip_norm: float = between(0, 1e38)  # of the gradient; 0: it is not clipped


def learning_rate(options: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to `final_share` of it at `steps`.

    The last step at the latest is warm: a share may round to all of a short run's steps.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=min(round(options.warmup_share * steps), steps - 1),
        decay_steps=steps,
        end_value=options.learning_rate * options.final_share,
    )


def is_matrix(params) -> object:
    """A tree of booleans: which leaves weight decay reaches (kernels, embeddings, adapters)."""
    names = ("kernel", "embedding", *ADAPTER)
    return jax.tree.map_with_path(lambda path, _: _name(path) in names, params)


def muon_dimensions(params) -> object:
    """A tree of the axes along which Muon orthogonalises a kernel; None for what AdamW updates.

    Those are heads, as their rows are tokens or labels and no directions of one space, and all that
    is no kernel. Other axes, of stacked layers and of query, key and value, hold matrices apart.
    """

    def dimensions(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        if _name(path) != "kernel" or re.search(r"\b(lm_)?head\.", where):
            return None
        return MuonDimensionNumbers(int(bool(re.search(r"\blayers\.", where))), leaf.ndim - 1)

    return jax.tree.map_with_path(dimensions, params)


def _name(path: tuple) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def make_optimizer(options: Optimizer, steps: int) -> optax.GradientTransformation:
    """optax.adamw or optax.contrib.muon after clipping by the global norm, if any; float32
    moments.

    Muon (https://kellerjordan.github.io/posts/muon) makes a matrix's momentum orthogonal, here
    scaled to AdamW's usual size of .2 a number (https://arxiv.org/abs/2502.16982), so that one
    learning rate and decay serve both; what it leaves is AdamW's, with Nesterov's momentum.
    Raises UserError where there are no steps.
    """
    check_range("steps", steps, 1, math.inf)
    rate, decay = learning_rate(options, steps), options.weight_decay
    if options.name == "adamw":
        update = optax.adamw(rate, b1=options.b1, b2=options.b2, weight_decay=decay, mask=is_matrix)
    else:
        direction = muon(
            1.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
            adam_b1=options.b1,
            adam_b2=options.b2,
        )  # its own decay would reach norms and biases
        decayed = optax.add_decayed_weights(-decay, mask=is_matrix)
        update = optax.chain(direction, decayed, optax.scale_by_schedule(rate))
    if not options.clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), update)
