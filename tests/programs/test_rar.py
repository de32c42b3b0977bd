"""The program on a small catalogue, with a generator that has half learned it and an encoder that
nobody trained: 15 products in two listings each to find one another."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from joined import run_all
from workdirs import check_bit_equal, lines, logged, state_of, stopped

from afmrl_jax import runner
from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import EncoderOptions, GeneratorOptions
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.attributes.text import parse
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints
from afmrl_jax.checkpoints.state import abstract_state, init_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.answers import question_and_answer
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.losses.language import answer_cross_entropy
from afmrl_jax.models.presets import preset

SIZES = {"workers": 0, "max_patches": 16, "min_pixels": 256, "max_pixels": 1024}
TEXTS = ["system user assistant color: type: red green blue grey mug shirt lamp shoe hat new"] * 4


def small(config, catalogue_folder, cache_dir):
    config.data.update(path=str(catalogue_folder), cache_dir=cache_dir, **SIZES)
    config.model.dtype = "float32"
    return config


def write_checkpoint(folder, made, config, params):
    mesh = make_mesh(dict(config.mesh))
    abstract = abstract_state(abstract_params(made, mesh), optax.sgd(0.1), mesh)
    state = init_state(params, optax.sgd(0.1), abstract)
    with Checkpoints(folder / "checkpoints", writable=True) as checkpoints:
        record = made.record() | {"config": config.to_json()}
        checkpoints.save(state, record, 0, None)


def half_learned(generator, config):
    """Parameters that know the format and the kinds, and guess at colours."""
    catalog = open_catalogue(CatalogOptions.of(config), Path())
    processor, graph, adam = generator.processor(answers=True), generator.graph(), optax.adam(3e-3)
    rows = processor(
        [question_and_answer(catalog, int(i), processor) for i in catalog.indices("train")]
    )

    def loss(params):
        model = nnx.merge(graph, params)
        total, count = answer_cross_entropy(
            model(rows), model.logits, rows["tokens"], rows["answer_mask"], 64
        )
        return total / count

    @jax.jit
    def step(params, moments):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = adam.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, value

    params = jax.jit(lambda: generator.init_params(0))()
    moments, value = adam.init(params), 9.0
    while value > 0.25:
        params, moments, value = step(params, moments)
    return params


@pytest.fixture(scope="module")
def models(catalogue_folder, cache_dir, tmp_path_factory):
    """The workdirs of a generator and of an encoder that nobody trained, each of one layer."""
    from afmrl_jax.configs import agcl, sft

    folder = tmp_path_factory.mktemp("models")
    tokenizer, tiny = train_tokenizer(TEXTS, 340), preset("tiny")
    config = tiny.replace(
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        text=dataclasses.replace(tiny.text, num_layers=1),
        vocab_size=tokenizer.get_vocab_size(),
        **special_token_ids(tokenizer),
    )
    settings = small(agcl.get_config(), catalogue_folder, cache_dir)
    settings.data.max_tokens = 40
    encoder = Encoder(EncoderOptions.of(settings), config, tokenizer)
    write_checkpoint(folder / "encoder", encoder, settings, lambda: encoder.init_params(0))
    settings = small(sft.get_config(), catalogue_folder, cache_dir)
    settings.data.update(max_tokens=64, max_answer=16, instruction="color type")
    generator = Generator(GeneratorOptions.of(settings), config, tokenizer)
    params = half_learned(generator, settings)
    write_checkpoint(folder / "generator", generator, settings, params)
    return folder


@pytest.fixture
def config(models, catalogue_folder, cache_dir):
    """configs/rar.py at its smallest, in one process."""
    from afmrl_jax.configs.rar import get_config

    config = small(get_config(), catalogue_folder, cache_dir)
    config.update(generator=str(models / "generator"), encoder=str(models / "encoder"))
    config.update(steps=4, queries=8, samples=4, micro_batches=2, rollouts_every=2)
    config.update(eval_every=2, checkpoint_every=2)
    config.reward.batch = 20
    config.eval.batch = 4
    config.watch.update(copied=1.0, held_out_gain=-2.0)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the run that the first test makes."""
    return tmp_path_factory.mktemp("rar")


