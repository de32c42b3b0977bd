"""AdamW, or Muon, with warm-up and cosine, the decay on matrices only."""

import math
import re

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from afmrl_jax.core.fields import check_ranges
from afmrl_jax.models.lora import ADAPTER

RANGES = {  # field -> lowest and highest, or its words
    "steps": (1, math.inf),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.learning_rate": (0, 1e38),  # what float32 holds
    "optimizer.warmup_share": (0, 0.99),
    "optimizer.final_share": (0, 1),
    "optimizer.weight_decay": (0, 1000),
    "optimizer.b1": (0, 0.999999),  # 1 would remember no gradient, and divide by 0
    "optimizer.b2": (0, 0.999999),
    "optimizer.clip_norm": (1e-12, math.inf),
}


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to `final_share` of it at `steps`.

    The last step at the latest is warm: a share may round to all of a short run's steps.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(round(config.warmup_share * steps), steps - 1),
        decay_steps=steps,
        end_value=config.learning_rate * config.final_share,
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


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """optax.adamw or optax.contrib.muon after clipping by the global norm; float32 moments.

    Muon (https://kellerjordan.github.io/posts/muon) makes a matrix's momentum orthogonal, here
    scaled to AdamW's usual size of .2 a number (https://arxiv.org/abs/2502.16982), so that one
    learning rate and decay serve both; what it leaves is AdamW's, with Nesterov's momentum.
    Raises UserError for a number out of its range, or a name that does not exist.
    """
    fields = {f"optimizer.{field}": value for field, value in config.items()}
    check_ranges(fields | {"steps": steps}, RANGES)
    rate, decay = learning_rate(config, steps), config.weight_decay
    if config.name == "adamw":
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=is_matrix)
    else:
        direction = muon(
            1.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
            adam_b1=config.b1,
            adam_b2=config.b2,
        )  # its own decay would reach norms and biases
        decayed = optax.add_decayed_weights(-decay, mask=is_matrix)
        update = optax.chain(direction, decayed, optax.scale_by_schedule(rate))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
