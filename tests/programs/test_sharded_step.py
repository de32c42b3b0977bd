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


def wide():
    """The tiny model with wide layers and a table of few tokens: most of it is matrices."""
    tiny = preset("tiny")
    vision = dataclasses.replace(tiny.vision, hidden_size=384, num_heads=4, mlp_size=1536)
    text = dataclasses.replace(tiny.text, hidden_size=512, mlp_size=2048)
    return tiny.replace(vision=vision, text=text, vocab_size=64)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="XLA's TPU compiler is not installed"
)
@pytest.mark.parametrize("model", ["wide", pytest.param("qwen2_vl_2b", marks=pytest.mark.slow)])
def test_a_step_gathers_each_matrix_thrice_a_micro_batch_and_sums_its_gradient_once(
    model, monkeypatch
):
    """With GradCache and remat: embed, embed again, and once more going back; all in bfloat16."""
    monkeypatch.setitem(PRESETS, "wide", wide())
    config = get_config()
    config.update(batch=16, micro_batches=MICRO_BATCHES)
    config.mesh.fsdp = CHIPS
    config.model.update(preset=model, dtype="bfloat16", remat="full")
    config.data.update(max_tokens=24, max_patches=16)
    mesh = make_mesh(dict(config.mesh), plan.devices_of("v5e:2x2"))
    (part,) = agcl.plan(config, mesh)
    report = reckon(part, *compile_part(part, mesh), mesh)

    params = part.arguments[1].params["backbone"]
    vision = params["vision"]
    matrices = params["layers"], vision["layers"], vision["merger"]  # tables: looked up in place
    matrices = CHIPS * local_bytes(matrices) / 2  # float32 as bfloat16
    received = MICRO_BATCHES * matrices * (CHIPS - 1) / CHIPS
    sent = Counter()
    for one in report.exchanges:
        sent[one["kind"]] += one["bytes"]
        assert one["axes"] == "fsdp"
    assert 0.95 * 3 * received < sent["all-gather"] < 1.15 * 3 * received
    assert 0.95 * 2 * received < sent["all-reduce"] < 1.15 * 2 * received
    assert sent.total() < 1.05 * (sent["all-gather"] + sent["all-reduce"])
