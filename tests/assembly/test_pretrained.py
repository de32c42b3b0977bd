"""A checkpoint found again, as what it is or as what it can begin."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from afmrl_jax.assembly import pretrained
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import (
    Computation,
    EncoderOptions,
    GeneratorOptions,
    PresetOptions,
    TrainingOptions,
)
from afmrl_jax.assembly.pretrained import Base, find_pretrained, read_base
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.models import lora
from afmrl_jax.weights import hf_weights

MESH = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The workdir of a run of an encoder, and its parameters."""
    from afmrl_jax.configs.agcl import get_config

    config = ConfigDict(get_config().to_dict())
    config.model.vocab_size = 300
    enc = Encoder.from_preset(EncoderOptions.of(config), PresetOptions.of(config), ["red mug"])
    params = jax.jit(lambda: enc.init_params(0))()
    workdir = tmp_path_factory.mktemp("encoder")
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        record = enc.record() | {"config": config.to_json()}
        checkpoints.save(TrainState(jnp.int32(1), params, {}), record, 1, None)
    return workdir, params


def test_an_encoder_gives_a_generator_its_parameters(encoder):
    workdir, params = encoder
    source = find_pretrained(str(workdir), Generator, begin=True)
    model = source.for_training(*options_of(config_of("sft")))
    begun = source.load(abstract_params(model, MESH))
    jax.tree.map(np.testing.assert_array_equal, begun, params["backbone"])


def test_but_is_none_itself(encoder):
    with pytest.raises(UserError, match="holds the encoder of a run: name what has trained"):
        find_pretrained(str(encoder[0]), Generator)


def test_parameters_that_were_not_saved_are_told(encoder):
    workdir, _ = encoder
    source = find_pretrained(str(workdir))
    wanted = abstract_params(source.model, MESH)
    wanted["backbone"]["head"] = jax.tree.leaves(wanted)[0]
    with pytest.raises(ValueError, match="lacks some of these parameters"):
        source.load(wanted)


def config_of(program, **model):
    config = ConfigDict(
        importlib.import_module(f"afmrl_jax.configs.{program}").get_config().to_dict()
    )
    config.model.update(model)
    return config


def options_of(config):
    return GeneratorOptions.of(config), TrainingOptions.of(config)


LORA = config_of("sft", dtype="bfloat16", lora_rank=4, lora_alpha=8.0)
RANK_2 = config_of("sft", dtype="bfloat16", lora_rank=2, lora_alpha=8.0)


def adapted(enc, seed):
    """Random parameters, adapters as after some training: changes of a hundredth of a kernel."""
    random, scales = np.random.default_rng(seed), {"lora_a": 0.1, "lora_b": 2e-3}
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray(
            scales.get(path[-1].key, 0.05) * random.normal(size=x.shape), x.dtype
        ),
        jax.eval_shape(lambda: enc.init_params(0)),
    )


def save(folder, enc, config, params, base):
    """The workdir of a run that trained the parameters, or adapters that stand on a base."""
    record = enc.record() | {"config": config.to_json()} | base.record()
    with Checkpoints(folder / "checkpoints", writable=True) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), params, {}), record, 1, None)
    return str(folder)


