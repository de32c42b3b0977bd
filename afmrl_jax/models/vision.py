"""Qwen2-VL's vision tower: patches of any number of images in, one feature a merged window out.

Axes: N rows · P patches (of all of a row's images, merge-window-major) · C numbers in a patch
· D width · H heads · M merged features, P / merge².
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.models.attention import attend
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.layers import Linear, run_layers, stack_layers
from afmrl_jax.models.rope import rotary_angles, rotate, vision_frequencies


class VisionAttention(nnx.Module):
    """Self-attention among the patches of one image."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        width, options = config.vision.hidden_size, {"dtype": dtype, "param_dtype": param_dtype}
        options |= {"scale": config.initializer_range, "rngs": rngs}
        # Query, key and value on an axis of their own: a sharded width never splits across them.
        self.qkv = Linear(width, 3, width, **options)
        self.out = Linear(width, width, **options)
        self.num_heads = config.vision.num_heads

    def __call__(self, x: jax.Array, angles, mask: jax.Array) -> jax.Array:
        query, key, value = (
            part.reshape(*x.shape[:2], self.num_heads, -1)
            for part in jnp.moveaxis(self.qkv(x), -2, 0)
        )
        mixed = attend(rotate(query, angles), rotate(key, angles), value, mask, causal=False)
        return self.out(mixed.reshape(x.shape))


class VisionLayer(nnx.Module):
    """Pre-norm attention and quick-GELU MLP."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        vision, scale = config.vision, config.initializer_range
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = {"epsilon": vision.norm_epsilon, "use_fast_variance": False, **types}
        self.attention_norm = nnx.LayerNorm(vision.hidden_size, **norm)
        self.attention = VisionAttention(config, **types)
        self.mlp_norm = nnx.LayerNorm(vision.hidden_size, **norm)
        self.up = Linear(vision.hidden_size, vision.mlp_size, scale=scale, **types)
        self.down = Linear(vision.mlp_size, vision.hidden_size, scale=scale, **types)

    def __call__(self, x: jax.Array, angles, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), angles, mask)
        hidden = self.up(self.mlp_norm(x))
        return x + self.down(hidden * jax.nn.sigmoid(1.702 * hidden))


class PatchMerger(nnx.Module):
    """Joins each window of merge x merge patches into one vector of the decoder's width."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        vision, scale = config.vision, config.initializer_range
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.window = vision.merge_size**2
        width = vision.hidden_size * self.window
        self.norm = nnx.LayerNorm(
            vision.hidden_size, epsilon=vision.norm_epsilon, use_fast_variance=False, **types
        )
        self.up = Linear(width, width, scale=scale, **types)
        self.down = Linear(width, config.text.hidden_size, scale=scale, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, patches, _ = x.shape
        windows = self.norm(x).reshape(rows, patches // self.window, -1)
        return self.down(jax.nn.gelu(self.up(windows), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer, merger."""

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        remat: str,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        # The 3-D convolution whose stride is its kernel is a product with the flattened patch.
        self.patch_embed = Linear(
            config.vision.patch_dim,
            config.vision.hidden_size,
            bias=False,
            scale=config.initializer_range,
            rngs=rngs,
            **types,
        )
        self.layers = stack_layers(
            lambda rngs: VisionLayer(config, rngs=rngs, **types), config.vision.layer_groups, rngs
        )
        self.merger = PatchMerger(config, rngs=rngs, **types)
        self.config = config.vision
        self.remat = remat

    def __call__(self, patches: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """One feature a merged window.

        patches: float[N, P, C]; positions: int32[N, P, 2], height and width; segments: int32[N, P],
        the image of each patch counted from 1, 0 for padding. Returns [N, M, text width]; features
        of padding are finite and mean nothing.
        """
        angles = rotary_angles(positions, *vision_frequencies(self.config))
        mask = segments[:, :, None] == segments[:, None, :]
        x = self.patch_embed(patches)
        for group in self.layers:
            x, _ = run_layers(
                group, x, lambda layer, x, _: (layer(x, angles, mask), None), self.remat
            )
        return self.merger(x)
