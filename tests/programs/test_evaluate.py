import json
import shutil

import pytest

from afmrl_jax import main
from afmrl_jax.core.errors import UserError
from afmrl_jax.training.pretrained import RECORD


@pytest.fixture
def config(agcl_config):
    from configs.evaluate import get_config

    config = get_config()
    config.data.update(path=agcl_config.data.path, cache_dir=agcl_config.data.cache_dir)
    return config


def test_a_checkpoint_must_be_named_and_must_be_one(config, tmp_path):
    with pytest.raises(UserError, match=r"as --config\.checkpoint=runs/agcl"):
        main.run(config, tmp_path / "w")
    for name, told in [("nowhere", "nowhere: no such folder"), ("2024", "no whole checkpoint")]:
        (tmp_path / "2024").mkdir(exist_ok=True)
        config.checkpoint = str(tmp_path / name)
        with pytest.raises(UserError, match=told):
            main.run(config, tmp_path / "w")


def test_scores_never_replace_a_run_s_files(config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config.checkpoint = str(tmp_path / "run")
    with pytest.raises(UserError, match="holds a training run"):
        main.run(config, tmp_path / "run")


def test_a_task_that_does_not_exist_is_refused_before_anything_is_read(config, tmp_path):
    config.checkpoint = str(tmp_path / "nowhere")
    config.eval.tasks = "imag->text"
    with pytest.raises(UserError, match='did you mean "image->text"'):
        main.run(config, tmp_path / "w")


@pytest.fixture
def folder(agcl_config, whole):
    """A finished run's export."""
    from configs.export import get_config

    out = whole.parent / "exported"
    if not out.exists():
        main.run(agcl_config, whole)
        export = get_config()
        export.update(checkpoint=str(whole), out=str(out))
        main.run(export, whole.parent / "w")
    return out


def judged(config, checkpoint, workdir):
    config.checkpoint = str(checkpoint)
    main.run(config, workdir)
    return json.loads((workdir / "evaluation.json").read_text())


def test_an_exported_folder_scores_as_its_run_does(config, agcl_config, whole, folder, tmp_path):
    """As it is, and as any Hugging Face folder, whose settings are this configuration's."""
    config.eval.update(batch=8, tasks=agcl_config.eval.tasks)
    ran = json.loads((whole / "evaluation.json").read_text())
    assert judged(config, folder, tmp_path / "own") == ran
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / RECORD).unlink()
    names = ("max_tokens", "max_patches", "min_pixels", "max_pixels")
    config.data.update({name: agcl_config.data[name] for name in names})
    config.model.dtype = "float32"
    assert judged(config, bare, tmp_path / "bare scores") == ran


def spoil(folder, case):
    weights = folder / "model.safetensors"
    if case == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "config":
        (folder / "config.json").unlink()
    elif case == "architecture":
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"model_type": "bert"}))
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif case == "record":
        (folder / RECORD).write_text("[]")
    else:
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "b.safetensors"}}'
        )


@pytest.mark.parametrize(
    "case, told",
    [
        ("tokenizer", r"folder holds no tokenizer: neither tokenizer\.json nor"),
        ("config", r"folder has no config\.json"),
        ("architecture", r"config\.json.*bert.*qwen2_vl"),
        ("truncated", r"model\.safetensors: not a whole safetensors file"),
        ("record", r"afmrl_jax\.json is no record of a run"),
        ("shard", r"b\.safetensors: not found"),
    ],
)
def test_a_broken_folder_is_told_by_its_file(config, folder, tmp_path, case, told):
    shutil.copytree(folder, tmp_path / "folder")
    spoil(tmp_path / "folder", case)
    config.checkpoint = str(tmp_path / "folder")
    with pytest.raises(UserError, match=told):
        main.run(config, tmp_path / "w")
