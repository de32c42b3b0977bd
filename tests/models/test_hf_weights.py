"""Checkpoints: every name has one place, and every misfit is told at once."""

import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from afmrl_jax.core.errors import UserError
from afmrl_jax.models import hf_weights
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL

INDEX = (
    Path(__file__)
    .resolve()
    .parents[2]
    .joinpath("..", "shared", "qwen", "qwen2_vl_7b", "model.safetensors.index.json")
)
CONFIG = preset("tiny").replace(vocab_size=64)


def abstract_state(config, **options) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), **options)))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A whole checkpoint of the tiny model, other numbers in each tensor."""
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=target.their_shape).astype(np.float32)
        for target in hf_weights.targets(abstract_state(CONFIG), CONFIG)
        for name in target.names
    }


def equal(left, right) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))


def test_every_name_of_the_published_7b_index_fills_exactly_one_parameter():
    if not INDEX.exists():
        pytest.skip("the published index is not beside this checkout")
    published = json.loads(INDEX.read_text())["weight_map"]
    config = preset("qwen2_vl_7b")
    plan = hf_weights.targets(abstract_state(config), config)
    assert Counter(name for target in plan for name in target.names) == Counter(list(published))
    assert len(plan) == len(hf_weights.TABLE)


def test_what_is_loaded_is_written_back_bit_by_bit(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    state = hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    hf_weights.save(tmp_path / "again", state, CONFIG)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())


def test_bfloat16_shards_load_into_the_parameters_own_dtype(tensors, tmp_path):
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    names = sorted(halves)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: halves[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for dtype in (jnp.float32, jnp.bfloat16):
        state = hf_weights.load(tmp_path, abstract_state(CONFIG, param_dtype=dtype), CONFIG)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(dtype)}
        written = dict(hf_weights.to_hf(state, CONFIG))
        assert all(np.array_equal(written[name], halves[name].astype(dtype)) for name in names)


def test_every_misfit_is_told_in_one_error(tensors, tmp_path):
    wrong = {
        **{name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        "model.layers.9.mlp.up_proj.weight": np.zeros((2, 2), np.float32),
        "visual.merger.ln_q.bias": np.zeros(7, np.float32),
    }
    save_file(wrong, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    for told in (
        str(tmp_path),
        "1 missing (model.norm.weight)",
        "1 unexpected (model.layers.9.mlp.up_proj.weight)",
        "1 of another shape (visual.merger.ln_q.bias [7] instead of "
        f"[{CONFIG.vision.hidden_size}])",
    ):
        assert told in str(error.value)


def test_a_head_is_passed_over_only_where_the_model_has_none(tensors, tmp_path):
    head = np.zeros((64, 192), np.float32)
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    untied = CONFIG.replace(tie_embeddings=False)
    hf_weights.load(tmp_path, abstract_state(untied, head=False), untied)
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight\)"):
        hf_weights.load(tmp_path, abstract_state(untied), untied)


def test_a_missing_truncated_or_foreign_file_is_told_by_name(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="not found or empty"):
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    save_file(tensors, file)
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:200], b"abc", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
            hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)


def test_a_parameter_without_a_name_is_our_own_error():
    with pytest.raises(ValueError, match="gain has no name"):
        hf_weights.targets({"gain": jnp.zeros(3)}, CONFIG)
