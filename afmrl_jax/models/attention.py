"""The one attention of the tower and the decoder: grouped heads, any mask, softmax in float32.

Axes: N rows · S tokens or patches · H query heads · K key/value heads (H is n·K) · D head size.
"""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool
) -> jax.Array:
    """Scaled dot-product attention.

    query: [N, S, H, D]; key, value: [N, S, K, D]; mask: bool[N, S, S] or bool[N, 1, S], True where
    a query (rows) may see a key (columns). Returns [N, S, H, D]. A query that sees nothing
    (padding) gets an average of values: finite, and read by nobody.
    """
    # cuDNN's flash attention: half precision, and with a mask an even length.
    fused = (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] % 2 == 0
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 128
    )
    if mask.shape[1] == 1:
        mask = jnp.broadcast_to(mask, (mask.shape[0], query.shape[1], mask.shape[2]))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        is_causal=causal,
        implementation="cudnn" if fused else "xla",
    )
