"""The vision tower: patches of any number of images in, one feature a merge window out.

Patches lie merge window by merge window in every family. Qwen2.5-VL's attention windows are a mask
over that order, so nothing is sorted on the way in or out.
Axes: N rows · P patches (of all of a row's images, merge-window-major) · F numbers of a flattened
patch · D width of the tower · M merged features, P / merge².
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.models.attention import attend
from afmrl_jax.models.config import QwenVLConfig, VisionConfig
from afmrl_jax.models.layers import ACTIVATIONS, Linear, make_norm, run_layers, stack_layers
from afmrl_jax.models.rope import Angles, rotary_angles, vision_frequencies


class VisionAttention(nnx.Module):
    """Self-attention among the patches of one image or window."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        width, options = config.vision.hidden_size, {"dtype": dtype, "param_dtype": param_dtype}
        options |= {"scale": config.initializer_range, "rngs": rngs}
        # Query, key and value lie on a separate axis: a sharded width never splits across them.
        self.qkv = Linear(width, 3, width, **options)
        self.out = Linear(width, width, **options)
        self.num_heads = config.vision.num_heads

    def __call__(self, x: jax.Array, angles: Angles, mask: jax.Array) -> jax.Array:
        query, key, value = (
            part.reshape(*x.shape[:2], self.num_heads, -1) for part in self.qkv.parts(x)
        )
        mixed = attend(query, key, value, angles, mask, causal=False)
        return self.out(mixed.reshape(x.shape))


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP, gated or not."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        vision, scale = config.vision, config.initializer_range
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = vision.hidden_size
        self.attention_norm = make_norm(vision.norm, width, vision.norm_epsilon, **types)
        self.attention = VisionAttention(config, **types)
        self.mlp_norm = make_norm(vision.norm, width, vision.norm_epsilon, **types)
        if vision.gated:
            self.gate = Linear(width, vision.mlp_size, scale=scale, **types)
        self.up = Linear(width, vision.mlp_size, scale=scale, **types)
        self.down = Linear(vision.mlp_size, width, scale=scale, **types)
        self.gated, self.activation = vision.gated, vision.activation

    def __call__(self, x: jax.Array, angles: Angles, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), angles, mask)
        hidden, activation = self.mlp_norm(x), ACTIVATIONS[self.activation]
        if self.gated:
            return x + self.down(activation(self.gate(hidden)) * self.up(hidden))
        return x + self.down(activation(self.up(hidden)))


class PatchMerger(nnx.Module):
    """Joins each window of merge x merge patches into one vector of the decoder's width.

    norm_merged: whether to normalise the joined vector, as DeepStack's mergers do, or each patch.
    """

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        norm_merged: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        vision, scale = config.vision, config.initializer_range
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.window = vision.merge_size**2
        width = vision.hidden_size * self.window
        normed = width if norm_merged else vision.hidden_size
        self.norm = make_norm(vision.norm, normed, vision.norm_epsilon, **types)
        self.norm_merged = norm_merged
        self.up = Linear(width, width, scale=scale, **types)
        self.down = Linear(width, config.text.hidden_size, scale=scale, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, patches, width = x.shape
        merged = rows, patches // self.window, width * self.window
        windows = self.norm(x.reshape(merged)) if self.norm_merged else self.norm(x).reshape(merged)
        return self.down(jax.nn.gelu(self.up(windows), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer, merger; for DeepStack also mergers of some layers' outputs."""

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
            bias=config.vision.patch_bias,
            scale=config.initializer_range,
            rngs=rngs,
            **types,
        )
        if config.vision.num_positions:
            self.position_embed = nnx.Embed(
                config.vision.num_positions,
                config.vision.hidden_size,
                embedding_init=nnx.initializers.normal(config.initializer_range),
                rngs=rngs,
                **types,
            )
        self.layers = stack_layers(
            lambda rngs: VisionLayer(config, rngs=rngs, **types), config.vision.layer_groups, rngs
        )
        self.merger = PatchMerger(config, rngs=rngs, **types)
        if taps := config.vision.deepstack_layers:
            self.deepstack = nnx.List(
                [PatchMerger(config, norm_merged=True, rngs=rngs, **types) for _ in taps]
            )
        self.config = config.vision
        self.remat = remat

    def __call__(self, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        """One feature a merge window.

        rows: patches float[N, P, F]; patch_positions int32[N, P, 2], row and column; patch_segments
        int32[N, P], the image of each patch counted from 1, 0 for padding; patch_grids
        int32[N, P, 2], the image's rows and columns, read where positions are learned. Returns
        [N, M, text width], and for each DeepStack layer another such array; features of padding are
        finite and mean nothing.
        """
        config, positions = self.config, rows["patch_positions"]
        x = self.embed_patches(rows)
        angles = rotary_angles(positions, *vision_frequencies(config))
        image, window = attention_masks(config, positions, rows["patch_segments"])

        def call(layer: VisionLayer, x: jax.Array, full: jax.Array | None):
            mask = image if full is None else jnp.where(full, image, window)
            return layer(x, angles, mask), None

        tapped, start = [], 0
        for group, count in zip(self.layers, config.layer_groups):
            numbers = range(start, start + count)
            full = jnp.array([number in config.full_attention_layers for number in numbers])
            x, _ = run_layers(group, x, call, self.remat, full if config.window_size else None)
            start += count
            if len(tapped) < len(config.deepstack_layers):
                tapped.append(self.deepstack[len(tapped)](x))
        return self.merger(x), tapped

    def embed_patches(self, rows: Mapping[str, jax.Array]) -> jax.Array:
        """The first layer's input, [N, P, D]."""
        x = self.patch_embed(rows["patches"])
        if self.config.num_positions:
            table = self.position_embed.embedding[...]
            learned = resample(table, rows["patch_positions"], rows["patch_grids"])
            x = x + learned.astype(x.dtype)
        return x


def attention_masks(
    config: VisionConfig, positions: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Which patches each patch may attend to: those of its image, and those of its window of the
    image (None in a tower without windows).

    positions: int32[N, P, 2]; segments: int32[N, P]. Returns bool[N, P, P] twice.
    """
    image = segments[:, :, None] == segments[:, None, :]
    if not config.window_size:
        return image, None
    windows = positions // config.window_patches
    return image, image & (windows[:, :, None] == windows[:, None, :]).all(-1)


def resample(table: jax.Array, positions: jax.Array, grids: jax.Array) -> jax.Array:
    """Learned positions of a square grid, stretched over each image (bilinear, corners aligned).

    table: [side², D], row by row; positions: int32[N, P, 2], row and column; grids: int32[N, P, 2],
    the image's rows and columns. Returns float32[N, P, D].
    """
    side = math.isqrt(table.shape[0])
    coordinates = positions * jnp.float32(side - 1) / jnp.maximum(grids - 1, 1)
    low = jnp.floor(coordinates).astype(jnp.int32)
    share = coordinates - low
    (top, left), (down, right) = (jnp.moveaxis(part, -1, 0) for part in (1 - share, share))

    def at(rows: int, columns: int) -> jax.Array:
        corner = jnp.minimum(low + jnp.array([rows, columns]), side - 1)
        return table[corner[..., 0] * side + corner[..., 1]].astype(jnp.float32)

    return (
        at(0, 0) * (top * left)[..., None]
        + at(0, 1) * (top * right)[..., None]
        + at(1, 0) * (down * left)[..., None]
        + at(1, 1) * (down * right)[..., None]
    )