def read_as_base(source, config):
    """What a run under LoRA begins with: the model, and its frozen parameters."""
    enc = source.for_training(*options_of(config))
    base, _ = read_base(enc, lora.split(abstract_params(enc, MESH))[1], Base(source.path))
    return enc, base


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A generator trained under LoRA in bfloat16, its parameters and its workdir."""
    config = config_of("sft", vocab_size=300, lora_rank=0)
    enc = Generator.from_preset(options_of(config)[0], PresetOptions.of(config), ["red mug"])
    tiny = enc.model_config
    tiny = tiny.replace(
        text=dataclasses.replace(tiny.text, num_layers=1),
        vision=dataclasses.replace(tiny.vision, num_layers=1),
    )
    enc = dataclasses.replace(enc, model_config=tiny)
    folder = tmp_path_factory.mktemp("whole")
    whole = find_pretrained(save(folder, enc, config, adapted(enc, 0), Base("")), Generator)
    enc, base = read_as_base(whole, LORA)
    params = lora.join(lora.split(adapted(enc, 1))[0], base)
    folder = tmp_path_factory.mktemp("sft")
    return enc, params, save(folder, enc, LORA, lora.split(params)[0], Base(whole.path))


def logits(enc, params, dtype):
    """Of two texts, computed in `dtype`."""
    enc = dataclasses.replace(
        enc, options=dataclasses.replace(enc.options, model=Computation(dtype))
    )
    tokens = jnp.arange(24).reshape(2, 12) + 20
    rows = {
        "tokens": tokens,
        "token_mask": jnp.ones_like(tokens, bool),
        "positions": jnp.broadcast_to(jnp.arange(12), (2, 3, 12)),
        "patches": jnp.zeros((2, 0, enc.model_config.vision.patch_dim)),
    }

    def call(params):
        model = nnx.merge(enc.graph(), params)
        return model.logits(model(rows))

    return np.asarray(jax.jit(call)(params))


def query(params):
    layer = params["layers"][0]["attention"]["query"]
    return {name: np.asarray(x, np.float64) for name, x in layer.items()}


def test_a_run_of_adapters_is_the_base_of_another_without_a_rounded_number(sft):
    enc, params, workdir = sft
    source = find_pretrained(workdir, Generator)
    rar, base = read_as_base(source, RANK_2)
    before, held = query(params), query(base)
    assert base["layers"][0]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(held["kernel"], before["kernel"])
    change = 2 * before["lora_a"] @ before["lora_b"]
    np.testing.assert_allclose(held["base_a"] @ held["base_b"], change, atol=1e-9)
    rounded = np.asarray(jnp.asarray(before["kernel"] + change, jnp.bfloat16), np.float64)
    lost = (rounded == before["kernel"]).mean()
    assert lost > 0.05  # what would not arrive if the kernel took the change
    fresh = jax.tree.map(jnp.zeros_like, lora.split(adapted(rar, 0))[0])
    begun = lora.join(fresh, base)
    for dtype in ("float32", "bfloat16"):
        np.testing.assert_allclose(
            logits(rar, begun, dtype), logits(enc, params, dtype), rtol=1e-5, atol=1e-5
        )


def test_adapters_on_adapters_are_merged_in_one_float32_sum(sft, tmp_path):
    _, params, workdir = sft
    source = find_pretrained(workdir, Generator)
    rar, base = read_as_base(source, RANK_2)
    more = lora.join(lora.split(adapted(rar, 2))[0], base)
    workdir = save(tmp_path, rar, RANK_2, lora.split(more)[0], Base(source.path))
    found = find_pretrained(workdir, Generator)
    merged = found.load(abstract_params(found.model, MESH))
    first, second = query(params), query(more)
    change = 2 * first["lora_a"] @ first["lora_b"] + 4 * second["lora_a"] @ second["lora_b"]
    np.testing.assert_allclose(query(merged)["kernel"], first["kernel"] + change, atol=1e-7)
    third = found.for_training(*options_of(RANK_2))
    assert [one.rank for one in third.base_lora] == [4, 2]


def test_adapters_of_a_generator_may_stand_on_an_encoder(encoder):
    workdir, params = encoder
    source = find_pretrained(str(workdir), Generator, begin=True)
    enc = source.for_training(*options_of(config_of("sft", lora_rank=2, dtype="float32")))
    base, _ = read_base(enc, lora.split(abstract_params(enc, MESH))[1], Base(source.path))
    jax.tree.map(np.testing.assert_array_equal, base, params["backbone"])


def encoder_options(config):
    return EncoderOptions.of(config), TrainingOptions.of(config)


def test_a_generator_gives_an_encoder_its_parameters(sft):
    generator, _, workdir = sft
    source = find_pretrained(workdir, Encoder, begin=True)
    model = source.for_training(*encoder_options(config_of("agcl")))
    begun = source.load(abstract_params(model, MESH))
    merged = find_pretrained(workdir, Generator)
    expected = merged.load(abstract_params(merged.model, MESH))
    jax.tree.map(np.testing.assert_array_equal, begun, {"backbone": expected})
    assert model.tokenizer.to_str() == generator.tokenizer.to_str()


def test_adapters_of_an_encoder_may_stand_on_a_generator(sft):
    _, params, workdir = sft
    source = find_pretrained(workdir, Encoder, begin=True)
    config = config_of("agcl", lora_rank=2, dtype="bfloat16")
    model = source.for_training(*encoder_options(config))
    base, _ = read_base(model, lora.split(abstract_params(model, MESH))[1], Base(source.path))
    held, before = query(base["backbone"]), query(params)
    np.testing.assert_array_equal(held["kernel"], before["kernel"])
    change = 2 * before["lora_a"] @ before["lora_b"]
    np.testing.assert_allclose(held["base_a"] @ held["base_b"], change, atol=1e-9)


def test_an_encoder_leaves_a_generators_own_head_behind(tmp_path):
    config = config_of("sft", vocab_size=300)
    tied = Generator.from_preset(options_of(config)[0], PresetOptions.of(config), ["red mug"])
    untied = dataclasses.replace(tied, model_config=tied.model_config.replace(tie_embeddings=False))
    params = adapted(untied, 0)
    workdir = save(tmp_path, untied, config, params, Base(""))
    source = find_pretrained(workdir, Encoder, begin=True)
    model = source.for_training(*encoder_options(config_of("agcl")))
    begun = source.load(abstract_params(model, MESH))
    rest = {name: part for name, part in params.items() if name != "lm_head"}
    assert "lm_head" in params
    jax.tree.map(np.testing.assert_array_equal, begun, {"backbone": rest})


def test_base_is_the_shipped_folder_whatever_lies_here(sft, tmp_path, monkeypatch, caplog):
    generator, _, _ = sft
    shipped = tmp_path / "shipped"
    params = adapted(dataclasses.replace(generator, lora=None, base_lora=()), 3)
    hf_weights.save(shipped, params, generator.model_config)
    generator.tokenizer.save(str(shipped / "tokenizer.json"))
    monkeypatch.setattr(pretrained, "BASE_FOLDER", shipped)
    monkeypatch.chdir(tmp_path)
    for model_class in (Encoder, Generator):
        source = find_pretrained("base", model_class, begin=True)
        assert source.path == "base" and source.model.model_config == generator.model_config
    assert not caplog.messages
    (tmp_path / "base").mkdir()
    assert find_pretrained("base").model.model_config == generator.model_config
    assert caplog.messages == [
        "base names the model that ships with the package; ./base is the folder here"
    ]
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_pretrained("./base")


def test_a_peft_adapter_is_its_base_with_the_change_added(sft, tmp_path):
    enc, _, _ = sft
    config, random = enc.model_config, np.random.default_rng(0)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    (base / "config.json").write_text(json.dumps(config.to_hf()))
    enc.tokenizer.save(str(base / "tokenizer.json"))
    plan = hf_weights.targets(lora.without_adapters(abstract_params(enc, MESH)), config)
    tensors = {
        name: random.normal(size=target.hf_shape).astype(np.float32)
        for target in plan
        for name in target.names
    }
    save_file(tensors, base / "model.safetensors")
    described = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 5}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    a, b = random.normal(size=(2, 128)), random.normal(size=(128, 2))
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    pair = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(pair, folder / "adapter_model.safetensors")
    source = find_pretrained(str(folder), Generator)
    assert source.model.options is None and source.model.model_config == config
    plain = source.for_training(*options_of(config_of("sft", dtype="bfloat16")))
    merged = source.load(abstract_params(plain, MESH))
    before = tensors["model.layers.0.self_attn.q_proj.weight"]
    changed_kernel = query(merged)["kernel"][0].T
    np.testing.assert_allclose(changed_kernel, before + 2.5 * b @ a, rtol=1e-5, atol=1e-5)
    # A run of adapters in bfloat16 keeps them apart.
    held = query(read_as_base(source, LORA)[1])
    np.testing.assert_array_equal(held["kernel"][0].T, before.astype(jnp.bfloat16))
    np.testing.assert_allclose((held["base_a"] @ held["base_b"])[0].T, 2.5 * b @ a, atol=1e-5)
    (base / "model.safetensors").rename(folder / "weights")
    described["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"is a PEFT adapter.*cannot be read.*base_model_name_or"):
        find_pretrained(str(folder))
