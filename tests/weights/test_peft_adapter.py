"""PEFT's folders: each matrix has one place, and what is no plain LoRA is refused."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from afmrl_jax.core.errors import UserError
from afmrl_jax.models import lora
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights import peft_adapter
from afmrl_jax.weights.peft_adapter import read_adapter

CONFIG = preset("tiny_qwen3").replace(vocab_size=64)  # whose layers come in groups
# As peft 0.21 saves it.
DESCRIBED = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 3,
    "lora_alpha": 6,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
QUERY = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
QKV = "base_model.model.model.visual.blocks.0.attn.qkv"


def pair(module, outputs, inputs):
    random = np.random.default_rng(len(module))
    return {
        f"{module}.lora_A.weight": random.normal(size=(3, inputs)).astype(np.float32),
        f"{module}.lora_B.weight": random.normal(size=(outputs, 3)).astype(np.float32),
    }


def write(folder, tensors, **changes):
    (folder / peft_adapter.CONFIG).write_text(json.dumps(DESCRIBED | changes))
    save_file(tensors, folder / peft_adapter.WEIGHTS)
    return folder


def abstract(model=QwenVL, config=CONFIG, hold=()):
    def make():
        made = model(config, rngs=nnx.Rngs(0))
        lora.add_base_adapters(made, hold)
        return nnx.to_pure_dict(nnx.state(made))

    return jax.eval_shape(make)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_each_matrix_changes_its_layer_as_peft_adds_it(tmp_path, rslora, scale):
    tensors = pair(QUERY, 128, 128) | pair(QKV, 3 * 96, 96)
    adapter = read_adapter(write(tmp_path, tensors, use_rslora=rslora))
    read = adapter.read(abstract(), CONFIG)

    def change(place, outputs):
        return place["lora_a"] @ place["lora_b"].reshape(1, 3, -1)

    first, second = (read["layers"][n]["attention"]["query"] for n in (0, 1))
    wanted = scale * tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"]
    np.testing.assert_allclose(change(second, 128)[0].T, wanted, atol=1e-5)
    assert not change(first, 128).any()  # the adapter leaves the other layer
    place = read["vision"]["layers"][0]["attention"]["qkv"]
    assert place["lora_b"].shape == (1, 3, 3, 96)
    wanted = scale * tensors[f"{QKV}.lora_B.weight"] @ tensors[f"{QKV}.lora_A.weight"]
    np.testing.assert_allclose(change(place, 288)[0].T, wanted, atol=1e-5)
    # And a model that holds the adapters apart has a place for each, and no other.
    held = abstract(hold=[adapter.lora(CONFIG)])
    shapes = jax.tree.map(
        np.shape, lora.as_base_adapters(lora.join(read, zeros(abstract())), 1.0, np.float32)
    )
    assert shapes == jax.tree.map(np.shape, held)


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), tree)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', and only plain LoRA.*merge_and_unload"),
        ({"use_dora": True}, "says use_dora True"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save ..embed_tokens"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"revision": "old"}, "revision 'old'"),
        ({"what_comes_tomorrow": 1}, "what_comes_tomorrow 1"),
        ({"r": None}, "r is None and lora_alpha 6"),
        ({"base_model_name_or_path": None}, "no base_model_name_or_path; say there which"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_what_makes_it_so(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        read_adapter(write(tmp_path, pair(QUERY, 128, 128), **changes))


def test_an_adapters_files_are_told_apart_from_a_models_and_from_pickles(tmp_path):
    write(tmp_path, pair(QUERY, 128, 128) | {f"{QUERY}.lora_magnitude_vector": np.zeros(3)})
    with pytest.raises(UserError, match=r"holds base_model.*lora_magnitude_vector"):
        read_adapter(tmp_path)
    write(tmp_path, {f"{QUERY}.lora_A.weight": np.zeros((3, 8), np.float32)})
    with pytest.raises(UserError, match="not a lora_A and a lora_B each"):
        read_adapter(tmp_path)
    (tmp_path / peft_adapter.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"\.bin is a pickle, which is never read"):
        read_adapter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds a whole model and a PEFT adapter"):
        read_adapter(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / peft_adapter.CONFIG).write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("module", "sizes", "says"),
    [
        (QUERY.replace("layers.1", "layers.2"), (128, 128), r"layers\.2.*no matrix alone"),
        ("base_model.model.lm_head", (64, 128), "lm_head, of which this model has no matrix"),
        (QUERY, (128, 64), r"lora_A \[3, 64\] and lora_B \[128, 3\]; expected \[3, 128\]"),
    ],
)
def test_a_matrix_without_its_kernel_is_told_by_name(tmp_path, module, sizes, says):
    adapter = read_adapter(write(tmp_path, pair(module, *sizes)))
    with pytest.raises(UserError, match=says):
        adapter.read(abstract(), CONFIG)


def test_an_embedder_has_no_use_for_a_heads_adapter_and_a_generator_has(tmp_path):
    tensors = pair("base_model.model.lm_head", 64, 128) | pair(QUERY, 128, 128)
    adapter, untied = read_adapter(write(tmp_path, tensors)), CONFIG.replace(tie_embeddings=False)
    assert adapter.read(abstract(Embedder, untied), untied)["backbone"].keys() == {"layers"}
    assert adapter.read(abstract(config=untied), untied).keys() == {"layers", "lm_head"}
    strange = read_adapter(write(tmp_path, pair("base_model.model.model.score", 1, 128)))
    with pytest.raises(UserError, match="adapts score, which a qwen3_vl lacks"):
        strange.lora(CONFIG)
