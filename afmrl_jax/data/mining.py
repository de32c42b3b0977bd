"""Look-alikes: for each product, the other products whose attributes resemble its own the most.

Axes: P products · k neighbours · T term slots · V distinct terms.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from afmrl_jax.attributes.bm25 import CorpusStatistics

VERSION = 1  # of the algorithm, part of the cache's key
MAX_TERMS = 32  # a product
BLOCK_ENTRIES = 4_000_000  # scores held at a time, 12 bytes each
SPARE = 4  # candidates a neighbour that an approximate search hands to the exact one


def mine_neighbours(
    attributes: Sequence[Mapping[str, str]],
    k: int,
    statistics: CorpusStatistics,
    *,
    max_work: int = 500_000_000,
    cache_dir: Path | None = None,
    fingerprint: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other products of each product by BM25 of its attributes.

    attributes: one mapping a product, P of them. Returns (neighbours int32[P, k], best first, equal
    scores by index; scores float32[P, k]). A product never is its own neighbour; where fewer than k
    others share a term, -1 with score 0 pads.

    The search reads a product's terms from the rarest on, as far as max_work / P postings (at least
    2,000) go. Up to some 10,000 products that is all of them and the result is exact. In larger
    catalogues terms that a large part of the products has no longer *find* neighbours, though they
    still rank those found; a product that has only such terms gets none.
    Deterministic, one core; memory stays below some 200 MB beside the encoded catalogue.

    cache_dir keeps the result as .npy for the next call; `fingerprint` then names the catalogue's
    content and which products of it these are.
    """
    path = None
    if cache_dir is not None:
        key = repr((VERSION, fingerprint, len(attributes), k, max_work, statistics.to_json()))
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"neighbours-{digest}.npy"
        if path.exists():
            found = np.load(path)
            return found["neighbour"], found["score"]
    neighbours, scores = _search(statistics.encode(attributes, MAX_TERMS), k, max_work)
    if path is not None:
        found = np.empty(neighbours.shape, [("neighbour", np.int32), ("score", np.float32)])
        found["neighbour"], found["score"] = neighbours, scores
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.save(file, found)
        unfinished.replace(path)  # at once: a killed run leaves no half of a file behind
    return neighbours, scores


def _search(encoded: dict[str, np.ndarray], k: int, max_work: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours and scores [P, k] of encoded products, a block of rows at a time."""
    n_products = len(encoded["terms"])
    neighbours = np.full((n_products, k), -1, np.int32)
    scores = np.zeros((n_products, k), np.float32)
    queries, documents = _matrices(encoded)
    if not n_products or not documents.nnz:
        return neighbours, scores
    budget = max(2_000, max_work // n_products)
    probes = _rarest_terms(
        queries, np.bincount(documents.indices, minlength=documents.shape[1]), budget
    )
    exact = probes.nnz == queries.nnz
    wanted = k if exact else k * SPARE
    postings = documents.T.tocsr()
    rows_a_block = max(1, BLOCK_ENTRIES // min(budget, n_products))
    for start in range(0, n_products, rows_a_block):
        stop = min(start + rows_a_block, n_products)
        block = probes[start:stop] @ postings
        row, column, value = _best(block, np.arange(start, stop), wanted)
        if not exact:
            value = np.asarray(queries[start + row].multiply(documents[column]).sum(axis=1)).ravel()
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < k
        neighbours[start + row[kept], rank[kept]] = column[kept]
        scores[start + row[kept], rank[kept]] = value[kept]
    return neighbours, scores


def _matrices(encoded: dict[str, np.ndarray]) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Query and document weights as [P, V] matrices of one sparsity."""
    used = encoded["terms"] >= 0
    ids, columns = np.unique(encoded["terms"][used], return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    shape = (len(used), len(ids))
    weights = (encoded["query_weights"], encoded["document_weights"])
    return tuple(sparse.csr_array((w[used], columns, starts), shape=shape) for w in weights)


def _rarest_terms(
    queries: sparse.csr_array, frequencies: np.ndarray, budget: int
) -> sparse.csr_array:
    """Each row's rarest terms, as many as have no more than `budget` postings together."""
    rows = np.repeat(np.arange(queries.shape[0]), np.diff(queries.indptr))
    order = np.lexsort((queries.indices, frequencies[queries.indices], rows))
    columns, values = queries.indices[order], queries.data[order]
    read = np.cumsum(frequencies[columns], dtype=np.int64)
    before = np.concatenate([[0], read])[queries.indptr[:-1]]
    kept = read - before[rows] <= budget
    return sparse.csr_array((values[kept], (rows[kept], columns[kept])), shape=queries.shape)


def _best(
    scores: sparse.csr_array, own: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, value) of each row's `count` highest scores, equal ones by column."""
    rows, columns, values = [], [], []
    for row in range(scores.shape[0]):
        span = slice(scores.indptr[row], scores.indptr[row + 1])
        column, value = scores.indices[span], scores.data[span]
        other = column != own[row]
        column, value = column[other], value[other]
        if len(value) > count:
            least = np.partition(value, len(value) - count)[len(value) - count]
            above = np.flatnonzero(value > least)
            level = np.flatnonzero(value == least)
            level = level[np.argsort(column[level])[: count - len(above)]]
            chosen = np.concatenate([above, level])
            column, value = column[chosen], value[chosen]
        rows.append(np.full(len(column), row))
        columns.append(column)
        values.append(value)
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
