"""Random rows of the shape that the processor makes."""

import numpy as np
import pytest

from afmrl_jax.models.config import QwenVLConfig


def make_rows(config: QwenVLConfig, n: int, s: int, p: int, seed: int = 0, images: bool = True):
    """n rows of s tokens, the first p / merge² of them an image's; ragged, padded on the right."""
    random = np.random.default_rng(seed)
    window = config.vision.merge_size**2
    side = config.vision.merge_size
    tokens = random.integers(5, config.vocab_size, (n, s), dtype=np.int32)
    lengths = random.integers(s // 2 + p // window, s + 1, n)
    lengths[0] = s
    if images:
        tokens[:, 1 : 1 + p // window] = config.image_token_id
    cells = np.stack(np.unravel_index(np.arange(p // window), (1, p // window)), -1)
    inner = np.stack(np.unravel_index(np.arange(window), (side, side)), -1)
    grid = (cells[:, None] * side + inner[None]).reshape(p, 2)
    return {
        "tokens": tokens,
        "token_mask": np.arange(s)[None] < lengths[:, None],
        "positions": np.broadcast_to(np.arange(s, dtype=np.int32), (n, 3, s)).copy(),
        "patches": random.normal(size=(n, p, config.vision.patch_dim)).astype(np.float32),
        "patch_positions": np.broadcast_to(grid.astype(np.int32), (n, p, 2)).copy(),
        "patch_grids": np.full((n, p, 2), (side, p // side), np.int32),
        "patch_segments": np.full((n, p), int(images), np.int32),
    }


@pytest.fixture
def random_rows():
    return make_rows
