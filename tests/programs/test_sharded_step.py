"""A large model's step, compiled for TPUs that are not there: what its chips exchange."""

import dataclasses
import importlib.util
from collections import Counter

import pytest

from afmrl_jax.configs.agcl import get_config
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.models.presets import PRESETS, preset
from afmrl_jax.planning.report import compile_part, local_bytes, reckon
from afmrl_jax.programs import agcl, plan

COMPILED_AS_FOR_USERS = True
MICRO_BATCHES, CHIPS = 2, 4


def narrow():
    """The published 2B model with few layers, which are narrower."""
    published = preset("qwen2_vl_2b")
    vision = dataclasses.replace(published.vision, hidden_size=320, num_layers=4, mlp_size=1280)
    text = dataclasses.replace(
        published.text, hidden_size=512, num_layers=4, num_heads=4, mlp_size=2048
    )
    return published.replace(vision=vision, text=text)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="XLA's TPU compiler is not installed"
)
@pytest.mark.parametrize("model", ["narrow", pytest.param("qwen2_vl_2b", marks=pytest.mark.slow)])
def test_a_step_gathers_each_matrix_thrice_a_micro_batch_and_sums_its_gradient_once(
    model, monkeypatch
):
    """With GradCache and remat: embed, embed again, and once more going back; all in bfloat16."""
    monkeypatch.setitem(PRESETS, "narrow", narrow())
    config = get_config()
    config.update(batch=16, micro_batches=MICRO_BATCHES)
    config.mesh.fsdp = CHIPS
    config.model.update(preset=model, dtype="bfloat16", remat="full")
    config.data.update(max_tokens=48, max_patches=64)
    mesh = make_mesh(dict(config.mesh), plan.devices_of("v5e:2x2"))
    (part,) = agcl.plan(config, mesh)
    report = reckon(part, *compile_part(part, mesh), mesh)

    params = part.arguments[1].params["backbone"]
    layers = params["layers"], params["vision"]["layers"]  # tables are looked up where they lie
    matrices = CHIPS * local_bytes(layers) / 2  # float32 as bfloat16
    received = MICRO_BATCHES * matrices * (CHIPS - 1) / CHIPS
    sent = Counter()
    for one in report.exchanges:
        sent[one["kind"]] += one["bytes"]
        assert one["axes"] == "fsdp"
    assert 0.95 * 3 * received < sent["all-gather"] < 1.15 * 3 * received
    assert 0.95 * 2 * received < sent["all-reduce"] < 1.15 * 2 * received
    assert sent.total() < 1.05 * (sent["all-gather"] + sent["all-reduce"])
