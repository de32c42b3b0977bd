"""The loss by hand, its limits, and the same on all layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import devices

from afmrl_jax.core.mesh import batch_sharding, make_mesh
from afmrl_jax.losses.distill import Distill, Distillation

ONE = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def random_batch(seed=0, shape=(2, 8, 2)):
    """Embeddings, and a batch of two teachers with equal shares, of which one lacks listings."""
    rng = np.random.default_rng(seed)
    embeddings = unit(rng.normal(size=(*shape, 16))).astype(np.float32)
    weight = np.ones((*shape, 2)) * np.sqrt(0.5)
    weight[..., 1] *= rng.random(shape) < 0.7
    parts = [unit(rng.normal(size=(*shape, 6))) * weight[..., k, None] for k in range(2)]
    teacher = np.concatenate(parts, -1).astype(np.float32)
    return embeddings, {"teacher": teacher, "teacher_weight": weight.astype(np.float32)}


def loss(embeddings, batch, ranking_weight=1.0, temperature=0.1, mesh=None):
    mesh = mesh or make_mesh(ONE)
    objective = Distill(Distillation(temperature, ranking_weight), mesh)
    sharding = batch_sharding(mesh, 1)
    embeddings, batch = jax.device_put((embeddings, batch), sharding)
    return jax.jit(lambda *args: objective({}, {}, *args))(embeddings, batch)


def test_two_queries_and_targets_by_hand():
    """Queries along x and y; one teacher, for which the second target is at 60 degrees to the first
    query, and which does not know the first target."""
    x, y = [1.0, 0.0], [0.0, 1.0]
    embeddings = np.array([[[x, x], [y, y]]], np.float32)  # [A, C, V, E]
    half = [0.5, np.sqrt(0.75)]
    teacher = np.array([[[x, [0, 0]], [y, half]]], np.float32)
    weight = np.array([[[[1], [0]], [[1], [1]]]], np.float32)
    batch = {"teacher": teacher, "teacher_weight": weight}
    value, memory, metrics = loss(embeddings, batch, ranking_weight=3.0)
    # Student: 0 and 1 for the second target; teacher: .5 and sqrt(.75). One candidate: no ranking.
    assert value == pytest.approx((0.5**2 + (1 - np.sqrt(0.75)) ** 2) / 2, rel=1e-6)
    assert metrics["ranking_divergence"] == pytest.approx(0, abs=1e-6) and memory == {}


def test_every_number_as_numpy_has_it():
    embeddings, batch = random_batch()
    value, _, metrics = loss(embeddings, batch, ranking_weight=2.0)

    def rows(array, view):
        return np.swapaxes(array, 0, 1)[:, :, view].reshape(-1, array.shape[-1]).astype(np.float64)

    weights = rows(batch["teacher_weight"], 0) @ rows(batch["teacher_weight"], 1).T
    taught = rows(batch["teacher"], 0) @ rows(batch["teacher"], 1).T / weights
    cosines = rows(embeddings, 0) @ rows(embeddings, 1).T
    assert (weights > 0).all() and len(np.unique(weights.round(3))) == 2  # one teacher, or both

    def log_shares(scores):
        return scores / 0.1 - np.log(np.exp(scores / 0.1).sum(1, keepdims=True))

    theirs = log_shares(taught)
    ranking = (np.exp(theirs) * (theirs - log_shares(cosines))).sum(1).mean()
    error = ((cosines - taught) ** 2).mean()
    assert value == pytest.approx(error + 2 * ranking, rel=1e-5)
    assert metrics["cosine_error"] == pytest.approx(np.sqrt(error), rel=1e-5)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    embeddings, _ = random_batch()
    batch = {"teacher": embeddings, "teacher_weight": np.ones((*embeddings.shape[:3], 1))}
    value, _, _ = loss(embeddings, jax.tree.map(np.float32, batch))
    gradient = jax.grad(lambda x: loss(x, jax.tree.map(np.float32, batch))[0])(embeddings)
    assert value < 1e-9 and jnp.abs(gradient).max() < 1e-5


def test_pairs_that_no_teacher_knows_teach_nothing():
    embeddings, batch = random_batch()
    nothing = jax.tree.map(np.zeros_like, batch)
    value, gradient = jax.value_and_grad(lambda x: loss(x, nothing)[0])(embeddings)
    assert value == 0 and not gradient.any()


def test_devices_and_micro_batches_change_nothing():
    embeddings, batch = random_batch()
    value = loss(embeddings, batch)[0]
    # Pair c of micro-batch a is example c A + a of the whole, whatever A is.
    whole = jax.tree.map(lambda x: x.reshape(1, 16, *x.shape[2:]), (embeddings, batch))
    np.testing.assert_allclose(loss(*whole)[0], value, rtol=1e-5)
    with devices(8):
        mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 4, "tensor": 1})
        np.testing.assert_allclose(loss(embeddings, batch, mesh=mesh)[0], value, rtol=1e-5)