@pytest.fixture
def run(config, folder):
    """The workdir of a run that nothing stopped."""
    if not (folder / "run").exists():
        runner.run(config, folder / "run")
    return folder / "run"


def test_a_run_leaves_all_that_it_promises(config, folder, capsys):
    runner.run(config, folder / "run")
    told = capsys.readouterr().out
    rows = logged(folder / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    promised = {"reward", "reward_std", "zero_variance", "recall@1", "mrr", "margin", "gain", "kl"}
    promised |= {"clip_share", "entropy", "answer_tokens", "valid", "verdict_malformed"}
    promised |= {"sampler_difference", "watch_copied", "watch_leaked", "watch_pair_diversity"}
    parts = ("rollout", "parse", "embed", "search", "update")
    assert promised | {f"seconds_{part}" for part in parts} <= set(rows[0])
    assert rows[0]["kl"] < 1e-9 and rows[-1]["kl"] > 1e-9  # it begins as the reference
    assert all(row["sampler_difference_max"] < 1e-4 and row["ratio_max"] == 1 for row in rows)
    assert {"validation", "validation_gain", "validation_over_sft", "validation_f1"} <= set(rows[1])

    groups = lines(folder / "run" / "rollouts.jsonl")
    assert [group["step"] for group in groups] == [
        n for n in (1, 2, 3, 4) for _ in range(4)
    ]  # every second
    assert all(len(group["answers"]) == 4 for group in groups)
    results = json.loads((folder / "run" / "evaluation.json").read_text())
    arms = ["plain", "sft", "sft_sure", "rar", "rar_sure", "oracle"]
    assert list(results["arms"]) == arms and results["split"] == "test"
    assert set(results["least_confidence"]) == {"sft_sure", "rar_sure"}
    found = {arm: scores["margin"] for arm, scores in results["arms"].items()}
    paired = results["differences"]["rar - sft"]
    assert paired["margin"] == pytest.approx(found["rar"] - found["sft"])
    assert "margin_ci95" in paired and "| rar - sft " in told
    assert len(list((folder / "run" / "gallery").glob("*.npy"))) == 3  # train, validation, test


def test_a_run_killed_and_started_again_gives_the_same_rollouts_and_parameters(
    config, run, tmp_path
):
    """What is left of one that died in its third step, when rollouts had been written."""
    killed = stopped(run, tmp_path / "killed")
    (killed / "evaluation_before.json").unlink()  # as where checkpoints outlived their workdir
    with (killed / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "listi')
    config.rollouts_every = 2
    config.watch.copied = 0.999  # this one may change
    runner.run(config, killed)
    check_bit_equal(run, killed)
    for name in ("rollouts.jsonl", "evaluation.json"):
        assert (run / name).read_text() == (killed / name).read_text()
    rewards = [[row["reward"] for row in logged(f)] for f in (run, killed)]
    assert rewards[0] == rewards[1]


def test_two_processes_see_what_one_sees(config, command, run, tmp_path):
    """The same answers, rewards and gradients."""
    config.mesh.data = 2
    run_all(command(config, tmp_path / "two"), 2)
    ours, theirs = (logged(workdir) for workdir in (run, tmp_path / "two"))
    for name in ("reward", "reward_std", "gradient_norm", "kl", "answer_tokens", "validation"):
        found = [[row.get(name, 0) for row in rows] for rows in (ours, theirs)]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6, err_msg=name)
    ours, theirs = (lines(workdir / "rollouts.jsonl") for workdir in (run, tmp_path / "two"))
    for one, group in zip(ours, theirs, strict=True):
        assert [a["answer"] for a in one["answers"]] == [a["answer"] for a in group["answers"]]


def test_a_run_that_looks_like_cheating_stops_with_its_rollouts(config, tmp_path):
    config.watch.answer_diversity = 1.0  # no word in common between any answers
    config.rollouts_every = 0
    with pytest.raises(UserError, match=r"step 1: These rollouts look like reward hacking.*\n  '"):
        runner.run(config, tmp_path / "stopped")
    assert len(lines(tmp_path / "stopped" / "rollouts.jsonl")) == 8  # all groups of that step
    assert not list((tmp_path / "stopped" / "checkpoints").glob("[0-9]*"))


def test_adapters_on_the_generator_begin_as_it_and_are_found_again(config, tmp_path):
    config.update(steps=2, micro_batches=1, inner_epochs=2, eval_every=0, checkpoint_every=1)
    config.model.lora_rank = 2
    config.policy.update(objective="dr_grpo", credit="pairs", credit_checks=4)
    runner.run(config, tmp_path / "adapters")
    rows = logged(tmp_path / "adapters")
    assert all(-1 <= row["credit_correlation"] <= 1 for row in rows)
    groups = lines(tmp_path / "adapters" / "rollouts.jsonl")
    for answer in (answer for group in groups for answer in group["answers"]):
        pairs = parse(answer["answer"]).attributes if answer["verdict"] == "valid" else {}
        assert answer.get("pair_advantages", {}).keys() == pairs.keys()
    # Told of the second epoch, when the first has moved a little from what they began as.
    assert 0 < rows[0]["kl"] < 0.01 and rows[0]["ratio_max"] > 1
    trained = [name for name in state_of(tmp_path / "adapters") if name.startswith("params.")]
    assert trained and all("lora_" in name for name in trained)
    source = find_pretrained(str(tmp_path / "adapters"), Generator)
    assert source.model.options.rows.max_answer == 16  # as SFT's: this configuration says 56
    mesh = make_mesh(dict(config.mesh))
    with jax.set_mesh(mesh):
        merged = source.load(abstract_params(source.model, mesh))
        before = find_pretrained(config.generator, Generator)
        before = before.load(abstract_params(before.model, mesh))
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (merged, before)))]
    assert any(moved) and not all(moved)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("generator", "", "--config.generator=runs/sft"),
        ("encoder", "", "--config.encoder=runs/agcl"),
        ("generator", "encoder", "holds the encoder of a run"),
        ("micro_batches", 3, "micro_batches is 3, which does not divide the queries of 8"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_sentence(config, models, tmp_path, field, value, says):
    config[field] = str(models / value) if value == "encoder" else value
    with pytest.raises(UserError, match=says):
        runner.run(config, tmp_path / "run")


def test_a_changed_configuration_is_refused(config, run):
    """Other queries could not be paired with those that were judged before training."""
    before, config.policy.kl = config.policy.kl, 0.5
    config.eval.listings += 1
    told = f"eval.listings was .*; policy.kl was {before} and is now 0.5"
    with pytest.raises(UserError, match=told):
        runner.run(config, run)


def pairs_named(completions, queries, retrieved):
    """A reward of a user's module."""
    return np.array([len(answer.attributes) for answer in completions], np.float32)


def constant(completions, queries, retrieved):
    """Another one."""
    return np.zeros(len(completions), np.float32)


def test_a_reward_of_a_user_s_module_is_learned_from_and_what_is_found_measured_as_ever(
    config, run, tmp_path
):
    config.update(steps=2, rollouts_every=1)
    config.reward.function = f"{__name__}:pairs_named"
    runner.run(config, tmp_path / "own")
    groups = lines(tmp_path / "own" / "rollouts.jsonl")
    for group in groups:
        for answer in group["answers"]:
            pairs = float(len(parse(answer["answer"]).attributes))
            valid = answer["verdict"] == "valid"
            assert answer["reward"] == (pairs if valid else -0.02)
    ours, theirs = (logged(folder) for folder in (tmp_path / "own", run))
    # Nobody has learned yet, so that the answers are the same.
    for name in ("recall@1", "mrr", "margin", "gain", "valid", "answer_tokens"):
        assert ours[0][name] == theirs[0][name]
    assert ours[0]["reward"] != theirs[0]["reward"]
    assert {"validation", "validation_gain", "validation_over_sft"} <= set(ours[1])
    results = json.loads((tmp_path / "own" / "evaluation.json").read_text())
    assert {"plain", "sft", "rar", "oracle"} <= set(results["arms"])
    config.reward.function = f"{__name__}:constant"
    with pytest.raises(
        UserError, match=r"reward\.function was .*pairs_named.* and is now .*constant"
    ):
        runner.run(config, tmp_path / "own")
