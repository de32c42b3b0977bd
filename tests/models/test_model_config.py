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
    [("qwen2_vl_2b", 4_417_971_200 // 2), ("qwen2_vl_7b", 16_582_751_232 // 2)],
)
def test_presets_have_as_many_parameters_as_the_published_checkpoints(name, count):
    assert count_parameters(name) == count


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_the_hugging_face_form(name):
    assert from_hf(json.loads(json.dumps(preset(name).to_hf()))) == preset(name)


def test_the_newer_nested_layout_reads_as_the_flat_one():
    flat = preset("qwen2_vl_2b").to_hf()
    moved = {
        key: flat.pop(key)
        for key in (
            "hidden_size",
            "num_hidden_layers",
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


def test_the_published_7b_config_is_the_preset():
    if not QWEN.exists():
        pytest.skip("the published configs are not beside this checkout")
    published = json.loads((QWEN / "qwen2_vl_7b" / "config.json").read_text())
    assert from_hf(published) == preset("qwen2_vl_7b")


def test_a_mistyped_preset_is_told_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'qwen2_vl_2b'"):
        preset("qwen2_vl_2B")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_key_value_heads": 5}, "cannot share 5"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 16]}},
            "half the head size, 64",
        ),
        ({"vocab_size": 1000}, "image_token_id 151655 is outside the vocabulary of 1000"),
    ],
)
def test_a_config_that_this_model_cannot_compute_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        from_hf({**preset("qwen2_vl_2b").to_hf(), **change})


def test_a_trained_tokenizer_sets_its_own_vocabulary_and_special_tokens():
    config = preset("tiny").replace(vocab_size=900, image_token_id=899)
    assert (config.vocab_size, config.image_token_id) == (900, 899)
    assert config.text == preset("tiny").text
