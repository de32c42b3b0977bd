import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.training.gradients import accumulate


def loss(params, rows):
    """Squared errors, of which rows have different numbers; some have none."""
    errors = jnp.square(rows["x"] @ params["w"] - params["b"]) * rows["mask"]
    return jnp.sum(errors), jnp.sum(rows["mask"])


def case(micro_batches):
    rng = np.random.default_rng(0)
    rows = {
        "x": rng.normal(size=(8, 5, 3)).astype(np.float32),
        "mask": (np.arange(5) < np.array([5, 1, 0, 0, 4, 2, 1, 3])[:, None]).astype(np.float32),
    }
    params = {"w": rng.normal(size=3).astype(np.float32), "b": np.float32(0.5)}
    return params, {name: x.reshape(micro_batches, -1, *x.shape[1:]) for name, x in rows.items()}


def test_micro_batches_give_the_loss_and_gradient_of_the_whole():
    """The whole's are jax's own, of the mean over all that counts."""
    params, rows = case(1)
    whole = {name: x[0] for name, x in rows.items()}
    mean, gradient = jax.value_and_grad(lambda p: jnp.divide(*loss(p, whole)))(params)
    for micro_batches in (1, 2, 4):
        (value, count), found = jax.jit(accumulate(loss))(*case(micro_batches))
        np.testing.assert_allclose(value, mean, rtol=1e-6)
        assert count == 16
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, gradient)


def test_a_batch_without_anything_to_learn_gives_zero():
    params, rows = case(2)
    rows["mask"] = np.zeros_like(rows["mask"])
    (value, count), gradient = jax.jit(accumulate(loss))(params, rows)
    assert (value, count) == (0, 0) and not any(x.any() for x in jax.tree.leaves(gradient))
