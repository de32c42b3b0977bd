"""AdamW with warm-up and cosine, the decay on matrices only."""

import jax
import optax
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to `final_share` of it at `steps`.

    Raises UserError where the warm-up leaves no step to train.
    """
    if not 0 <= config.warmup_steps < max(steps, 1):
        raise UserError(
            f"optimizer.warmup_steps is {config.warmup_steps} of {steps} steps: make it smaller"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_share,
    )


def is_matrix(params) -> object:
    """A tree of booleans: which leaves weight decay reaches (kernels and embeddings)."""
    return jax.tree.map_with_path(
        lambda path, _: str(getattr(path[-1], "key", path[-1])) in ("kernel", "embedding"), params
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """optax.adamw after clipping by the global norm; float32 moments."""
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
