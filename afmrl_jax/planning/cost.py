"""The useful FLOPs of a training step.

Useful FLOPs = 6 x parameters x tokens, plus attention: a forward pass, and a backward pass of twice
its work, once for the inputs' gradient and once for the parameters'. Under LoRA a frozen matrix has
no parameters' gradient (4, its adapter 6), and layers before all adapters, usually the vision
tower, run forward only (2). GradCache adds 2 to each: its second forward pass is part of the
method. Padding and remat's recomputation do not count.

Axes: N rows · S tokens · P patches.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.lora import ADAPTER, BASE


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
    config: QwenVLConfig, params: Any, amount: dict[str, float], *, gradcache: bool
) -> float:
    """Useful FLOPs of one training step; a multiply-add counts 2.

    params: the model's, adapters included, arrays or abstract. amount: the rows' `work`, and for a
    generator `logits`, the positions at which it scores its vocabulary.
    """
    forward = 2 if gradcache else 1
    names = {  # sizes as floats: a stack of a 7B model has more than 2^31 numbers
        jax.tree_util.keystr(path, simple=True, separator="."): float(leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        # Tables are looked up, not multiplied; the head counts by `logits` below.
        if path[-1].key in ("kernel", *ADAPTER, *BASE) and path[0].key != "lm_head"
    }
    adapters = [name for name in names if name.endswith(ADAPTER)]
    # Whether a part computes its inputs' gradients: if a parameter in it or before it is trained.
    passed = {"vision": not adapters or any(map(_in_vision, adapters)), "text": True}

    total = 0.0
    for name, size in names.items():
        part = "vision" if _in_vision(name) else "text"
        trained = name.endswith(ADAPTER) or not adapters
        total += 2 * size * _uses(config, name, amount) * (forward + passed[part] + trained)
    scored = float(config.vocab_size) * config.text.hidden_size * amount.get("logits", 0.0)
    total += 2 * scored * (forward + 1 + (not adapters))
    heads = {"vision": config.vision.hidden_size, "text": config.text.num_heads}
    heads["text"] *= config.text.head_dim
    for part, pairs in (("vision", "patch_pairs"), ("text", "token_pairs")):
        total += 4 * heads[part] * amount[pairs] * (forward + 2 * passed[part])
    return total


def _in_vision(name: str) -> bool:
    return bool(re.search(r"\bvision\.", name))


def _uses(config: QwenVLConfig, name: str, amount: dict[str, float]) -> float:
    """The number of vectors that a matrix is multiplied with."""
    if not _in_vision(name):
        return amount["tokens"]
    merged = re.search(r"\b(merger|deepstack)\.", name)
    return amount["patches"] / config.vision.merge_size**2 if merged else amount["patches"]
