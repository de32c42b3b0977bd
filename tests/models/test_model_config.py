"""Configurations: presets have the published sizes, and what cannot be computed is refused."""

import json
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import from_hf
from afmrl_jax.models.presets import PRESETS, preset
from afmrl_jax.models.qwen_vl import QwenVL

QWEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "qwen"


def count_parameters(name: str) -> int:
    model = nnx.eval_shape(lambda: QwenVL(preset(name), rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("name", "count"),
    # Half the bytes of the published bfloat16 checkpoints.
    [
        ("qwen2_vl_2b", 4_417_971_200 // 2),
        ("qwen2_vl_7b", 16_582_751_232 // 2),
        ("qwen2_5_vl_7b", 16_584_333_312 // 2),
    ],
)
def test_presets_have_as_many_parameters_as_the_published_checkpoints(name, count):
    assert count_parameters(name) == count


@pytest.mark.parametrize(
    ("name", "folder", "head"),
    [
        ("qwen2_vl_7b", "qwen2_vl_7b", True),
        ("qwen2_5_vl_7b", "qwen2_5_vl_7b", True),
        ("qwen3_vl_8b", "qwen3_vl_embedding_8b", False),  # published as an embedder
    ],
)
def test_presets_are_the_published_configs_and_indices(name, folder, head):
    if not QWEN.exists():
        pytest.skip("the published configs are not beside this checkout")
    config = from_hf(json.loads((QWEN / folder / "config.json").read_text()))
    assert config == preset(name)
    index = json.loads((QWEN / folder / "model.safetensors.index.json").read_text())
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), head=head))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == index["metadata"]["total_size"] // 2


def test_layers_are_cut_where_deepstack_taps_and_feeds_them():
    config = preset("qwen3_vl_8b")
    assert config.vision.layer_groups == (9, 8, 8, 2)
    assert config.layer_groups == (3, 33)
    assert preset("qwen2_5_vl_3b").vision.layer_groups == (32,)
    assert preset("qwen2_5_vl_3b").layer_groups == (36,)
    assert preset("qwen2_5_vl_3b").vision.window_patches == 8


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_the_hugging_face_form(name):
    assert from_hf(json.loads(json.dumps(preset(name).to_hf()))) == preset(name)


def test_the_newer_nested_layout_reads_as_the_flat_one():
    flat = preset("qwen2_vl_2b").to_hf()
    moved = {
        key: flat.pop(key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "eos_token_id",
            "rms_norm_eps",
        )
    }
    rope = {
        **flat.pop("rope_scaling"),
        "rope_type": "default",
        "rope_theta": flat.pop("rope_theta"),
    }
    nested = {**flat, "text_config": {**moved, "rope_parameters": rope}}
    assert from_hf(nested) == preset("qwen2_vl_2b")
    stray = {**nested, "hidden_size": moved.pop("hidden_size")}
    with pytest.raises(UserError, match="hidden_size stands beside text_config"):
        from_hf({**stray, "text_config": {**moved, "rope_parameters": rope}})
    with pytest.raises(UserError, match="rope_theta stands beside text_config"):
        from_hf({**nested, "rope_theta": 1e4, "text_config": {**moved, "hidden_size": 1536}})


def test_a_flat_config_of_sizes_alone_is_read_whole():
    """All that transformers 4.45 wrote of Qwen2-VL-2B's tower was the decoder's width."""
    config = preset("qwen2_vl_2b").to_hf()
    config["vision_config"] = {"hidden_size": 1536, "in_chans": 3}
    config["rope_scaling"] = {"type": "mrope"}
    for name in ("image_token_id", "vision_start_token_id", "rope_theta", "hidden_act"):
        del config[name]
    assert from_hf(config) == preset("qwen2_vl_2b")
    del config["rms_norm_eps"]
    assert from_hf(config).text.norm_epsilon == 1e-5  # transformers' value, not the published


def test_a_mistyped_preset_is_told_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'qwen2_vl_2b'"):
        preset("qwen2_vl_2B")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; expected a whole"),
        ({"num_key_value_heads": 5}, "cannot share 5"),
        ({"hidden_size": "1536"}, "hidden_size is '1536'; expected a whole number"),
        ({"head_dim": 64}, "head_dim is 64, and this model computes only 128"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"vision_config": []}, r"vision_config is \[\]; expected an object"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised .quantization_config, fp8"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 16]}},
            "half the head size, 64",
        ),
        ({"vocab_size": 1000}, "image_token_id 151655 is outside the vocabulary of 1000"),
        ({"initializer_range": None}, "initializer_range is None; expected a number above 0"),
        ({"model_type": []}, "model_type .. is not supported"),
    ],
)
def test_a_config_that_this_model_cannot_compute_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        from_hf({**preset("qwen2_vl_2b").to_hf(), **change})


@pytest.mark.parametrize(
    ("name", "part", "change", "told"),
    [
        ("qwen3_vl_2b", "text_config", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_vl_2b", "text_config", {"rope_theta": None}, "rope_theta is None"),
        ("qwen3_vl_2b", "vision_config", {"hidden_act": "gelu"}, "computes only 'gelu_pytorch"),
        ("qwen3_vl_2b", "vision_config", {"out_hidden_size": 9}, "output width is 9"),
        ("qwen3_vl_2b", "vision_config", {"num_position_embeddings": 2300}, "no square table"),
        ("qwen3_vl_2b", "vision_config", {"deepstack_visual_indexes": [5, 24]}, "0 to 23"),
        ("qwen2_5_vl_3b", "vision_config", {"window_size": 27}, "smaller than one merged token"),
        ("qwen2_5_vl_3b", "vision_config", {"fullatt_block_indexes": None}, "a list of whole"),
        ("qwen2_5_vl_3b", "vision_config", {"patch_size": [14, 14]}, "patch_size is .14, 14."),
    ],
)
def test_a_family_that_departs_from_what_it_publishes_is_refused(name, part, change, told):
    config = preset(name).to_hf()
    config[part] |= change
    with pytest.raises(UserError, match=told):
        from_hf(config)


def test_a_trained_tokenizer_sets_its_own_vocabulary_and_special_tokens():
    config = preset("tiny").replace(vocab_size=900, image_token_id=899)
    assert (config.vocab_size, config.image_token_id) == (900, 899)
    assert config.text == preset("tiny").text
