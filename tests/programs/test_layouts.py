"""One run, whatever the devices and processes: the same losses."""

import json
import shutil

import numpy as np
import pytest
from joined import run_all

QUICK = True
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def losses(command, config, workdir, processes=1, env=None):
    """Runs to the end in `processes` processes; the losses by step."""
    run_all(command(config, workdir), processes, env)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=4, batch=8, eval_every=0, checkpoint_every=2)
    agcl_config.loss.head_weight = 0.5  # its parameters and labels lie on the mesh as well
    return agcl_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the run of one device is; made by whichever test is first."""
    return tmp_path_factory.mktemp("layouts") / "one"


def one_device(command, config, folder):
    if not folder.exists():
        losses(command, config, folder)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


def test_eight_devices_go_on_from_one_device_s_checkpoint_with_its_losses(
    config, command, folder, tmp_path
):
    """The first two steps on one device, the others on a mesh of 2 x 2 x 2."""
    wanted = one_device(command, config, folder)
    shutil.copytree(folder, tmp_path / "eight")
    shutil.rmtree(tmp_path / "eight" / "checkpoints" / "4")
    (tmp_path / "eight" / "evaluation.json").unlink()
    config.mesh.update(data=2, fsdp=2, tensor=2)
    eight = losses(command, config, tmp_path / "eight", env=EIGHT)
    assert len(eight) == 4
    np.testing.assert_allclose(eight, wanted, atol=1e-5)


def test_four_processes_and_the_two_that_go_on_learn_answers_with_the_losses_of_one(
    agcl_config, command, tmp_path
):
    """SFT on the same small catalogue; the model it ends with is judged on one listing."""
    from afmrl_jax.configs.sft import get_config

    config = get_config()
    shared = {name: agcl_config.data[name] for name in config.data if name in agcl_config.data}
    config.data.update(shared | {"max_tokens": 48, "max_answer": 16, "instruction": ""})
    config.data.buckets = 2  # all processes must know all rows' lengths
    config.model.update(vocab_size=320, dtype="float32")
    config.update(steps=3, batch=8, micro_batches=2, log_every=1, eval_every=0, checkpoint_every=2)
    config.eval.update(batch=4, validation_listings=1, samples=1)
    one = losses(command, config, tmp_path / "one")
    config.mesh.data = 4
    four = losses(command, config, tmp_path / "four", processes=4)
    shutil.copytree(tmp_path / "four", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "3")
    (tmp_path / "two" / "evaluation.json").unlink()
    config.mesh.data = 2
    two = losses(command, config, tmp_path / "two", processes=2)
    assert len(one) == 3
    np.testing.assert_allclose([four, two], [one, one], atol=1e-5)
    names = ("one", "four", "two")
    samples = [(tmp_path / which / "samples.jsonl").read_text() for which in names]
    assert samples[0] == samples[1] == samples[2]  # told once, and the same
