"""The useful FLOPs of a training step.

Useful FLOPs = 6 x parameters x tokens, plus attention: a forward pass, and a backward pass of twice
its work, once for the inputs' gradient and once for the parameters'. A frozen matrix has no
parameters' gradient (4; under LoRA its adapter 6), and stages before all that is trained, often the
vision tower, run forward only (2). GradCache adds 2 to each: its second forward pass is part of the
method. Padding and remat's recomputation do not count.

Axes: N rows · S tokens · P patches.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.models import lora
from afmrl_jax.models.config import QwenVLConfig

TOWER, MERGER, DECODER = range(3)  # the stages of a model, in the order in which a row passes them


def work(config: QwenVLConfig, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Amounts of work without padding, float32[] each, summed over all leading axes.

    rows: the processor's arrays. Returns tokens and patches; and token_pairs and patch_pairs, the
    pairs that attend (causally; within an image or its windows), summed over the layers.
    """
    v = config.vision
    lengths = rows["token_mask"].sum(-1).astype(jnp.float32)
    image = rows["patch_segments"][..., None]
    # A patch attends to all of its image, so the pairs are each image's size, squared.
    attends = (image == jnp.swapaxes(image, -1, -2)) & (image > 0)
    patch_pairs = v.num_layers * attends.sum(dtype=jnp.float32)
    if v.window_patches:
        full = len(v.full_attention_layers)
        window = rows["patch_positions"] // v.window_patches
        attends &= (window[..., :, None, :] == window[..., None, :, :]).all(-1)
        windowed = (v.num_layers - full) * attends.sum(dtype=jnp.float32)
        patch_pairs = patch_pairs * full / v.num_layers + windowed
    return {
        "tokens": lengths.sum(),
        "token_pairs": config.text.num_layers * (lengths * (lengths + 1) / 2).sum(),
        "patches": (image > 0).sum(dtype=jnp.float32),
        "patch_pairs": patch_pairs,
    }


def most_work(config: QwenVLConfig, rows: int, tokens: int, patches: int) -> dict[str, float]:
    """`work` of full rows: one square image each, and no padding."""
    side = math.isqrt(patches)
    places = np.stack(np.divmod(np.arange(patches), max(side, 1)), -1)
    row = {
        "token_mask": np.ones((1, tokens), bool),
        "patch_segments": np.ones((1, patches), np.int32),
        "patch_positions": places[None],
    }
    return {name: rows * float(value) for name, value in work(config, row).items()}


def step_flops(
    config: QwenVLConfig,
    params: Any,
    amount: dict[str, float],
    *,
    gradcache: bool,
    trainable: str = "",
) -> float:
    """Useful FLOPs of one training step; a multiply-add counts 2.

    The sum over the matrices of 2 x size x vectors x (forward + inputs + weights):
    forward: 1, under GradCache 2.
    inputs: 1 where something of the matrix's stage or of one before it is trained, else 0.
    weights: 1 where the matrix is trained, else 0.
    Attention's two products, whose operands are both activations, count forward + 2 x inputs.

    params: the model's, adapters included, arrays or abstract. amount: the rows' `work`, and for a
    generator `logits`, the positions at which it scores its vocabulary. trainable: the pattern of
    what is trained, as `lora.split` takes it.
    """
    forward = 2 if gradcache else 1
    sizes, trained = _sizes(params), _sizes(lora.split(params, trainable)[0]).keys()
    lowest = min(map(_stage, trained))

    total = 0.0
    for name, size in sizes.items():
        # Tables are looked up, not multiplied; the head counts by `logits` below.
        if name.endswith(("kernel", *lora.ADAPTER, *lora.BASE)) and not name.startswith("lm_head."):
            products = forward + (_stage(name) >= lowest) + (name in trained)
            total += 2 * size * _uses(config, name, amount) * products
    head = "lm_head.kernel" if "lm_head.kernel" in sizes else "embed.embedding"
    scored = float(config.vocab_size) * config.text.hidden_size * amount.get("logits", 0.0)
    total += 2 * scored * (forward + 1 + (head in trained))
    width = config.text.num_heads * config.text.head_dim
    total += 4 * width * amount["token_pairs"] * (forward + 2)
    passed = lowest <= TOWER
    return total + 4 * config.vision.hidden_size * amount["patch_pairs"] * (forward + 2 * passed)


def _sizes(params: Any) -> dict[str, float]:
    """The size of each parameter by its path, as floats: a stack of a 7B model has more than 2^31
    numbers."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): float(leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _stage(name: str) -> int:
    if not re.search(r"\bvision\.", name):
        return DECODER
    return MERGER if re.search(r"\b(merger|deepstack)\.", name) else TOWER


def _uses(config: QwenVLConfig, name: str, amount: dict[str, float]) -> float:
    """The number of vectors that a matrix is multiplied with."""
    if _stage(name) == DECODER:
        return amount["tokens"]
    merged = config.vision.merge_size**2 if _stage(name) == MERGER else 1
    return amount["patches"] / merged
