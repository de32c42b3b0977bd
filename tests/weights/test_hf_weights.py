"""Checkpoints: every name has one place, every number arrives, and every misfit is told at once."""

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import QwenVLConfig, from_hf
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights import hf_weights

PUBLISHED = Path(__file__).resolve().parents[2] / ".." / "shared" / "qwen"
FOLDERS = ("qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_embedding_8b")
FAMILIES = {
    name: preset(name).replace(vocab_size=64) for name in ("tiny", "tiny_qwen2_5", "tiny_qwen3")
}
CONFIG = FAMILIES["tiny"]
CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


@functools.cache
def abstract_state(config: QwenVLConfig, **options) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), **options)))


def random_tensors(config: QwenVLConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """A whole checkpoint, other numbers in each tensor."""
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=target.hf_shape).astype(dtype)
        for target in hf_weights.targets(abstract_state(config), config)
        for name in target.names
    }


def write_shards(folder: Path, tensors: dict, files: dict[str, list[str]]) -> None:
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / hf_weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_all(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and tensor.tobytes() == right[name].tobytes()
        for name, tensor in left.items()
    )


def transformers_model(config: QwenVLConfig, tmp_path: Path):
    """Theirs of the same config, of random numbers that differ in every tensor."""
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    torch.manual_seed(0)
    model = CLASSES[config.architecture](transformers.AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(CONFIG)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_published_index_fills_every_parameter_with_transformers_shapes(folder):
    if not (PUBLISHED / folder).exists():
        pytest.skip("the published configurations are not beside this checkout")
    published = json.loads((PUBLISHED / folder / hf_weights.INDEX).read_text())
    config = from_hf(json.loads((PUBLISHED / folder / "config.json").read_text()))
    has_head = "lm_head.weight" in published["weight_map"]
    plan = hf_weights.targets(abstract_state(config, head=has_head), config)
    assert Counter(name for target in plan for name in target.names) == Counter(
        list(published["weight_map"])
    )

    ours = {name: target.hf_shape for target in plan for name in target.names}
    assert 2 * sum(map(math.prod, ours.values())) == published["metadata"]["total_size"]
    with torch.device("meta"):
        model = CLASSES[config.architecture](
            transformers.AutoConfig.from_pretrained(PUBLISHED / folder)
        )
    theirs = {
        hf_weights.PREFIX.sub("", name): tuple(p.shape) for name, p in model.state_dict().items()
    }
    if not has_head:
        del theirs["lm_head.weight"]
    assert {hf_weights.PREFIX.sub("", name): shape for name, shape in ours.items()} == theirs


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2_vl_2b", 2_208_985_600), ("qwen3_vl_8b", 8_767_123_696)]
)
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    leaves = jax.tree.leaves(abstract_state(preset(name)))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_no_name_of_the_tables_is_unused():
    seen = {family: set() for family in hf_weights.FAMILIES}
    for config in FAMILIES.values():
        untied = config.replace(tie_embeddings=False)
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state(untied)):
            path = re.sub(r"\.\d+\.", ".", jax.tree_util.keystr(path, simple=True, separator="."))
            seen[config.architecture].add(re.sub(r"\.\w+(\.(raw_)?value)?$", "", path))
    assert set.union(*seen.values()) >= hf_weights.MODULES.keys()
    assert all(seen[family] >= names.keys() for family, names in hf_weights.FAMILIES.items())


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_what_is_loaded_is_written_back_bit_by_bit(config, tmp_path):
    tensors = random_tensors(config, ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    state = hf_weights.load(tmp_path, abstract_state(config, param_dtype=jnp.bfloat16), config)
    hf_weights.save(tmp_path / "again", state, config)
    assert same_bits(read_all(tmp_path / "again"), tensors)
    assert from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == config


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_what_transformers_saved_is_read_and_written_back_bit_by_bit(config, tmp_path):
    model = transformers_model(config, tmp_path)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "bare")  # without the prefix "model."
    for layout in ("whole", "bare"):
        state = hf_weights.load(tmp_path / layout, abstract_state(config), config)
        hf_weights.save(tmp_path / "again", state, config)
        assert same_bits(read_all(tmp_path / "again"), read_all(tmp_path / "whole"))
    again, report = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values())
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())


