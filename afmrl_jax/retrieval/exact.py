"""Exact search: every query against every vector, on the device."""

import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.retrieval.index import Index, padded

log = logging.getLogger(__name__)


class ExactIndex(Index):
    """Compares each query with every vector, on the device. Of equal scores the first row wins."""

    kind = "exact"

    def _build(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._on_device: jax.Array | None = None

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._on_device is None:
            # Whole blocks of rows, so that a few upserts do not compile the search again.
            self._on_device = jnp.asarray(padded(self._vectors, -len(self._vectors) % 1024))
        size = np.int32(len(self._vectors))
        step = query_block(len(self._on_device))
        step = min(step, 1 << max(3, (len(queries) - 1).bit_length()))  # few queries are few rows
        rows, scores = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), "f4")
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            best, places = _top_k(padded(block, step - len(block)), self._on_device, size, k)
            scores[start : start + step] = np.asarray(best)[: len(block)]
            rows[start : start + step] = np.asarray(places)[: len(block)]
        return rows, scores

    def _put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        new = rows >= len(self._vectors)
        updated = np.concatenate([self._vectors, vectors[new]])
        updated[rows[~new]] = vectors[~new]
        self._build(updated)

    def _remove(self, row: int) -> None:
        self._vectors[row] = self._vectors[-1]
        self._build(self._vectors[:-1])

    def _write(self, directory: Path) -> None:
        np.save(directory / "vectors.npy", self._vectors)

    def _read(self, directory: Path) -> None:
        self._build(np.load(directory / "vectors.npy", allow_pickle=False))


def query_block(n: int) -> int:
    """Queries to score at once against n rows: at most 2**25 scores (128 MiB), a power of two."""
    return 1 << max(3, min(10, (2**25 // max(n, 1)).bit_length() - 1))


@functools.partial(jax.jit, static_argnames="k")
def _top_k(
    queries: jax.Array, vectors: jax.Array, size: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    # Full precision: accelerators would otherwise round the products, and miss the exact order.
    scores = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(jnp.arange(len(vectors)) < size, scores, -jnp.inf), k)
