"""Ranks a gallery for each query, and scores the ranking.

Axes: Q queries · N gallery listings · E embedding dimensions · B queries of a block · R relevant
items of a query, padded with -1.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.catalog.groups import Members
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.progress import with_progress
from afmrl_jax.retrieval import metrics
from afmrl_jax.retrieval.exact import query_block
from afmrl_jax.retrieval.index import require_finite
from afmrl_jax.retrieval.indexes import EXACT_BELOW, build_index, recall_against_exact
from afmrl_jax.retrieval.scores import Scores

APPROXIMATE_DEPTH = 1000  # ranks scored where the gallery is too large to be ranked whole
WIDE = 128  # relevant listings of a query, from which on one pass counts scores by bins
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """The queries, or the gallery.

    vectors: float32[N, E], L2-normalised. listings, products: [N], strings or integers that
    identify each row's listing and its product across both sides, whichever catalogues these come
    from.
    """

    vectors: np.ndarray
    listings: np.ndarray
    products: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)


def rank_and_score(
    queries: Side,
    gallery: Side,
    ks: Sequence[int] = (1, 5, 10),
    *,
    exclude_self: bool,
    exact_below: int = EXACT_BELOW,
) -> Scores:
    """Ranks the gallery for each query, and scores the ranks of the listings of its product.

    exclude_self (`Task.exclude_self`) takes the query's listing, wherever it stands in the gallery,
    out of its ranking. Queries that then have nothing to find are dropped. A tie counts against a
    right listing: wrong listings of its score (to `metrics.TIE`) are ranked before it, so that
    neither a collapsed model nor products with one photo score by luck. Below `exact_below` gallery
    listings the whole gallery is ranked, exactly. From there on ScaNN's first 1,000 ranks are
    scored, `map` is a lower bound, and `index_recall` is the share of the true 10 nearest that
    ScaNN finds for a sample of the queries.

    Returns values `recall@K`, `mrr`, `map`, `ndcg@10`, and as extra `n_gallery` and `index_recall`.
    Raises UserError where no query is left or a vector is not finite, ValueError where a listing
    has two products.
    """
    require_finite(queries.vectors, "query embeddings")
    require_finite(gallery.vectors, "gallery embeddings")
    products, listings = (
        _Shared(queries.products, gallery.products),
        _Shared(queries.listings, gallery.listings),
    )
    if (products.codes[listings.first] != products.codes).any():
        raise ValueError("one listing is of two products: make both arrays of one piece")
    n_relevant = products.counts - (listings.counts if exclude_self else 0)
    kept = np.flatnonzero(n_relevant > 0)
    if len(kept) == 0:
        raise _nothing_to_find(len(queries), len(gallery))
    order = np.argsort(n_relevant[kept], kind="stable")
    by_width = kept[order]  # so that a block's queries have about as many relevant listings

    extra: dict[str, float] = {"n_gallery": len(gallery)}
    if len(gallery) < exact_below:
        ranker = _exact_ranker(gallery.vectors)
    else:
        query_vectors = queries.vectors[by_width]
        ranker, extra["index_recall"] = _scann_ranker(gallery.vectors, query_vectors)
    parts = []
    step = query_block(len(gallery))
    for start in with_progress(range(0, len(kept), step), len(kept), "queries ranked"):
        block = by_width[start : start + step]
        self_rows = listings.rows(block) if exclude_self else np.full((len(block), 1), -1)
        relevant = products.rows(block)
        relevant[metrics.places_of(self_rows, relevant) >= 0] = -1
        ranks = ranker(queries.vectors[block], self_rows, relevant, step)
        parts.append(metrics.score_ranks(ranks, n_relevant[block], ks))
    back = np.argsort(order)
    values = {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
    return Scores(kept, values, extra)


def _nothing_to_find(queries: int, gallery: int) -> UserError:
    return UserError(
        f"none of {queries} queries has another listing of its product among {gallery} in the "
        "gallery: evaluate on a catalogue with several listings a product, or add the catalogue "
        "that holds them to the gallery"
    )


class _Shared:
    """The gallery rows that have the same value as a query; values are integers or strings.

    codes: int64[Q + N], of queries and then the gallery, equal where the values are. first:
    int64[Q + N], the first row with the same value. counts: int64[Q], gallery rows per query.
    """

    def __init__(self, query_values: np.ndarray, gallery_values: np.ndarray):
        both = np.concatenate([query_values, gallery_values])
        _, first, self.codes = np.unique(both, return_index=True, return_inverse=True)
        self.first = first[self.codes]
        self._queries, gallery = np.split(self.codes, [len(query_values)])
        self._members = Members(gallery)
        self.counts = self._members.counts(self._queries)

    def rows(self, queries: np.ndarray) -> np.ndarray:
        """Gallery rows of these queries, int64[B, R], padded with -1."""
        return self._members.rows(self._queries[queries], powers_of_two=True)


# (query vectors [B, E], rows of the query's listing [B, S], relevant rows [B, R], rows to pad to)
# -> ranks [B, R]
_Ranker = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def _exact_ranker(gallery_vectors: np.ndarray) -> _Ranker:
    gallery = jnp.asarray(gallery_vectors, jnp.float32)

    def ranks(
        queries: np.ndarray, self_rows: np.ndarray, relevant: np.ndarray, rows: int
    ) -> np.ndarray:
        missing = ((0, rows - len(queries)), (0, 0))
        padded = (
            np.pad(np.asarray(queries, np.float32), missing),
            np.pad(self_rows.astype(np.int32), missing, constant_values=-1),
            np.pad(relevant.astype(np.int32), missing, constant_values=-1),
        )
        return np.asarray(_exact_ranks(*padded, gallery))[: len(queries)]

    return ranks


@jax.jit
def _exact_ranks(
    queries: jax.Array, self_rows: jax.Array, relevant: jax.Array, gallery: jax.Array
) -> jax.Array:
    """Ranks of the relevant rows, best first, 0 for padding: int32[B, R].

    A right listing's rank is the number of wrong listings that score at least as much, plus its
    place among the right listings. Counting takes R passes over the scores or, for large R, a
    binary search of each score among the R.
    """
    scores = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    b = jnp.arange(len(queries))[:, None]
    dropped = jnp.where(self_rows >= 0, self_rows, len(gallery))
    scores = scores.at[b, dropped].set(-jnp.inf, mode="drop")
    right = jnp.where(relevant >= 0, jnp.take_along_axis(scores, relevant, axis=1), -jnp.inf)
    right = -jnp.sort(-right, axis=1)
    least = right - metrics.TIE
    if relevant.shape[1] < WIDE:
        at_least = jax.lax.map(lambda column: (scores >= column[:, None]).sum(axis=1), least.T).T
    else:
        at_least = _counted_by_bins(scores, least)
    right_at_least = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(-right, -least)
    ranks = at_least - right_at_least + 1 + jnp.arange(right.shape[1])
    return jnp.where(right > -jnp.inf, ranks, 0).astype(jnp.int32)


def _counted_by_bins(scores: jax.Array, least: jax.Array) -> jax.Array:
    """The number of a row's scores [B, N] that are at least each of its thresholds `least` [B, R],
    descending; int32[B, R]."""
    passed = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(least[:, ::-1], scores)
    b = jnp.arange(len(scores))[:, None]
    # counts[b, n]: the scores that are at least n of the row's thresholds, and no more.
    counts = jnp.zeros((len(least), least.shape[1] + 1), jnp.int32).at[b, passed].add(1)
    return jnp.cumsum(counts[:, ::-1], axis=1)[:, :-1]


def _scann_ranker(gallery_vectors: np.ndarray, queries: np.ndarray) -> tuple[_Ranker, float]:
    """The ranker of a large gallery, and its recall of the exact 10 nearest."""
    rows = np.arange(len(gallery_vectors))
    log.info("building ScaNN's index of %d listings", len(rows))
    index = build_index(gallery_vectors, rows, model_version="evaluated", exact_below=0)

    def ranks(
        queries: np.ndarray, self_rows: np.ndarray, relevant: np.ndarray, _: int
    ) -> np.ndarray:
        # One rank more than is scored shows whether a tie goes on; ScaNN scores all these exactly.
        depth = APPROXIMATE_DEPTH + 1
        ranked, scores = index.search(queries, depth + self_rows.shape[1])
        removed = metrics.places_of(self_rows, ranked) >= 0
        # The rows of the query's listing go last, and are cut off.
        order = np.argsort(removed, axis=1, kind="stable")[:, :depth]
        ranked, scores = (np.take_along_axis(x, order, axis=1) for x in (ranked, scores))
        return metrics.relevant_ranks(ranked, scores, relevant)

    return ranks, recall_against_exact(index, gallery_vectors, rows, queries)
