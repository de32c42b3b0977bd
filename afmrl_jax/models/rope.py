"""Rotary position embeddings over several axes: of a token (time, height, width) or a patch.

Each rotary frequency follows one position axis. A static table assigns the axes, so that chunked
M-RoPE (Qwen2-VL, https://arxiv.org/abs/2409.12191), interleaved M-RoPE (Qwen3-VL,
https://arxiv.org/abs/2511.21631) and the towers' 2-D RoPE are one function.
Axes: N rows · S tokens or patches · X position axes · H query heads · d head size.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.models.config import TextConfig, VisionConfig

Angles: TypeAlias = tuple[jax.Array, jax.Array]  # cosine and sine, as `rotary_angles` makes them


def text_frequencies(config: TextConfig) -> tuple[np.ndarray, np.ndarray]:
    """M-RoPE's frequencies, and the axis that each follows: time, height or width.

    Chunked: the first frequencies follow time, the next height, the last width. Interleaved: they
    take turns until height and width have theirs; time gets the rest. Returns int32[d/2], the axis
    of each frequency, and float32[d/2], radians a position.
    """
    if config.mrope_interleaved:
        axes = np.zeros(config.head_dim // 2, np.int32)
        for axis in (1, 2):
            axes[axis : 3 * config.mrope_sections[axis] : 3] = axis
    else:
        axes = np.repeat(np.arange(3, dtype=np.int32), config.mrope_sections)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return axes, (1.0 / config.rope_theta**exponents).astype(np.float32)


def vision_frequencies(config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """2-D RoPE: half of the frequencies follow the patch's row, the same frequencies its column.

    Returns int32[d/2] and float32[d/2] as `text_frequencies`.
    """
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / half
    frequencies = (1.0 / config.rope_theta**exponents).astype(np.float32)
    return np.repeat(np.arange(2, dtype=np.int32), half // 2), np.tile(frequencies, 2)


def rotary_angles(positions: jax.Array, axes: np.ndarray, frequencies: np.ndarray) -> Angles:
    """Cosine and sine of each token's rotation.

    positions: int32[N, S, X]. Returns two float32[N, S, 1, d/2], broadcastable over heads.
    """
    angles = jnp.take(positions, axes, axis=-1).astype(jnp.float32) * frequencies
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Turns the pairs (x_i, x_{i + d/2}) by their angles, in float32.

    x: [N, S, H, d]. Returns x's shape and dtype.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
