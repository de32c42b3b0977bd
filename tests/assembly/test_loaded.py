"""Rows and listings to vectors, in batches."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.assembly.loaded import embed_in_batches
from afmrl_jax.core.errors import UserError


def test_embedding_fills_the_last_batch_keeps_the_order_and_compiles_once():
    traced, shapes, threads = [], set(), set()

    @jax.jit
    def embed(rows):
        traced.append(1)
        return jnp.stack([rows["x"], -rows["x"]], axis=1).astype(jnp.bfloat16)

    def make_rows(indices):
        shapes.add(indices.shape)
        threads.add(threading.current_thread())
        return {"x": indices.astype(np.float32)}

    indices = np.array([5, 3, 8, 1, 9, 2, 7])
    vectors = embed_in_batches(embed, make_rows, indices, batch=3)
    np.testing.assert_array_equal(vectors, np.stack([indices, -indices], axis=1))
    assert vectors.dtype == np.float32 and len(traced) == 1 and shapes == {(3,)}
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_a_failure_while_rows_are_made_reaches_the_caller():
    def make_rows(indices):
        raise UserError("photo 3 cannot be read")

    with pytest.raises(UserError, match="photo 3"):
        embed_in_batches(lambda rows: rows, make_rows, np.arange(5), 2)
    with pytest.raises(ValueError, match="no listings"):
        embed_in_batches(lambda rows: rows, make_rows, np.arange(0), 2)
