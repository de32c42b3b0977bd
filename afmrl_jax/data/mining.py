"""Look-alikes: for each product, the other products with the most similar attributes.

Axes: P products · k neighbours · T term slots · W distinct terms.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from afmrl_jax.attributes.bm25 import CorpusStatistics

VERSION = 1  # of the algorithm, for caches of its results
MAX_TERMS = 32  # terms a product
BLOCK_ENTRIES = 4_000_000  # scores in memory at a time, 12 bytes each
PAIRED = 8  # common attributes of a product, whose pairs are terms too
SPARE = 4  # candidates for each neighbour, which the approximate search passes to exact scoring


def mine_neighbours(
    attributes: Sequence[Mapping[str, str]],
    k: int,
    statistics: CorpusStatistics,
    *,
    max_work: int = 1_000_000_000,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other products of each product by BM25 of its attributes.

    attributes: one mapping a product, P of them. Returns (neighbours int32[P, k], best first, equal
    scores by index; scores float32[P, k]). A product is never its own neighbour; where fewer than k
    others share a term, -1 with score 0 pads.

    Exact up to some 20,000 products. In larger catalogues the search reads a product's terms, and
    pairs of its common attributes, from the rarest on, until it has read max_work / P postings (at
    least 2,000), and ranks the candidates by their exact scores. A term of many products then finds
    no candidates by itself, and a product that has only such terms may get no neighbours.
    Deterministic, one core. Memory: some 1 KB a product, and BLOCK_ENTRIES scores at a time.
    """
    # Ids follow the dictionary; words hold no "=", so a term with "=" is a whole attribute.
    is_whole = np.array(["=" in term for term in statistics.document_frequencies], bool)
    encoded = statistics.encode(attributes, MAX_TERMS)
    return _search(encoded, is_whole, k, max_work)


def mine_differing(
    attributes: Sequence[Mapping[str, str]], k: int, statistics: CorpusStatistics
) -> np.ndarray:
    """`mine_neighbours` that differ: neither a product and a neighbour, nor two of its neighbours,
    have all the same terms. Of products that do, one at random is a neighbour; the same at each
    call. Returns int32[P, k]."""
    terms = np.sort(statistics.encode(attributes, MAX_TERMS)["terms"])
    _, first, kinds = np.unique(terms, axis=0, return_index=True, return_inverse=True)
    neighbours, _ = mine_neighbours([attributes[i] for i in first], k, statistics)
    neighbours = neighbours[kinds]  # kinds of products
    sizes, by_kind = np.bincount(kinds), np.argsort(kinds, kind="stable")
    chosen = np.random.default_rng(0).integers(sizes[neighbours])
    chosen += (np.cumsum(sizes) - sizes)[neighbours]
    return np.where(neighbours < 0, -1, by_kind[chosen]).astype(np.int32)


