"""The program under LoRA: what is trained and saved, what stays, and what it stands on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from devices import devices
from flax import nnx
from workdirs import check_bit_equal, losses, state_of, stopped

from afmrl_jax import runner
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import EncoderOptions, TrainingOptions
from afmrl_jax.assembly.pretrained import Base, read_base
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models import lora
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.presets import preset
from afmrl_jax.weights import hf_weights


def small_config(tokenizer):
    """The family whose layers come in groups, two of one layer each."""
    tiny = preset("tiny_qwen3")
    return tiny.replace(
        vision=dataclasses.replace(
            tiny.vision,
            hidden_size=32,
            num_heads=2,
            num_layers=2,
            mlp_size=64,
            deepstack_layers=(0,),
        ),
        text=dataclasses.replace(
            tiny.text,
            hidden_size=32,
            num_heads=2,
            num_kv_heads=1,
            num_layers=2,
            head_dim=16,
            mrope_sections=(2, 3, 3),
            mlp_size=64,
        ),
        vocab_size=tokenizer.get_vocab_size(),
        **special_token_ids(tokenizer),
    )


def write_base(folder, seed):
    """A Hugging Face folder of a model that nobody trained."""
    tokenizer = train_tokenizer(["red green blue grey mug shirt lamp shoe hat new"], 300)
    config = small_config(tokenizer)
    make = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Embedder(config, rngs=nnx.Rngs(seed)))))
    hf_weights.save(folder, make(), config)
    tokenizer.save(str(folder / "tokenizer.json"))


def scores(workdir, name="evaluation.json"):
    return json.loads((workdir / name).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the base, and the run that the first test makes."""
    folder = tmp_path_factory.mktemp("lora")
    write_base(folder / "base", seed=0)
    return folder


@pytest.fixture
def config(agcl_config, folder):
    agcl_config.update(steps=4, eval_every=0, checkpoint_every=2, init_from=str(folder / "base"))
    agcl_config.model.lora_rank = 2
    return agcl_config


@pytest.fixture
def adapted(config, folder):
    """The workdir of a run that nothing stopped."""
    if not (folder / "run").exists():
        runner.run(config, folder / "run")
    return folder / "run"


def test_only_adapters_are_trained_and_saved(adapted):
    arrays = {name: x for name, x in state_of(adapted).items() if x.ndim}
    projections = ("attention.query", "attention.key", "attention.value", "attention.out")
    projections += ("gate", "up", "down")
    own = {f"{group}.{p}.lora_{side}" for group in "01" for p in projections for side in "ab"}
    of_state = {name.partition("layers.")[2] for name in arrays}
    assert of_state == own and len(arrays) == 3 * len(own)  # parameters and both moments
    assert all(x.any() for x in arrays.values())  # B has left zero


def test_a_run_stopped_and_started_again_ends_bit_equal(config, adapted, tmp_path):
    runner.run(config, stopped(adapted, tmp_path / "stopped"))
    check_bit_equal(adapted, tmp_path / "stopped")
    assert scores(adapted) == scores(tmp_path / "stopped")


def test_eight_devices_go_on_with_the_losses_of_one(config, adapted, tmp_path):
    stopped(adapted, tmp_path / "eight")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    with devices(8):
        runner.run(config, tmp_path / "eight")
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(adapted), atol=1e-5)


def test_gradcache_trains_adapters_as_the_direct_step_does(config, adapted, tmp_path):
    config.micro_batches = 4
    runner.run(config, tmp_path / "micro_batches")
    np.testing.assert_allclose(losses(tmp_path / "micro_batches"), losses(adapted), rtol=1e-4)


def test_a_checkpoint_of_adapters_is_judged_and_trained_on_as_any_other(
    config, adapted, catalogue_folder, tmp_path
):
    from afmrl_jax.configs import evaluate

    judge = evaluate.get_config()
    judge.checkpoint = str(adapted)
    judge.data.cache_dir = config.data.cache_dir
    judge.eval.update(queries=str(catalogue_folder), batch=8, tasks=config.eval.tasks)
    runner.run(judge, tmp_path / "judged")
    assert scores(tmp_path / "judged") == scores(adapted)

    config.update(init_from=str(adapted), steps=1)  # adapters on a base that had adapters
    runner.run(config, tmp_path / "again")
    assert scores(tmp_path / "again", "evaluation_before.json") == scores(adapted)


def test_a_base_that_is_gone_or_another_is_refused(config, adapted, folder, tmp_path):
    base = folder / "base"
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"cannot be read\..*/base.*leave a link"):
        runner.run(config, adapted)
    write_base(base, seed=1)
    with pytest.raises(UserError, match="base gives other parameters than those"):
        runner.run(config, adapted)
    shutil.rmtree(base)
    base.symlink_to(tmp_path / "moved")
    runner.run(config, adapted)
    base.unlink()
    (tmp_path / "moved").rename(base)


def test_a_seed_is_a_base_like_any_other(agcl_config):
    agcl_config.model.lora_rank = 2
    tokenizer = train_tokenizer([], 270)
    options, training = EncoderOptions.of(agcl_config), TrainingOptions.of(agcl_config)
    enc = Encoder(options, small_config(tokenizer), tokenizer).for_training(training)
    mesh = make_mesh(dict(agcl_config.mesh))
    _, frozen = lora.split(abstract_params(enc, mesh))
    params, base = read_base(enc, frozen, Base(""))
    again, _ = read_base(enc, frozen, Base.of_record(base.record()))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
