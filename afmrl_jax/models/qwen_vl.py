"""Qwen-VL: a vision tower whose features take the places of image tokens in a causal decoder.

One model for Qwen2-VL, Qwen2.5-VL and Qwen3-VL; the configuration holds their differences.

Only the architecture stands here: weights come from `weights.hf_weights`, shardings from
`partition`. Matrix products run in `dtype`; norms, rotations and softmax in float32.
Axes: N rows · S tokens · P patches · F numbers of a flattened patch · D width · H query heads
· K key/value heads · d head size · V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from afmrl_jax.models.attention import attend
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.layers import Linear, check_remat, make_norm, run_layers, stack_layers
from afmrl_jax.models.rope import rotary_angles, rotate, text_frequencies
from afmrl_jax.models.vision import VisionTower

# Query [N, S, H, d], key and value [N, S, K, d], all before rotation -> mixed [N, S, H, d], and an
# extra that is collected from each layer: None in training, key and value to fill a cache.
Mix: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads; `mix` decides which tokens attend to which."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        text, options = config.text, {"dtype": dtype, "param_dtype": param_dtype}
        options |= {"scale": config.initializer_range, "rngs": rngs}
        width, key_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        bias = text.attention_bias
        self.query = Linear(text.hidden_size, width, bias=bias, **options)
        self.key = Linear(text.hidden_size, key_width, bias=bias, **options)
        self.value = Linear(text.hidden_size, key_width, bias=bias, **options)
        self.out = Linear(width, text.hidden_size, bias=False, **options)
        if text.qk_norm:
            types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            self.query_norm = make_norm("rms", text.head_dim, text.norm_epsilon, **types)
            self.key_norm = make_norm("rms", text.head_dim, text.norm_epsilon, **types)
        self.head_dim, self.qk_norm = text.head_dim, text.qk_norm

    def __call__(self, x: jax.Array, mix: Mix) -> tuple[jax.Array, Any]:
        query, key, value = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed, extra = mix(query, key, value)
        return self.out(mixed.reshape(*x.shape[:2], -1)), extra


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU MLP."""

    def __init__(
        self, config: QwenVLConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        text = config.text
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        mlp = {"bias": False, "scale": config.initializer_range, **types}
        self.attention_norm = make_norm("rms", text.hidden_size, text.norm_epsilon, **types)
        self.attention = Attention(config, **types)
        self.mlp_norm = make_norm("rms", text.hidden_size, text.norm_epsilon, **types)
        self.gate = Linear(text.hidden_size, text.mlp_size, **mlp)
        self.up = Linear(text.hidden_size, text.mlp_size, **mlp)
        self.down = Linear(text.mlp_size, text.hidden_size, **mlp)

    def __call__(self, x: jax.Array, mix: Mix) -> tuple[jax.Array, Any]:
        """x: [N, S, D]. Returns the same shape, and the extra of `mix`."""
        mixed, extra = self.attention(self.attention_norm(x), mix)
        x = x + mixed
        hidden = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden)), extra


class QwenVL(nnx.Module):
    """The whole model; `head=False` leaves out the language head, which an embedder never uses."""

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        head: bool = True,
    ):
        check_remat(remat)
        types = {"dtype": dtype, "param_dtype": param_dtype}
        init = nnx.initializers.normal(config.initializer_range)
        text = config.text
        self.vision = VisionTower(config, rngs=rngs, remat=remat, **types)
        self.embed = nnx.Embed(
            config.vocab_size, text.hidden_size, embedding_init=init, rngs=rngs, **types
        )
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, rngs=rngs, **types), config.layer_groups, rngs
        )
        self.norm = make_norm("rms", text.hidden_size, text.norm_epsilon, rngs=rngs, **types)
        if head and not config.tie_embeddings:
            self.lm_head = Linear(
                text.hidden_size,
                config.vocab_size,
                bias=False,
                scale=config.initializer_range,
                rngs=rngs,
                **types,
            )
        self.config, self.remat, self.dtype = config, remat, dtype

    def __call__(self, rows: Mapping[str, jax.Array]) -> jax.Array:
        """Hidden states after the final norm.

        rows (the processor's): tokens int32[N, S], token_mask bool[N, S] (padded left or right),
        positions int32[N, 3, S], patches float[N, P, F], patch_positions int32[N, P, 2],
        patch_segments int32[N, P], and for Qwen3-VL patch_grids int32[N, P, 2]. Returns
        dtype[N, S, D]; at padding they are finite and mean nothing.
        """
        return self.read(rows, cache=False)[0]

    def read(
        self,
        rows: Mapping[str, jax.Array],
        cache: bool,
        embedded: tuple[jax.Array, jax.Array | None] | None = None,
    ) -> tuple[jax.Array, list]:
        """The hidden states, and with `cache` the keys and values for later tokens to attend to.

        The latter are a pair for each group of layers, rotated keys and values
        [layers, N, S, K, d]; None for each without `cache`.
        embedded: the result of `embed_rows`, where the caller has made another. Then only two of
        the rows' arrays are read: positions, and attention_mask bool[N, S, S], True where a token
        (rows) may see a token (columns) that is not behind it.
        """
        x, deepstack = self.embed_rows(rows) if embedded is None else embedded
        positions = jnp.swapaxes(rows["positions"], 1, 2)
        angles = rotary_angles(positions, *text_frequencies(self.config.text))
        packed = "attention_mask" in rows
        mask = rows["attention_mask"] if packed else rows["token_mask"][:, None, :]

        def mix(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
            cached = (rotate(key, angles), value) if cache else None
            return attend(query, key, value, angles, mask, causal=True), cached

        def call(layer: DecoderLayer, x: jax.Array, features: jax.Array | None):
            x, cached = layer(x, mix)
            return (x if features is None else x + features), cached

        caches = []
        for group in self.layers:
            x, cached = run_layers(group, x, call, self.remat, deepstack)
            caches.append(cached)
            deepstack = None  # only the first group's layers receive it
        return self.norm(x), caches

    def embed_rows(self, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """The decoder's input [N, S, D]: token embeddings, image features at the image tokens.

        Then the features to add after each of the first decoder layers, [layers, N, S, D], 0 at
        text tokens; None without DeepStack (https://arxiv.org/abs/2406.04334).
        """
        tokens = rows["tokens"]
        if not rows["patches"].shape[1]:  # rows without images need no tower
            return self.embed_tokens(tokens), None
        features, tapped = self.vision(rows)
        is_image = tokens == self.config.image_token_id
        nth = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)

        def place(features: jax.Array, elsewhere: jax.Array | float) -> jax.Array:
            placed = jnp.take_along_axis(features, nth[..., None], axis=1)
            return jnp.where(is_image[..., None], placed, elsewhere)

        deepstack = jnp.stack([place(tap, 0) for tap in tapped]) if tapped else None
        return place(features, self.embed_tokens(tokens)), deepstack

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding table, dtype[..., D]; image tokens have rows too."""
        # Only the rows looked up are cast: nnx.Embed's call would cast the whole table.
        return jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of each next token, float32[..., V], from hidden states [..., D]."""
        if self.config.tie_embeddings:
            table = self.embed.embedding[...].astype(self.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)
