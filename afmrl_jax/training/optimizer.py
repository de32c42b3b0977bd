"""AdamW with warm-up and cosine, the decay on matrices only."""

import math

import jax
import optax
from ml_collections import ConfigDict

from afmrl_jax.core.fields import check_ranges
from afmrl_jax.models.lora import ADAPTER

RANGES = {  # field -> lowest and highest
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.warmup_share": (0, 0.99),
    "optimizer.final_share": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.clip_norm": (1e-12, math.inf),
}


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to `final_share` of it at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup_share * steps),
        decay_steps=steps,
        end_value=config.learning_rate * config.final_share,
    )


def is_matrix(params) -> object:
    """A tree of booleans: which leaves weight decay reaches (kernels, embeddings, adapters)."""
    names = ("kernel", "embedding", *ADAPTER)
    return jax.tree.map_with_path(lambda path, _: _name(path) in names, params)


def _name(path: tuple) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """optax.adamw after clipping by the global norm; float32 moments.

    Raises UserError for a number out of its range.
    """
    check_ranges({"steps": steps}, {"steps": (1, math.inf)})
    check_ranges({f"optimizer.{name}": value for name, value in config.items()}, RANGES)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )
