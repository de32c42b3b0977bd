import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.training.cost import forward_flops, step_flops, work


def rows(tokens, images, length=8, patches=16):
    """One row with `tokens` real tokens and images of the given numbers of patches."""
    segments = np.zeros((1, patches), np.int32)
    segments[0, : sum(images)] = np.repeat(np.arange(len(images)) + 1, images)
    return {
        "token_mask": jnp.arange(length)[None] < tokens,
        "patch_segments": jnp.asarray(segments),
    }


def test_padding_is_not_work_and_patches_attend_within_their_image():
    amount = {k: float(v) for k, v in work(rows(5, [4, 8])).items()}
    assert amount == {"tokens": 5, "token_pairs": 15, "patches": 12, "patch_pairs": 16 + 64}


def test_a_step_is_three_forwards_and_four_under_gradcache():
    config, amount = preset("tiny"), work(rows(8, [16]))
    forward = forward_flops(config, amount)
    assert step_flops(config, amount, gradcache=False) == 3 * forward
    assert step_flops(config, amount, gradcache=True) == 4 * forward


def test_matrices_count_two_flops_a_parameter_and_token():
    """By the parameters of the real model: kernels, without the embedding table."""
    config = preset("tiny")
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Embedder(config, rngs=nnx.Rngs(0)))))[
        "backbone"
    ]

    def kernels(tree):
        leaves = jax.tree.leaves_with_path(tree)
        return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")

    merger = kernels(state["vision"]["merger"])
    tower = kernels(state["vision"]) - merger
    amount = {"tokens": 7.0, "patches": 8.0, "token_pairs": 0.0, "patch_pairs": 0.0}
    expected = 2 * (7 * kernels(state["layers"]) + 8 * tower + 8 / 4 * merger)
    assert forward_flops(config, amount) == expected
