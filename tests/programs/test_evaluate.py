import pytest

from afmrl_jax import main
from afmrl_jax.core.errors import UserError


@pytest.fixture
def config(agcl_config):
    from configs.evaluate import get_config

    config = get_config()
    config.data.update(path=agcl_config.data.path, cache_dir=agcl_config.data.cache_dir)
    return config


def test_a_checkpoint_must_be_named_and_must_be_one(config, tmp_path):
    with pytest.raises(UserError, match=r"as --config\.checkpoint=runs/agcl"):
        main.run(config, tmp_path / "w")
    for number, name in enumerate(["nowhere", "2024"]):
        (tmp_path / "2024").mkdir(exist_ok=True)
        config.checkpoint = str(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} holds no whole checkpoint"):
            main.run(config, tmp_path / f"w{number}")


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
