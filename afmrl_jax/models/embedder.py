"""A product's vector: the last token's hidden state of a Qwen-VL model, normalised to length one.

Pooling as VLM2Vec (https://arxiv.org/abs/2410.05160).
Axes: N rows · S tokens · D width · E embedding, D unless truncated.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.qwen_vl import QwenVL


class Embedder(nnx.Module):
    """A Qwen-VL model without its language head, pooled.

    embedding_dim: how many of the pooled state's first numbers to keep; None keeps them all.
    Raises UserError where it exceeds the model's width.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        embedding_dim: int | None = None,
    ):
        width = config.text.hidden_size
        if embedding_dim is not None and not 1 <= embedding_dim <= width:
            raise UserError(
                f"embedding_dim {embedding_dim} does not fit the model: its hidden states have "
                f"{width} numbers; set it between 1 and {width}"
            )
        self.backbone = QwenVL(
            config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat, head=False
        )
        self.embedding_dim = embedding_dim or width

    def __call__(self, rows: Mapping[str, jax.Array]) -> jax.Array:
        """rows as QwenVL's. Returns float32[N, E], L2-normalised."""
        hidden = self.backbone(rows)
        pooled = pool_last(hidden, rows["token_mask"])[:, : self.embedding_dim]
        return normalize(pooled)


def pool_last(hidden: jax.Array, token_mask: jax.Array) -> jax.Array:
    """Each row's state at its last real token, whichever side is padded.

    hidden: [N, S, D]; token_mask: bool[N, S]. Returns [N, D].
    """
    last = token_mask.shape[1] - 1 - jnp.argmax(token_mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def normalize(x: jax.Array) -> jax.Array:
    """x / |x| in float32 along the last axis; zero stays zero, with a zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
