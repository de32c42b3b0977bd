import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.losses.labels import Labels, label_loss
from afmrl_jax.training.gradients import gradcache

WIDTH, HIDDEN, EMBEDDING = 24, 64, 16


def embed(params, rows):
    hidden = jnp.tanh(rows["x"] @ params["w1"])
    vectors = hidden @ params["w2"]
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def info_nce(_, embeddings):
    flat = embeddings.reshape(-1, 2, EMBEDDING)
    logits = flat[:, 0] @ flat[:, 1].T / 0.05
    losses = jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits)
    return losses.mean(), {"rows": len(losses)}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(WIDTH, HIDDEN)), jnp.float32) / 5,
        "w2": jnp.asarray(rng.normal(size=(HIDDEN, EMBEDDING)), jnp.float32) / 8,
    }
    return params, rng.normal(size=(64, 2, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("micro_batches", [2, 8, 32])
def test_the_gradient_over_micro_batches_is_the_direct_one(problem, micro_batches):
    params, x = problem
    step = jax.jit(gradcache(embed, info_nce))
    (direct, _), wanted = step(params, {"x": x[None]})
    (cached, aux), got = step(params, {"x": x.reshape(micro_batches, -1, 2, WIDTH)})
    assert aux["rows"] == 64
    np.testing.assert_allclose(cached, direct, rtol=1e-6)
    for name in wanted:
        error = jnp.linalg.norm(got[name] - wanted[name]) / jnp.linalg.norm(wanted[name])
        assert error <= 1e-6


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_a_head_that_only_the_loss_reads_gets_the_direct_gradient_too(problem, micro_batches):
    """The attribute-label head beside InfoNCE; some rows have no label, so means must be whole."""
    params, x = problem
    rng = np.random.default_rng(1)
    labels = Labels(np.arange(5), np.array([0, 0, 1, 1, 1]))
    terms = rng.integers(-4, 5, (64, 2, 3))
    head = {"kernel": rng.normal(size=(EMBEDDING, 5)), "bias": rng.normal(size=5)}
    params = params | {"head": jax.tree.map(jnp.float32, head)}

    def loss(params, embeddings):
        value, aux = info_nce(None, embeddings)
        by_row = terms.reshape(*embeddings.shape[:-1], 3)
        total, count, _ = label_loss(params["head"], embeddings, by_row, labels)
        return value + total / count, aux

    step = jax.jit(gradcache(embed, loss))
    (direct, _), wanted = step(params, {"x": x[None]})
    (cached, _), got = step(params, {"x": x.reshape(micro_batches, -1, 2, WIDTH)})
    np.testing.assert_allclose(cached, direct, rtol=1e-6)
    assert np.abs(wanted["head"]["kernel"]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), got, wanted)


def test_the_negatives_are_those_of_the_whole_batch_not_of_a_chunk(problem):
    params, x = problem
    step = gradcache(embed, info_nce)
    (whole, _), _ = step(params, {"x": x.reshape(8, 8, 2, WIDTH)})
    (chunk, _), _ = step(params, {"x": x[None, :8]})
    assert whole > chunk + 0.5  # 63 negatives are harder than 7


def test_memory_does_not_grow_with_the_batch():
    """Temporary bytes less the B x B buffers and embeddings, at a fixed chunk of 16 pairs."""

    def temporary(batch):
        params = {
            "w1": jax.ShapeDtypeStruct((WIDTH, 4096), jnp.float32),
            "w2": jax.ShapeDtypeStruct((4096, EMBEDDING), jnp.float32),
        }
        rows = {"x": jax.ShapeDtypeStruct((batch // 16, 16, 2, WIDTH), jnp.float32)}
        compiled = jax.jit(gradcache(embed, info_nce)).lower(params, rows).compile()
        squares = 4 * batch * batch
        embeddings = 4 * 2 * batch * EMBEDDING
        total = compiled.memory_analysis().temp_size_in_bytes
        return total, squares, embeddings

    small, squares, embeddings = temporary(64)
    large, large_squares, large_embeddings = temporary(1024)
    fixed_small = small - 3 * squares - 4 * embeddings
    assert large - 3 * large_squares - 4 * large_embeddings <= 1.3 * fixed_small


def test_frozen_parameters_are_neither_copied_nor_given_a_gradient():
    """Temporary and output bytes beside a base of 16 MB, which every chunk reads."""
    base = jax.ShapeDtypeStruct((64, 256, 256), jnp.float32)
    trained = {"w2": jax.ShapeDtypeStruct((256, EMBEDDING), jnp.float32)}
    rows = {"x": jax.ShapeDtypeStruct((4, 2, 2, 256), jnp.float32)}

    def step(base, trained, rows):
        def embed(trained, rows):
            layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
            return jax.lax.scan(layer, rows["x"], base)[0] @ trained["w2"]

        return gradcache(embed, info_nce)(trained, rows)

    memory = jax.jit(step).lower(base, trained, rows).compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used < base.size * base.dtype.itemsize / 8
