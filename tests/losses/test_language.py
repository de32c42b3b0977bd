"""Chunked log-probs against the dense computation: values, gradients, memory, devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import devices
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from afmrl_jax.losses.language import answer_cross_entropy, token_log_probs
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL


def dense(hidden, head, tokens, temperature=1.0):
    log_probs = jax.nn.log_softmax((hidden @ head).astype(jnp.float32) / temperature)
    chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def random_case(rows=3, length=10, width=6, vocabulary=40, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    return hidden, head, rng.integers(0, vocabulary, (rows, length)).astype(np.int32)


def test_the_log_prob_and_entropy_of_a_distribution_worked_by_hand():
    head = np.log([[1.0, 2.0, 5.0]]).astype(np.float32)  # shares 1/8, 2/8, 5/8
    tokens = np.array([[2, 0]])
    found = jax.jit(lambda: token_log_probs(jnp.ones((1, 2, 1)), lambda x: x @ head, tokens, 1))
    log_probs, entropy = found()
    np.testing.assert_allclose(log_probs, [[np.log(5 / 8), np.log(1 / 8)]], rtol=1e-6)
    expected = -(1 / 8 * np.log(1 / 8) + 2 / 8 * np.log(2 / 8) + 5 / 8 * np.log(5 / 8))
    np.testing.assert_allclose(entropy, [[expected] * 2], rtol=1e-6)


@pytest.mark.parametrize(("chunk", "temperature"), [(4, 0.7), (64, 1.0)])
def test_chunks_equal_the_dense_computation_and_its_gradients(chunk, temperature):
    hidden, head, tokens = random_case()
    weights = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)

    def chunked(hidden, head):
        log_probs, entropy = token_log_probs(hidden, lambda x: x @ head, tokens, chunk, temperature)
        return jnp.sum(weights * log_probs), (log_probs, entropy)

    def expected(hidden, head):
        log_probs, entropy = dense(hidden, head, tokens, temperature)
        return jnp.sum(weights * log_probs), (log_probs, entropy)

    found, wanted = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
        for loss in (chunked, expected)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), found, wanted)


def test_masked_positions_give_zero_and_no_gradient_and_change_no_other():
    hidden, head, tokens = random_case()
    mask = np.zeros(tokens.shape, bool)
    mask[0, 2:4], mask[2, 8:] = True, True  # the chunk of positions 4 to 7 has none
    hidden[~mask] = 1e30  # would be inf or NaN where it was read

    def loss(hidden):
        log_probs, entropy = token_log_probs(hidden, lambda x: x @ head, tokens, 2, mask=mask)
        return log_probs.sum(), (log_probs, entropy)

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
    for value, wanted in zip(found, dense(jnp.where(mask[..., None], hidden, 0), head, tokens)):
        np.testing.assert_allclose(value, np.where(mask, wanted, 0), rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


def test_the_entropy_carries_no_gradient():
    hidden, head, tokens = random_case()
    entropy = lambda h: token_log_probs(h, lambda x: x @ head, tokens, 4)[1].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(entropy))(hidden), 0)


def test_cross_entropy_counts_answer_tokens_only_each_given_what_stands_before_it():
    # Row 0: prompt 7, answer 1 2; row 1: answer 0 first, which nothing precedes, then 2.
    tokens = np.array([[7, 1, 2, 0], [0, 2, 0, 0]])
    answer = np.array([[False, True, True, False], [True, True, False, False]])
    table = np.log(np.arange(1.0, 37.0).reshape(4, 9))  # the logits after position 0, 1, 2, 3
    hidden = np.broadcast_to(np.eye(4, dtype=np.float32), (2, 4, 4))
    loss = jax.jit(lambda h: answer_cross_entropy(h, lambda x: x @ table, tokens, answer, 3))
    total, count = loss(hidden)
    share = lambda position, token: (9 * position + token + 1) / (81 * position + 45)  # noqa: E731
    expected = -np.log(share(0, 1)) - np.log(share(1, 2)) - np.log(share(0, 2))
    assert float(count) == 3
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_answers_costs_nothing():
    hidden, head, tokens = random_case()
    none = np.zeros(tokens.shape, bool)
    loss = lambda h: answer_cross_entropy(h, lambda x: x @ head, tokens, none, 4)  # noqa: E731
    (total, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(hidden)
    assert float(total) == float(count) == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_head_is_trained_through_the_chunks(tied):
    config = dataclasses.replace(preset("tiny"), vocab_size=300, tie_embeddings=tied)
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    graph, shapes = nnx.split(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 9, shapes)
    hidden = rng.normal(size=(2, 5, config.text.hidden_size)).astype(np.float32)
    tokens = rng.integers(0, 300, (2, 5)).astype(np.int32)

    def chunked(params):
        return token_log_probs(hidden, nnx.merge(graph, params).logits, tokens, 2)[0].sum()

    def expected(params):
        log_probs = jax.nn.log_softmax(nnx.merge(graph, params).logits(hidden))
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1).sum()

    found, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (chunked, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
    head = wanted[1]["embed"]["embedding"] if tied else wanted[1]["lm_head"]["kernel"]
    assert float(jnp.abs(head[...]).max()) > 0.1


def test_the_logits_of_all_positions_are_never_alive_at_once():
    rows, length, width, vocabulary = 4, 128, 16, 4096

    def loss(hidden, head, tokens):
        return token_log_probs(hidden, lambda x: x @ head, tokens, 8)[0].sum()

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, length, width), jnp.float32),
            ((width, vocabulary), jnp.float32),
            ((rows, length), jnp.int32),
        )
    ]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    whole = rows * length * vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


def test_eight_devices_find_what_one_finds_with_the_vocabulary_split_between_them():
    hidden, head, tokens = random_case(rows=8, length=12, vocabulary=64)
    mask = np.arange(12)[None] >= np.arange(8)[:, None]

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def step(hidden, head, tokens, mask):
        found = token_log_probs(hidden, lambda x: x @ head, tokens, 4, mask=mask)
        return found[0].sum(), found

    expected = jax.tree.map(np.asarray, jax.jit(step)(hidden, head, tokens, mask))
    with devices(8):
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "tensor"))
        places = rows, columns, rows, rows
        arguments = jax.device_put((hidden, head, tokens, mask), places)
        compiled = jax.jit(step).lower(*arguments).compile()
        found = jax.tree.map(np.asarray, compiled(*arguments))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)
    # Neither the head nor a chunk's logits are gathered.
    moved = re.findall(r" = \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert not [shape for shape in moved if "64" in shape.split(",")], moved
