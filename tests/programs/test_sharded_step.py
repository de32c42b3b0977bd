"""The published 2B model's step, compiled for TPUs that are not there: what its chips exchange."""

import importlib.util
from collections import Counter

import pytest

from afmrl_jax.configs.agcl import get_config
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.planning.report import compile_part, local_bytes, reckon
from afmrl_jax.programs import agcl, plan

MICRO_BATCHES, CHIPS = 2, 4


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="XLA's TPU compiler is not installed"
)
def test_the_2b_step_gathers_each_matrix_thrice_a_chunk_and_sums_its_gradient_once():
    """With GradCache and remat: embed, embed again, and once more going back; all in bfloat16."""
    config = get_config()
    config.update(batch=16, micro_batches=MICRO_BATCHES)
    config.mesh.fsdp = CHIPS
    config.model.update(preset="qwen2_vl_2b", dtype="bfloat16", remat="full")
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
