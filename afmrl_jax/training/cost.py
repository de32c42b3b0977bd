"""What a step costs: useful FLOPs, and the chip's peak to hold them against.

Useful FLOPs = 6 x parameters x tokens, attention added; 8 under GradCache, whose second forward
pass is the method's own. Padding and what remat computes again do not count.

Axes: N rows · S tokens · P patches.
"""

import jax
import jax.numpy as jnp

from afmrl_jax.models.config import QwenVLConfig

# Dense bf16 FLOP/s of one chip, by the start of jax's device_kind; vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The chip's dense bf16 FLOP/s; None where it is not known (a CPU's is not)."""
    kinds = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[k] for k in kinds if device.device_kind.startswith(k)), None)


def work(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How much there is to compute, padding left out; float32[] each, summed over all leading axes.

    tokens, patches; token_pairs and patch_pairs: what attends to what (causal, within an image).
    """
    lengths = rows["token_mask"].sum(-1).astype(jnp.float32)
    segments = rows["patch_segments"]
    # A patch attends to all of its image, so the pairs are each image's size, squared.
    patch_pairs = (
        (segments[..., :, None] == segments[..., None, :]) & (segments[..., None] > 0)
    ).sum(dtype=jnp.float32)
    return {
        "tokens": lengths.sum(),
        "token_pairs": (lengths * (lengths + 1) / 2).sum(),
        "patches": (segments > 0).sum(dtype=jnp.float32),
        "patch_pairs": patch_pairs,
    }


def forward_flops(config: QwenVLConfig, amount: dict[str, float]) -> float:
    """FLOPs of embedding rows of which there is `amount` (as `work` counts it), multiply-adds as 2.

    The embedding table is looked up, not multiplied, and the language head is not used.
    """
    v, t = config.vision, config.text
    tower = v.num_layers * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.mlp_size)
    tower += v.patch_dim * v.hidden_size
    merged = v.hidden_size * v.merge_size**2
    merger = (merged**2 + merged * t.hidden_size) / v.merge_size**2  # a patch's share
    heads = t.num_heads * t.head_dim
    layer = 2 * t.hidden_size * (heads + t.num_kv_heads * t.head_dim)
    layer += 3 * t.hidden_size * t.mlp_size
    matrices = amount["patches"] * (tower + merger) + amount["tokens"] * t.num_layers * layer
    attention = amount["patch_pairs"] * v.num_layers * v.hidden_size
    attention += amount["token_pairs"] * t.num_layers * heads
    return 2 * matrices + 4 * attention


def step_flops(config: QwenVLConfig, amount: dict[str, float], *, gradcache: bool) -> float:
    """Useful FLOPs of one training step: 3 forwards' worth, 4 under GradCache."""
    return (4 if gradcache else 3) * forward_flops(config, amount)
