import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.lora import LoRA, adapt
from afmrl_jax.models.presets import preset
from afmrl_jax.planning.cost import step_flops, work

COMPILED_AS_FOR_USERS = True

TINY = preset("tiny")


def rows(tokens, images, length=8, columns=4):
    """One row with `tokens` real tokens and images of these numbers of rows of four patches."""
    lines = np.concatenate([np.arange(n) for n in images])
    segments = np.repeat(np.arange(len(images)) + 1, images)
    positions = np.stack(np.meshgrid(lines, np.arange(columns), indexing="ij"), -1)
    pad = ((0, 4), (0, 0))  # four patches of padding
    return {
        "token_mask": jnp.arange(length)[None] < tokens,
        "patch_positions": np.pad(positions.reshape(-1, 2), pad)[None],
        "patch_segments": np.pad(np.repeat(segments, columns), pad[0])[None],
    }


def params(config, lora=None):
    def make():
        rngs = nnx.Rngs(0)
        model = Embedder(config, rngs=rngs)
        if lora:
            adapt(model, lora, rngs)
        return nnx.to_pure_dict(nnx.state(model))

    return jax.eval_shape(make)


def sizes(tree):
    """Numbers in the matrices of each part."""
    found = dict.fromkeys(("decoder", "tower", "merged", "adapters"), 0)
    for path, leaf in jax.tree.leaves_with_path(tree["backbone"]):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "lora_" in name:
            found["adapters"] += leaf.size
        elif name.endswith("kernel"):
            merged = "merger" in name or "deepstack" in name
            part = "merged" if merged else "tower" if "vision" in name else "decoder"
            found[part] += leaf.size
    return found


def test_padding_is_not_work_and_patches_attend_within_their_image():
    amount = {k: float(v) for k, v in work(TINY, rows(5, [1, 2])).items()}
    layers = TINY.text.num_layers, TINY.vision.num_layers
    assert amount == {
        "tokens": 5,
        "token_pairs": layers[0] * 15,
        "patches": 12,
        "patch_pairs": layers[1] * (16 + 64),
    }


def test_windowed_layers_see_their_window_only():
    config = preset("tiny_qwen2_5")
    side, vision = config.vision.window_patches, config.vision
    full, lines = len(vision.full_attention_layers), side + 1
    assert 0 < full < vision.num_layers and side >= 4
    pairs = float(work(config, rows(5, [lines]))["patch_pairs"])
    windows = (4 * side) ** 2 + 4**2  # the image's first rows, and its last
    assert pairs == full * (4 * lines) ** 2 + (vision.num_layers - full) * windows


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen2_5", "tiny_qwen3"])
def test_a_step_costs_six_flops_a_parameter_and_token_and_eight_under_gradcache(name):
    """By the parameters of each real model: kernels, without the tables."""
    config = preset(name)
    tree = params(config)
    amount = {"tokens": 7.0, "patches": 8.0, "token_pairs": 0.0, "patch_pairs": 0.0}
    size = sizes(tree)
    uses = 7 * size["decoder"] + 8 * size["tower"] + 8 / 4 * size["merged"]
    assert step_flops(config, tree, amount, gradcache=False) == 6 * uses
    assert step_flops(config, tree, amount, gradcache=True) == 8 * uses


def test_attention_costs_twelve_flops_a_pair_and_dimension():
    amount = {"tokens": 0.0, "patches": 0.0, "token_pairs": 3.0, "patch_pairs": 5.0}
    heads = TINY.text.num_heads * TINY.text.head_dim
    wanted = 12 * (3 * heads + 5 * TINY.vision.hidden_size)
    assert step_flops(TINY, params(TINY), amount, gradcache=False) == wanted


@pytest.mark.parametrize("targets, tower", [(r"^layers\.", 2), (r"attention", 4)])
def test_frozen_matrices_cost_four_and_those_before_all_adapters_two(targets, tower):
    tree = params(TINY, LoRA(4, 8, targets))
    size = sizes(tree)
    amount = {"tokens": 7.0, "patches": 7.0, "token_pairs": 0.0, "patch_pairs": 0.0}
    matrices = tower * (size["tower"] + size["merged"] / 4) + 4 * size["decoder"]
    wanted = 7 * (matrices + 6 * size["adapters"])
    assert step_flops(TINY, tree, amount, gradcache=False) == wanted
    again = 2 * 7 * (size["tower"] + size["merged"] / 4 + size["decoder"] + size["adapters"])
    assert step_flops(TINY, tree, amount, gradcache=True) == wanted + again


@pytest.mark.parametrize(
    "trainable, tower, merged, decoder",
    [(r"^backbone\.layers\.", 2, 2, 6), (r"\bmerger\.", 2, 6, 4), (r"\bpatch_embed\.", 4, 4, 4)],
)
def test_what_the_objective_freezes_costs_four_and_what_lies_before_all_that_is_trained_two(
    trainable, tower, merged, decoder
):
    tree = params(TINY)
    size = sizes(tree)
    amount = {"tokens": 7.0, "patches": 8.0, "token_pairs": 0.0, "patch_pairs": 0.0}
    wanted = 7 * decoder * size["decoder"] + 8 * tower * size["tower"] + 2 * merged * size["merged"]
    if "patch_embed" in trainable:
        wanted += 8 * 2 * tree["backbone"]["vision"]["patch_embed"]["kernel"].size
    assert step_flops(TINY, tree, amount, gradcache=False, trainable=trainable) == wanted


def test_attention_before_all_that_is_trained_runs_forward_only():
    amount = {"tokens": 0.0, "patches": 0.0, "token_pairs": 3.0, "patch_pairs": 5.0}
    heads = TINY.text.num_heads * TINY.text.head_dim
    wanted = 12 * 3 * heads + 4 * 5 * TINY.vision.hidden_size
    flops = step_flops(TINY, params(TINY), amount, gradcache=False, trainable=r"\bmerger\.")
    assert flops == wanted
