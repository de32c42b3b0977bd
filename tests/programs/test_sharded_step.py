"""A large model's step, compiled for TPUs that are not there: its plan, and what chips exchange."""

import dataclasses
import importlib.util
import json
from collections import Counter

import pytest

from afmrl_jax.configs.agcl import get_config
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.models.presets import PRESETS, preset
from afmrl_jax.planning import search as planning_search
from afmrl_jax.planning.report import local_bytes
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
def test_a_planned_step_gathers_each_matrix_thrice_a_micro_batch_and_sums_its_gradient_once(
    model, monkeypatch, tmp_path, capsys
):
    """With GradCache and remat: embed, embed again, and once more going back; all in bfloat16."""
    monkeypatch.setitem(PRESETS, "wide", wide())
    monkeypatch.setattr(planning_search, "TRIES", 1)
    config = get_config()
    config.update(batch=16, micro_batches=MICRO_BATCHES)
    config.mesh.fsdp = CHIPS
    config.model.update(preset=model, dtype="bfloat16", remat="full")
    config.data.update(max_tokens=24, max_patches=16)
    plan.main(config, tmp_path, "v5e:2x2")
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    (report,) = found["reports"]
    check_report(report, told)
    assert len(found["tried"]) == 1 and "Quickest of what fits: --config.mesh" in told

    (part,) = agcl.plan(config, make_mesh(dict(config.mesh), plan.devices_of("v5e:2x2")))
    params = part.arguments[1].params["backbone"]
    vision = params["vision"]
    matrices = params["layers"], vision["layers"], vision["merger"]  # tables: looked up in place
    matrices = CHIPS * local_bytes(matrices) / 2  # float32 as bfloat16
    received = MICRO_BATCHES * matrices * (CHIPS - 1) / CHIPS
    sent = Counter()
    for one in report["exchanges"]:
        sent[one["kind"]] += one["bytes"]
        assert one["axes"] == "fsdp"
    assert 0.95 * 3 * received < sent["all-gather"] < 1.15 * 3 * received
    assert 0.95 * 2 * received < sent["all-reduce"] < 1.15 * 2 * received
    assert sent.total() < 1.05 * (sent["all-gather"] + sent["all-reduce"])


def check_report(report, told):
    """A report of plan.json is whole, and its numbers agree with each other."""
    assert report["name"] == "step" and report["limit"] > report["needed"] > 0
    named = ("parameters", "optimizer", "batch", "a matrix of all pairs", "activations")
    assert tuple(report["memory"]) == named and all(name in told for name in named)
    assert sum(report["memory"].values()) == pytest.approx(report["needed"])
    assert 0 < report["useful"] <= report["flops"] and 0 < report["utilisation"] < 1
    assert report["seconds"] > max(report["floors"]["products"], report["floors"]["memory"])
    assert not report["unread_loops"]
