"""What generated answers, and the log-probs beside them, must and must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import devices
from flax import nnx

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import batch_sharding, make_mesh
from afmrl_jax.data.tokenizer import train_tokenizer
from afmrl_jax.models import sampler
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.sampler import Sampling, forbidden_ids, generate, sample_keys, sampling_logits

TINY = preset("tiny")
CONFIG = TINY.replace(
    vocab_size=96, initializer_range=0.15, vision=dataclasses.replace(TINY.vision, num_layers=1)
)
GRAPH, PARAMS = nnx.split(QwenVL(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
FORBIDDEN = (CONFIG.vision_start_token_id, CONFIG.vision_end_token_id, CONFIG.image_token_id)
N, G, S, T = 4, 3, 20, 12
# A tenth of the ids end an answer, so that some rows stop early and some never do.
SAMPLING = Sampling(max_new_tokens=T, stop=tuple(range(5, 15)), forbidden=FORBIDDEN)


@pytest.fixture
def rows(random_rows):
    return random_rows(CONFIG, n=N, s=S, p=16)


@pytest.fixture
def keys():
    return sample_keys(jax.random.key(0), range(N), G)


def numpy(answers):
    return {field: np.asarray(value) for field, value in vars(answers).items()}


def same(ours, theirs):
    """Equal tokens and masks, log-probs to 1e-4."""
    for name, value in numpy(ours).items():
        np.testing.assert_allclose(value, numpy(theirs)[name], atol=1e-4, err_msg=name)


def padded_left(rows):
    left = dict(rows)
    for name in ("tokens", "token_mask", "positions"):
        left[name] = np.stack(
            [
                np.roll(row, S - mask.sum(), axis=-1)
                for row, mask in zip(rows[name], rows["token_mask"])
            ]
        )
    return left


def with_answers(rows, answers, sample):
    """The prompts and one answer to each as a trainer gives them to the model."""
    tokens, mask = np.asarray(answers.tokens)[:, sample], np.asarray(answers.mask)[:, sample]
    end = np.where(rows["token_mask"][:, None], rows["positions"], -1).max((1, 2)) + 1
    positions = np.broadcast_to((end[:, None] + np.arange(T))[:, None], (N, 3, T))
    return {
        **rows,
        "tokens": np.concatenate([rows["tokens"], tokens], 1),
        "token_mask": np.concatenate([rows["token_mask"], mask], 1),
        "positions": np.concatenate([rows["positions"], positions], 2).astype(np.int32),
    }


@jax.jit
def log_probs(rows):
    model = nnx.merge(GRAPH, PARAMS)
    return jax.nn.log_softmax(model.logits(model(rows)))


def test_log_probs_are_the_full_forward_s(rows, keys):
    answers = generate(GRAPH, PARAMS, rows, keys, SAMPLING)
    last = S - 1 - np.argmax(rows["token_mask"][:, ::-1], axis=1)
    reads = np.concatenate([last[:, None], np.tile(np.arange(S, S + T - 1), (N, 1))], 1)
    for sample in range(G):
        all_ids = np.asarray(log_probs(with_answers(rows, answers, sample)))
        wanted = all_ids[np.arange(N)[:, None], reads, np.asarray(answers.tokens)[:, sample]]
        mask = np.asarray(answers.mask)[:, sample]
        assert np.abs(np.asarray(answers.log_probs)[:, sample] - wanted)[mask].max() <= 1e-4


def test_each_answer_ends_with_its_first_stop_token_or_is_marked_as_truncated(rows, keys):
    found = numpy(generate(GRAPH, PARAMS, rows, keys, SAMPLING))
    lengths = set()
    for row in np.ndindex(N, G):
        tokens, mask = found["tokens"][row], found["mask"][row]
        stops = np.flatnonzero(np.isin(tokens, SAMPLING.stop))
        length = stops[0] + 1 if len(stops) else T
        lengths.add(length)
        assert mask.sum() == length and mask[:length].all()
        assert found["truncated"][row] == (not len(stops))
        assert (tokens[length:] == SAMPLING.pad).all()
        for name in ("log_probs", "sampling_log_probs"):
            assert (found[name][row][:length] < 0).all() and (found[name][row][length:] == 0).all()
    assert len(lengths) > 3 and found["truncated"].any() and not found["truncated"].all()


def test_the_loop_ends_when_all_answers_have(rows, keys):
    mask = numpy(generate(GRAPH, PARAMS, rows, keys, SAMPLING))["mask"]
    prompts = sampler.prefill(GRAPH, PARAMS, rows, keys, SAMPLING)
    longest = mask.all(-1)
    prompts = dataclasses.replace(prompts, done=prompts.done | longest)
    end = sampler.decode(GRAPH, PARAMS, prompts, SAMPLING)
    assert 1 < int(end.step) == mask[~longest].sum(-1).max() < T


def test_samples_of_one_prefill_equal_separate_runs_and_other_batches(rows, keys):
    together = generate(GRAPH, PARAMS, rows, keys, SAMPLING)
    alone = generate(GRAPH, PARAMS, rows, keys[:, 1:2], SAMPLING)
    same(jax.tree.map(lambda x: x[:, 1:2], together), alone)
    order = [2, 0, 3, 1]
    shuffled = {name: array[order] for name, array in rows.items()}
    others = generate(GRAPH, PARAMS, shuffled, sample_keys(jax.random.key(0), order, G), SAMPLING)
    same(jax.tree.map(lambda x: x[jnp.asarray(order)], together), others)
    tokens = np.asarray(together.tokens)
    assert (tokens[:, 0] != tokens[:, 1]).any(-1).all()


def test_the_padded_side_changes_nothing_and_an_empty_row_gets_no_answer(rows, keys):
    right = generate(GRAPH, PARAMS, rows, keys, SAMPLING)
    left = padded_left(rows)
    left["token_mask"][3] = False
    answers = generate(GRAPH, PARAMS, left, keys, SAMPLING)
    same(jax.tree.map(lambda x: x[:3], answers), jax.tree.map(lambda x: x[:3], right))
    assert not answers.mask[3].any() and not answers.truncated[3].any()


def test_calls_of_equal_shapes_compile_once(rows, keys):
    generate(GRAPH, PARAMS, rows, keys, SAMPLING)
    compiled = sampler.prefill._cache_size(), sampler.decode._cache_size()
    changed = {**rows, "tokens": rows["tokens"] % 50}
    again = sample_keys(jax.random.key(1), range(N), G)
    generate(GRAPH, PARAMS, changed, again, Sampling(**vars(SAMPLING)))
    assert (sampler.prefill._cache_size(), sampler.decode._cache_size()) == compiled


def test_draws_follow_the_tempered_distribution_without_forbidden_ids(rows):
    """4,096 first tokens of one prompt, its most probable ids forbidden."""
    rows = {name: array[:1] for name, array in rows.items()}
    policy = np.asarray(log_probs(rows))[0, rows["token_mask"].sum() - 1]
    forbidden = tuple(int(i) for i in np.argsort(-policy)[:3])
    sampling = Sampling(max_new_tokens=1, stop=(), forbidden=forbidden, temperature=0.7)
    keys = sample_keys(jax.random.key(3), [0], 4096)
    first = numpy(sampler.samples_of(sampler.prefill(GRAPH, PARAMS, rows, keys, sampling)))
    tokens = first["tokens"].ravel()

    tempered = np.exp(policy / 0.7)
    tempered[list(forbidden)] = 0
    tempered /= tempered.sum()
    assert not set(tokens) & set(forbidden)
    frequency = np.bincount(tokens, minlength=len(policy)) / 4096
    assert np.abs(frequency - tempered).max() < 4 * (0.25 / 4096) ** 0.5
    np.testing.assert_allclose(first["log_probs"].ravel(), policy[tokens], atol=1e-5)
    np.testing.assert_allclose(
        first["sampling_log_probs"].ravel(), np.log(tempered[tokens]), atol=1e-5
    )
    assert first["truncated"].all()


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"forbidden": (0,)}, [0, 3 / 6, 2 / 6, 1 / 6]),
        ({"forbidden": (0,), "temperature": 0.5}, [0, 9 / 14, 4 / 14, 1 / 14]),
    ],
)
def test_the_distribution_drawn_from_equals_numbers_worked_by_hand(options, wanted):
    sampling = Sampling(max_new_tokens=1, stop=(), **options)
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1])) - 5
    for order in ([0, 1, 2, 3], [0, 3, 1, 2]):
        found = jax.nn.softmax(sampling_logits(logits[jnp.asarray(order)], sampling))
        np.testing.assert_allclose(found, np.asarray(wanted)[order], atol=1e-6)
        if "forbidden" in options:
            break


@pytest.mark.parametrize(
    "options, told",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": (4,), "forbidden": (4, 5)}, "without any forbidden id"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(UserError, match=told):
        Sampling(**{"max_new_tokens": 1, "stop": (), **options})


def test_ids_outside_the_vocabulary_are_told(rows, keys):
    with pytest.raises(UserError, match=r"stop ids \[96\].*vocabulary of 96"):
        generate(GRAPH, PARAMS, rows, keys, Sampling(max_new_tokens=1, stop=(1, 96)))


def test_vision_tokens_and_ids_without_a_token_are_forbidden():
    tokenizer = train_tokenizer([], 270)
    size = tokenizer.get_vocab_size()
    forbidden = forbidden_ids(tokenizer, size + 2)
    named = {tokenizer.id_to_token(i) for i in forbidden[:-2]}
    assert {"<|image_pad|>", "<|vision_start|>", "<|vision_end|>"} <= named
    assert forbidden[-2:] == (size, size + 1)
    assert all("vision" in name or "image" in name or "video" in name for name in named)


def test_eight_devices_give_the_answers_of_one(rows, keys):
    wanted = numpy(generate(GRAPH, PARAMS, rows, keys, SAMPLING))
    params, keys = jax.tree.map(np.asarray, PARAMS), np.asarray(jax.random.key_data(keys))
    with devices(8):
        mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 2, "tensor": 2})
        params = jax.device_put(params, param_shardings(params, mesh))
        with jax.set_mesh(mesh):
            split = batch_sharding(mesh)
            rows, keys = jax.device_put((rows, jax.random.wrap_key_data(keys)), split)
            state = sampler.prefill(GRAPH, params, rows, keys, SAMPLING)
            for keys_or_values in (state.cache[0][0], state.prompt_cache[1][1]):
                part = keys_or_values.addressable_shards[0].data.shape
                assert part == (1, 1, *keys_or_values.shape[2:])
            answers = sampler.samples_of(sampler.decode(GRAPH, params, state, SAMPLING))
            found = numpy(answers)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-4, err_msg=name)