def test_bfloat16_shards_load_into_the_parameters_own_dtype(tensors, tmp_path):
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    names = sorted(halves)
    write_shards(tmp_path, halves, {"a.safetensors": names[:20], "b.safetensors": names[20:]})
    for dtype in (jnp.float32, jnp.bfloat16):
        state = hf_weights.load(tmp_path, abstract_state(CONFIG, param_dtype=dtype), CONFIG)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(dtype)}
        written = dict(hf_weights.to_hf(state, CONFIG))
        assert same_bits(written, {name: halves[name].astype(dtype) for name in names})


def test_parameters_do_not_depend_on_the_file_once_loaded(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    state = hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert same_bits(dict(hf_weights.to_hf(state, CONFIG)), tensors)


def test_weights_are_written_in_shards_of_another_dtype_and_replace_an_earlier_save(
    tensors, tmp_path
):
    save_file(tensors, tmp_path / "model.safetensors")
    state = hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    hf_weights.save(tmp_path, state, CONFIG, dtype=jnp.bfloat16, max_shard_bytes=500_000)
    files = sorted(path.name for path in tmp_path.iterdir())
    count = len(files) - 2
    assert count > 2
    shards = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert files == sorted(["config.json", hf_weights.INDEX, *shards])
    assert all((tmp_path / shard).stat().st_size < 510_000 for shard in shards)
    assert same_bits(read_all(tmp_path), halves)
    index = json.loads((tmp_path / hf_weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in halves.values())
    again = hf_weights.load(tmp_path, abstract_state(CONFIG, param_dtype=jnp.bfloat16), CONFIG)
    hf_weights.save(tmp_path, again, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same_bits(read_all(tmp_path), halves)


def test_a_save_that_fails_leaves_the_earlier_one_whole(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    state = hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    jax.tree.leaves(state)[-1].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        hf_weights.save(tmp_path, state, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert same_bits(read_all(tmp_path), tensors)


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


def test_what_the_model_leaves_of_a_file_is_what_it_has_in_its_place(tensors, tmp_path):
    def load(spare, config=CONFIG, **options):
        save_file({**tensors, **spare}, tmp_path / "model.safetensors")
        return hf_weights.load(tmp_path, abstract_state(config, **options), config)

    table = tensors["model.embed_tokens.weight"]
    tower = 1e4 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)  # heads of 32, two axes
    text = 1e4 ** -(np.arange(0, 32, 2, dtype=np.float32) / 32)
    equal = {
        "lm_head.weight": table,
        "visual.rotary_pos_emb.inv_freq": tower.astype(ml_dtypes.bfloat16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": text,
    }
    load(equal)
    for name, other, told in (
        ("lm_head.weight", table + (np.arange(64) == 63)[:, None], "not the embedding table"),
        ("lm_head.weight", np.zeros((65, 128), np.float32), "not the embedding table"),
        ("visual.rotary_pos_emb.inv_freq", tower[:4], "other rotary frequencies"),
        ("model.rotary_emb.inv_freq", 1e6 ** -(np.arange(16) / 16), "other rotary frequencies"),
    ):
        with pytest.raises(UserError, match=f"{name} .*{told}"):
            load({name: other})
    untied = CONFIG.replace(tie_embeddings=False)
    load({"lm_head.weight": table + 1}, untied, head=False)  # an embedder has no use for it
    with pytest.raises(UserError, match=r"1 missing \(lm_head.weight\); an embedder has no"):
        load({}, untied)
    with pytest.raises(UserError, match=r"unexpected .*merge_and_unload"):
        load({"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 128), np.float32)})


def test_a_head_of_other_numbers_unties_the_model_and_alone_is_the_table(tensors, tmp_path):
    file, head = tmp_path / "model.safetensors", "lm_head.weight"
    assert hf_weights.with_head_of(tmp_path, CONFIG) == CONFIG  # no weights yet
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, head: table}, file)
    assert hf_weights.with_head_of(tmp_path, CONFIG) == CONFIG
    save_file({**tensors, head: table[::-1].copy()}, file)
    untied = hf_weights.with_head_of(tmp_path, CONFIG)
    assert untied == CONFIG.replace(tie_embeddings=False)
    assert hf_weights.with_head_of(tmp_path, untied) == untied
    alone = {name: x for name, x in tensors.items() if name != "model.embed_tokens.weight"}
    save_file({**alone, head: table}, file)
    assert hf_weights.with_head_of(tmp_path, CONFIG) == CONFIG
    state = hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    assert same_bits(dict(hf_weights.to_hf(state, CONFIG)), tensors)


def test_a_tensor_under_two_names_is_refused(tensors, tmp_path):
    twice = {**tensors, "model.language_model.norm.weight": tensors["model.norm.weight"]}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\S*\.norm\.weight is there twice, also as model"):
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_missing_truncated_or_foreign_file_is_told_by_name(tensors, tmp_path):
    def told() -> str:
        with pytest.raises(UserError) as error:
            hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
        return str(error.value)

    file = tmp_path / "model.safetensors"
    assert f"{tmp_path}: neither model.safetensors nor {hf_weights.INDEX}" in told()
    save_file(tensors, file)
    whole = file.read_bytes()
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for damaged, expected in (
        (b"", "not found or empty"),
        (whole[:-10], rf"should lie at bytes \d+ to {len(whole)}, and the file has"),
        (whole[:200], r"promise a header of \d+ bytes, and it has 200"),
        (b"abc", "promise a header"),
        (b"\xff" * 64, "promise a header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (header([]), "no table of tensors"),
        (header({"x": 1}), "no table of tensors"),
        ((9).to_bytes(8, "little") + b'{"x": nul', "no table of tensors"),
        (header({"x": {**entry, "data_offsets": [-8, 0]}}) + b" " * 8, "x should lie at"),
        (header({"x": {**entry, "shape": [3]}}) + b" " * 8, r"x has 8 bytes, which F32 \[3\]"),
        (header({"x": {**entry, "dtype": "F8_E4M3"}}) + b" " * 8, "F8_E4M3.*not quantised"),
    ):
        file.write_bytes(damaged)
        message = told()
        assert message.startswith(str(file))
        assert re.search(expected, message), message


def test_everything_wrong_with_shards_is_told_in_one_error(tensors, tmp_path):
    names = sorted(tensors)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:30], "c.safetensors": names}
    write_shards(tmp_path, tensors, files)
    index = json.loads((tmp_path / hf_weights.INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(names[:20], "a.safetensors")
    index["weight_map"] |= dict.fromkeys(names[20:31], "b.safetensors")
    (tmp_path / hf_weights.INDEX).write_text(json.dumps(index))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError) as error:
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)
    for told in (
        f"{tmp_path / 'a.safetensors'}: not found",
        f"{tmp_path / 'b.safetensors'} lacks what {hf_weights.INDEX} promises: {names[30]}",
        f"{tmp_path / 'c.safetensors'} holds what {hf_weights.INDEX} does not list there",
    ):
        assert told in str(error.value)


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "x.bin", None]
)
def test_an_index_that_points_out_of_its_folder_is_refused(file, tmp_path):
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / hf_weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"expected the plain name of a \.safetensors file"):
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": []}', "{}"])
def test_an_index_that_is_none_is_told_by_name(text, tmp_path):
    (tmp_path / hf_weights.INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json: no weight_map"):
        hf_weights.load(tmp_path, abstract_state(CONFIG), CONFIG)


def test_a_parameter_without_a_name_is_our_own_error():
    with pytest.raises(ValueError, match="gain has no name"):
        hf_weights.targets({"gain": jnp.zeros(3)}, CONFIG)


def test_a_folder_is_itself_and_a_hub_name_is_its_cached_download(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert hf_weights.resolve(str(snapshot)) == snapshot
    assert hf_weights.resolve("someone/some-model") == snapshot
    with pytest.raises(UserError, match=r"someone/other: no such folder, and huggingface\.co"):
        hf_weights.resolve("someone/other")
    for path in ("/nowhere/at/all", "nowhere", "../some/model", "a/b/c"):
        with pytest.raises(UserError, match="no such folder; give one, or a name on the hub"):
            hf_weights.resolve(path)
