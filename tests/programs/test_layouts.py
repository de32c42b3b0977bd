"""One run, whatever the devices and processes: the same losses."""

import json
import shutil

import numpy as np
import pytest
from devices import devices
from joined import run_all

from afmrl_jax import runner
from afmrl_jax.configs import sft


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


def as_it_was(workdir, last, copy):
    """A copy of a run that had not yet saved its last step."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(last))
    (copy / "evaluation.json").unlink()
    return copy


@pytest.fixture
def config(agcl_config):
    agcl_config.update(steps=4, batch=8, eval_every=0, checkpoint_every=2)
    agcl_config.loss.head_weight = 0.5  # its parameters and labels lie on the mesh as well
    return agcl_config


def test_eight_devices_go_on_from_one_device_s_checkpoint_with_its_losses(config, tmp_path):
    """The first two steps on one device, the others on a mesh of 2 x 2 x 2."""
    runner.run(config, tmp_path / "one")
    eight = as_it_was(tmp_path / "one", 4, tmp_path / "eight")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    with devices(8):
        runner.run(config, eight)
    assert len(losses(eight)) == 4
    np.testing.assert_allclose(losses(eight), losses(tmp_path / "one"), atol=1e-5)


@pytest.mark.slow  # two processes of rar, annotate and toy.py are in the quick suite
def test_two_processes_learn_answers_with_the_losses_of_one(agcl_config, command, tmp_path):
    """SFT on the same small catalogue; the model it ends with is judged on one listing."""
    config = sft.get_config()
    shared = {name: agcl_config.data[name] for name in config.data if name in agcl_config.data}
    config.data.update(shared | {"max_tokens": 48, "max_answer": 16, "instruction": ""})
    config.data.buckets = 2  # all processes must know all rows' lengths
    config.model.update(vocab_size=320, dtype="float32")
    config.update(steps=2, batch=8, micro_batches=2, log_every=1, eval_every=0)
    config.eval.update(batch=4, validation_listings=1, samples=1)
    runner.run(config, tmp_path / "one")
    config.mesh.data = 2
    run_all(command(config, tmp_path / "two"), 2)
    workdirs = tmp_path / "one", tmp_path / "two"
    assert len(losses(workdirs[0])) == 2
    np.testing.assert_allclose(losses(workdirs[1]), losses(workdirs[0]), atol=1e-5)
    samples = [(workdir / "samples.jsonl").read_text() for workdir in workdirs]
    assert samples[0] == samples[1]  # told once, and the same
