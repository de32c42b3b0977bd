"""The policy gradient's compiled parts, on a generator of one layer that reads no photos."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.options import GeneratorOptions, TrainingOptions
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.processor import Row
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.lora import join
from afmrl_jax.models.presets import preset
from afmrl_jax.rl.advantages import group_advantages
from afmrl_jax.rl.policy import PolicyOptions, build
from afmrl_jax.training.run import fresh_params

Q, G = 4, 8
HOST = np.zeros((1, 4), np.float32)


@pytest.fixture
def config():
    from afmrl_jax.configs.rar import get_config

    config = get_config()
    config.update(steps=40, queries=Q, samples=G)
    config.data.update(max_tokens=64, max_answer=3, instruction="", max_patches=4)
    config.optimizer.update(learning_rate=1e-2, final_share=1.0, weight_decay=0.1)
    return config


def made(config):
    """(mesh, built, state at step 0, frozen, reference), as the program puts them together."""
    tokenizer = train_tokenizer(["system user assistant", "You are a helpful assistant."] * 4, 320)
    tiny = preset("tiny")
    model_config = tiny.replace(
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        text=dataclasses.replace(tiny.text, num_layers=1),
        vocab_size=tokenizer.get_vocab_size(),
        **special_token_ids(tokenizer),
    )
    base = Generator(GeneratorOptions.of(config), model_config, tokenizer)
    generator = base.for_training(TrainingOptions.of(config))
    mesh = make_mesh(dict(config.mesh))
    params = jax.jit(lambda: base.init_params(0))()
    built = build(PolicyOptions.of(config), mesh, generator)
    if generator.lora:
        adapters = functools.partial(fresh_params, generator, config.seed)
        return generator, mesh, built, built.update.initial(adapters), params, params
    copy = jax.tree.map(lambda x: x.copy(), params)
    return generator, mesh, built, built.update.initial(params), {}, copy


def updated(built, frozen, state, rows, answers):
    """(state, metrics) after the one update of a step."""
    batch = {"rows": rows, "answers": answers, "host": HOST}
    return built.update.function(frozen, state, batch)


def rows_of(config, generator):
    shown = [Row(text) for text in ("red", "mug", "", "a red mug")]
    processor = generator.processor(answers=False)
    rows = processor(shown, [processor.text_bucket])
    sizes = config.micro_batches, Q // config.micro_batches
    return {k: v.reshape(*sizes, *v.shape[1:]) for k, v in rows.items()}


def drawn(built, state, frozen, reference, rows, step, reward):
    """Answers of one step with all that the update reads, [Q, G, ...], and their mean reward.

    reward: tokens int32[Q, G, T] -> float[Q, G].
    """
    samples = built.rollout(join(state.params, frozen), rows, step)
    samples = jax.tree.map(np.asarray, samples)
    rewards = reward(samples.tokens)
    advantages = group_advantages(rewards, scale=True)
    answers = {
        "tokens": samples.tokens,
        "mask": samples.mask,
        "truncated": samples.truncated,
        "sampler_log_probs": samples.log_probs,
        "advantages": np.repeat(advantages.values[..., None], samples.mask.shape[-1], axis=-1),
        "zero_variance": np.repeat(advantages.zero_variance, G).reshape(Q, G),
    }
    micro_batches = len(rows["tokens"])
    answers = {
        k: v.reshape(micro_batches, Q // micro_batches, *v.shape[1:]) for k, v in answers.items()
    }
    answers["reference_log_probs"] = built.reference(reference, rows, answers)
    return answers, rewards.mean()


def constant(tokens):
    return np.ones(tokens.shape[:2], np.float32)


def fourth(tokens):
    return (tokens[:, :, 0] % 4 == 1).astype(np.float32)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_a_toy_reward_is_learned_and_a_constant_one_changes_nothing_at_all(config):
    """Answers that begin with one token in four are right: about a quarter of them, untrained."""
    config.model.lora_rank = 4
    generator, mesh, built, state, frozen, reference = made(config)
    rows, before = rows_of(config, generator), leaves((state.params, state.opt_state))
    with jax.set_mesh(mesh):
        answers, _ = drawn(built, state, frozen, reference, rows, 0, constant)
        state, metrics = updated(built, frozen, state, rows, answers)
        assert metrics["skipped"] == 1 and metrics["gradient_norm"] == 0
        for one, other in zip(leaves((state.params, state.opt_state)), before):
            np.testing.assert_array_equal(one, other)
        assert state.step == 1  # the next one asks about other queries
        seen = []
        for step in range(1, 40):
            answers, reward = drawn(built, state, frozen, reference, rows, step, fourth)
            state, metrics = updated(built, frozen, state, rows, answers)
            seen.append(float(reward))
            if step == 1:
                # The sampler and the update see one policy, which is still the reference.
                assert metrics["sampler_difference_max"] < 1e-4 and metrics["kl"] < 1e-9
                assert metrics["ratio_max"] == 1
    assert seen[0] < 0.6 and np.mean(seen[-3:]) > 0.95, seen
    assert metrics["kl"] > 0.01


def test_micro_batches_have_the_gradient_of_the_whole(config):
    generator, mesh, built, state, frozen, reference = made(config)
    rows = rows_of(config, generator)
    with jax.set_mesh(mesh):
        answers, _ = drawn(built, state, frozen, reference, rows, 0, fourth)
        parts = [
            {k: np.asarray(v).reshape(2, Q // 2, *v.shape[2:]) for k, v in x.items()}
            for x in (rows, answers)
        ]
        other = jax.tree.map(lambda x: x.copy(), state)
        _, whole = updated(built, frozen, state, rows, answers)
        _, in_parts = updated(built, frozen, other, *parts)
    assert whole["gradient_norm"] > 0
    for name in ("gradient_norm", "loss", "entropy", "answer_tokens"):
        np.testing.assert_allclose(in_parts[name], whole[name], rtol=1e-4, atol=1e-6)