def _search(
    encoded: dict[str, np.ndarray], is_whole: np.ndarray, k: int, max_work: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours and scores [P, k] of encoded products, a block of rows at a time."""
    n_products = len(encoded["terms"])
    neighbours = np.full((n_products, k), -1, np.int32)
    scores = np.zeros((n_products, k), np.float32)
    queries, documents, pairable = _matrices(encoded, is_whole)
    if not documents.nnz:
        return neighbours, scores
    budget = max(2_000, max_work // n_products)
    probes, keys, candidates = _rarest(queries, budget), documents, k
    exact = probes.nnz == queries.nnz
    if not exact:
        pairs = _pairs(queries, pairable, budget)
        probes, candidates = _rarest(sparse.hstack([queries, pairs], "csr"), budget), k * SPARE
        keys = sparse.hstack([documents, pairs.astype(bool)], "csr")
    postings = keys.T.tocsr()
    rows_a_block = max(1, BLOCK_ENTRIES // min(budget, n_products))
    for start in range(0, n_products, rows_a_block):
        stop = min(start + rows_a_block, n_products)
        row, column, value = _best(probes[start:stop] @ postings, start, candidates)
        if not exact:
            value = np.asarray(queries[start + row].multiply(documents[column]).sum(axis=1))
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < k
        neighbours[start + row[kept], rank[kept]] = column[kept]
        scores[start + row[kept], rank[kept]] = value[kept]
    return neighbours, scores


def _matrices(
    encoded: dict[str, np.ndarray], is_whole: np.ndarray
) -> tuple[sparse.csr_array, sparse.csr_array, np.ndarray]:
    """Query and document weights as [P, W] matrices of one sparsity, and which terms are whole
    attributes, bool[W]."""
    used = encoded["terms"] >= 0
    ids, columns = np.unique(encoded["terms"][used], return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    queries, documents = (
        sparse.csr_array((encoded[name][used], columns, starts), (len(used), len(ids)))
        for name in ("query_weights", "document_weights")
    )
    known = ids < len(is_whole)
    return queries, documents, known & is_whole[np.where(known, ids, 0)]


def _frequencies(queries: sparse.csr_array) -> np.ndarray:
    """The number of rows with an entry in each column, int64[W]."""
    return np.bincount(queries.indices, minlength=queries.shape[1])


def _by_rarity(queries: sparse.csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, value) of all entries, row by row, the rarest columns first."""
    rows = np.repeat(np.arange(queries.shape[0]), np.diff(queries.indptr))
    order = np.lexsort((queries.indices, _frequencies(queries)[queries.indices], rows))
    return rows, queries.indices[order], queries.data[order]


def _rarest(queries: sparse.csr_array, budget: int) -> sparse.csr_array:
    """Each row's rarest columns, with at most `budget` postings together."""
    rows, columns, values = _by_rarity(queries)
    read = np.concatenate([[0], np.cumsum(_frequencies(queries)[columns])])
    kept = read[1:] - read[queries.indptr[rows]] <= budget
    return sparse.csr_array((values[kept], (rows[kept], columns[kept])), queries.shape)


def _pairs(queries: sparse.csr_array, pairable: np.ndarray, budget: int) -> sparse.csr_array:
    """Pairs of a product's common attributes as terms with the weight of both, [P, pairs].

    Where every attribute is common (a type, a colour, a season), two together are still rare.
    """
    rows, columns, values = _by_rarity(queries)
    common = pairable & (_frequencies(queries) > budget // PAIRED)
    rows, columns, values = (entry[common[columns]] for entry in (rows, columns, values))
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, columns, values, rank = (entry[rank < PAIRED] for entry in (rows, columns, values, rank))
    table = np.full((queries.shape[0], PAIRED), -1, np.int64)
    weights = np.zeros(table.shape, np.float32)
    table[rows, rank], weights[rows, rank] = columns, values
    first, second = np.triu_indices(PAIRED, 1)
    low, high = np.sort([table[:, first], table[:, second]], axis=0)
    row, _ = pair = np.nonzero(low >= 0)
    names, column = np.unique(low[pair] * queries.shape[1] + high[pair], return_inverse=True)
    weight = (weights[:, first] + weights[:, second])[pair]
    return sparse.csr_array((weight, (row, column)), (queries.shape[0], len(names)))


def _best(
    scores: sparse.csr_array, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, value) of the `count` highest scores of each row; of equal scores the lowest
    columns. start: the product of the first row."""
    rows, columns, values = [], [], []
    for row in range(scores.shape[0]):
        span = slice(scores.indptr[row], scores.indptr[row + 1])
        column, value = scores.indices[span], scores.data[span]
        is_other = column != start + row  # a product is not its own neighbour
        column, value = column[is_other], value[is_other]
        if len(value) > count:
            least = np.partition(value, len(value) - count)[len(value) - count]
            above = np.flatnonzero(value > least)
            equal = np.flatnonzero(value == least)
            equal = equal[np.argsort(column[equal])[: count - len(above)]]
            chosen = np.concatenate([above, equal])
            column, value = column[chosen], value[chosen]
        rows.append(np.full(len(column), row))
        columns.append(column)
        values.append(value)
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
