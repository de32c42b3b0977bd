"""A base, from its training to what starts from it, on a small catalogue."""

import importlib
import json

import jax
import numpy as np
import pytest

from afmrl_jax import runner
from afmrl_jax.assembly import pretrained
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.checkpoints.checkpoint import find_checkpoints
from afmrl_jax.core.mesh import make_mesh

QUICK = True


def page(name, catalogue_folder, cache_dir, **fields):
    """The arm tiny of a page, on the small catalogue."""
    config = importlib.import_module(f"afmrl_jax.configs.{name}").get_config("tiny")
    config.data.update(path=str(catalogue_folder), cache_dir=cache_dir)
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def trained(catalogue_folder, cache_dir, tmp_path_factory):
    """The workdir of a base that took two steps."""
    steps = {"steps": 2, "log_every": 1, "eval_every": 0, "checkpoint_every": 1}
    config = page("pretrain", catalogue_folder, cache_dir, **steps)
    config.data.update(max_answer=16, answer_dropout=0.0)
    config.eval.update(batch=4, validation_listings=4, listings=4)
    workdir = tmp_path_factory.mktemp("base") / "run"
    runner.run(config, workdir)
    return config, workdir


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch):
    """The folder that its export writes, in the place of the package's."""
    config = importlib.import_module("afmrl_jax.configs.export").get_config()
    folder = tmp_path / "assets"
    config.update(checkpoint=str(trained[1]), out=str(folder), dtype="bfloat16")
    runner.run(config, tmp_path)
    monkeypatch.setattr(pretrained, "BASE_FOLDER", folder)
    return folder


def params_of(path):
    source = find_pretrained(str(path), Generator)
    mesh = make_mesh({"slice": 1, "data": -1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        return source.load(abstract_params(source.model, mesh))


def test_a_base_is_judged_by_view_and_goes_on_bit_equal(trained, tmp_path):
    config, workdir = trained
    views = json.loads((workdir / "evaluation.json").read_text())["by_view"]
    assert list(views) == ["image+text", "image", "text"]
    stopped = tmp_path / "stopped"
    whole = find_checkpoints(str(workdir))[0]
    (stopped / "checkpoints").mkdir(parents=True)
    (stopped / "checkpoints" / "1").symlink_to(whole.folder / "1")
    runner.run(config, stopped)
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir), params_of(stopped))


def test_its_export_starts_an_encoder_and_a_generator(
    shipped, trained, catalogue_folder, cache_dir, tmp_path
):
    card = (shipped / "README.md").read_text()
    assert "F1 by attribute" in card and "F1 by view: image+text" in card
    base = params_of("base")
    jax.tree.map(
        lambda written, exact: np.testing.assert_array_equal(written, exact.astype("bfloat16")),
        base,
        params_of(trained[1]),
    )
    one_step = {"init_from": "base", "steps": 1, "eval_every": 0, "checkpoint_every": 0}
    for name in ("agcl", "sft"):
        config = page(name, catalogue_folder, cache_dir, **one_step)
        config.optimizer.learning_rate = 0.0
        config.eval.batch = 4
        runner.run(config, tmp_path / name)
        checkpoints, step = find_checkpoints(str(tmp_path / name))
        begun = checkpoints.restore_raw(step)["params"]
        leaves = jax.tree.leaves(begun)
        assert len(leaves) == len(jax.tree.leaves(base)) > 20
        assert all(map(np.array_equal, leaves, jax.tree.leaves(base)))
