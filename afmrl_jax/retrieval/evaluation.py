"""Judges embeddings by retrieval: does a listing find the other listings of its product?

Axes: Q queries · N gallery listings · E embedding dimensions · B queries of a block · R relevant
items of a query, padded with -1.

1. Embed the listings of each view (`embed_listings`).
2. Rank the gallery for each query and score the ranking (`rank_and_score`).
3. Write `evaluation.json`, and show models side by side (`write_evaluation`, `results_table`).
4. Keep each query's own values, and pair two evaluations by them (`write_queries`, `paired`).
"""

import difflib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.data.views import VIEWS
from afmrl_jax.retrieval import metrics
from afmrl_jax.retrieval.exact import query_block
from afmrl_jax.retrieval.index import require_finite
from afmrl_jax.retrieval.indexes import EXACT_BELOW, build_index, recall_against_exact

APPROXIMATE_DEPTH = 1000  # ranks looked at where the gallery is too large to rank it whole
WIDE = 128  # relevant listings of a query from which on scores are counted by bins, in one pass
SILENCE = 10.0  # seconds after which a wait says how far it is
log = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class Scores:
    """How well each query found what it should.

    queries: int64[Q], which of those asked were kept, ascending. values: float64[Q] each, named as
    by `metrics.score_ranks`. extra: what is known of all of them together.
    """

    queries: np.ndarray
    values: dict[str, np.ndarray]
    extra: dict[str, float]

    def means(self) -> dict[str, float]:
        """Means of the values, `recall@1_ci95`, half the width of its 95% interval, `n_queries`,
        and what is in extra."""
        means = {name: float(value.mean()) for name, value in self.values.items()}
        if "recall@1" in means:
            means["recall@1_ci95"] = metrics.interval95(self.values["recall@1"])
        return {**means, "n_queries": len(self.queries), **self.extra}


@dataclass(frozen=True)
class Task:
    """What of a listing is the query and what of the listings is searched, e.g. image->text."""

    query_view: str
    gallery_view: str

    @property
    def name(self) -> str:
        return f"{self.query_view}->{self.gallery_view}"

    @property
    def exclude_self(self) -> bool:
        """Whether the query's own listing leaves the ranking.

        Where the views share a modality it would find itself by comparing a photo or a text with
        itself. Where they share none (image->text), its own text is a rightful answer.
        """
        return bool(set(self.query_view.split("+")) & set(self.gallery_view.split("+")))


def parse_task(name: str) -> Task:
    """Reads "QUERY->GALLERY", each one of VIEWS. Raises UserError, with a suggestion, otherwise."""
    known = {task.name: task for task in (Task(q, g) for q in VIEWS for g in VIEWS)}
    sides = name.replace(" ", "").lower().split("->")
    plain = "->".join(
        "+".join(sorted(side.split("+"))) for side in sides
    )  # text+image is known too
    if plain in known:
        return known[plain]
    close = difflib.get_close_matches(plain, known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known)}"
    raise UserError(f'evaluation task "{name}" is not known; {hint}')


def embed_listings(
    embed: Callable[[dict[str, np.ndarray]], jax.Array],
    make_rows: Callable[[np.ndarray], dict[str, np.ndarray]],
    indices: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Embeds listings in batches; a thread makes the next batch while the device works on this one.

    embed: a jitted function, batch -> float[batch_size, E]. make_rows: indices int64[batch_size]
    -> batch, always of the same shapes. indices: int64[N], N > 0. Returns float32[N, E].
    The last batch is filled up by repeating its last listing, so that nothing compiles twice.
    """
    if len(indices) == 0:
        raise ValueError("there are no listings to embed")
    starts = range(0, len(indices), batch_size)
    vectors: list[np.ndarray] = []
    on_device = None
    with ThreadPoolExecutor(max_workers=1) as pool:

        def rows_from(start: int):
            batch = indices[start : start + batch_size]
            return pool.submit(make_rows, np.pad(batch, (0, batch_size - len(batch)), mode="edge"))

        upcoming = rows_from(0)
        for start in with_progress(starts, len(indices), "listings embedded"):
            rows = upcoming.result()
            if start + batch_size < len(indices):
                upcoming = rows_from(start + batch_size)
            previous, on_device = on_device, embed(rows)  # dispatched, not yet waited for
            if previous is not None:
                vectors.append(np.asarray(previous, np.float32))
    vectors.append(np.asarray(on_device, np.float32))
    return np.concatenate(vectors)[: len(indices)]


def with_progress(starts: range, total: int, what: str) -> Iterator[int]:
    """The starts of blocks of `total` things; what takes long says every SILENCE seconds how far it
    is."""
    spoken = time.monotonic()
    for start in starts:
        if time.monotonic() - spoken >= SILENCE:
            log.info("%d of %d %s", start, total, what)
            spoken = time.monotonic()
        yield start


def rank_and_score(
    query_vectors: np.ndarray,
    query_listing_keys: np.ndarray,
    query_products: np.ndarray,
    gallery_vectors: np.ndarray,
    gallery_listing_keys: np.ndarray,
    gallery_products: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    *,
    exclude_self: bool,
    exact_below: int = EXACT_BELOW,
) -> Scores:
    """Metrics of finding the gallery's listings of each query's product.

    query_vectors: float32[Q, E], gallery_vectors: float32[N, E], L2-normalised. *_listing_keys [Q]
    and [N] name a listing, *_products [Q] and [N] its product: strings or integers, equal for the
    same listing or product and for no other, whichever catalogues the two sides come from.

    exclude_self (`Task.exclude_self`) takes every gallery listing with the query's key out of its
    ranking. Queries that then have nothing to find are dropped. A tie counts against us: wrong
    listings with a right one's score (to `metrics.TIE`) stand before it, so that neither a
    collapsed model nor products with one photo score by luck. Below `exact_below` gallery listings
    the whole gallery is ranked, exactly. From there on ScaNN's first 1,000 ranks are scored, `map`
    is a lower bound, and `index_recall` the share of the true 10 nearest it found in a sample.

    Returns values `recall@K`, `mrr`, `map`, `ndcg@10`, and as extra `n_gallery` and `index_recall`.
    Raises UserError where no query is left or a vector is not finite, ValueError where one key
    names two products.
    """
    require_finite(query_vectors, "query embeddings")
    require_finite(gallery_vectors, "gallery embeddings")
    same_product = _Groups(query_products, gallery_products)
    same_listing = _Groups(query_listing_keys, gallery_listing_keys)
    if (same_product.codes[same_listing.first] != same_product.codes).any():
        raise ValueError("one listing key names two products: make keys and products of one piece")
    n_relevant = same_product.counts - (same_listing.counts if exclude_self else 0)
    kept = np.flatnonzero(n_relevant > 0)
    if len(kept) == 0:
        raise _nothing_to_find(len(query_vectors), len(gallery_vectors))
    order = np.argsort(n_relevant[kept], kind="stable")
    by_width = kept[order]  # blocks of like width

    extra: dict[str, float] = {"n_gallery": len(gallery_vectors)}
    if len(gallery_vectors) < exact_below:
        ranker = _exact_ranker(gallery_vectors)
    else:
        ranker, extra["index_recall"] = _scann_ranker(gallery_vectors, query_vectors[by_width])
    parts = []
    step = query_block(len(gallery_vectors))
    for start in with_progress(range(0, len(kept), step), len(kept), "queries ranked"):
        block = by_width[start : start + step]
        own = same_listing.members(block) if exclude_self else np.full((len(block), 1), -1)
        relevant = same_product.members(block)
        relevant[metrics.places_of(own, relevant) >= 0] = -1
        ranks = ranker(query_vectors[block], own, relevant, step)
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


def write_evaluation(path: str | Path, results: Results) -> None:
    """Writes {task: {metric: value, n_queries, n_gallery}} as JSON, whole or not at all."""
    write_atomically(Path(path), json.dumps(results, indent=2, allow_nan=False) + "\n")


def write_queries(path: str | Path, found: Mapping[str, Scores], listing_ids: list[str]) -> None:
    """Writes {task: {"listing_ids": [...], "values": {metric: [...]}}} as JSON, a value a query, so
    that another evaluation can be paired with this one.

    listing_ids: of all queries, which the `queries` of the scores count.
    """
    tasks = {
        task: {
            "listing_ids": [listing_ids[query] for query in scores.queries],
            "values": {name: value.tolist() for name, value in scores.values.items()},
        }
        for task, scores in found.items()
    }
    write_atomically(Path(path), json.dumps(tasks, allow_nan=False) + "\n")


def paired(before: str | Path, after: str | Path) -> dict[str, dict[str, float]]:
    """What queries gained between two evaluations, from the files of `write_queries`.

    Returns {task: {metric: mean of after - before, metric_ci95: half the width of its 95% interval,
    n_queries}} of the tasks that both have. Raises UserError where these have other queries.
    """
    one, two = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (before, after))
    gains: dict[str, dict[str, float]] = {}
    for task in [task for task in one if task in two]:
        ids = one[task]["listing_ids"]
        if ids != two[task]["listing_ids"]:
            raise UserError(
                f"{before} and {after} judge {task} by other queries: evaluate both on the same "
                "catalogue with the same eval.queries, eval.gallery and splits"
            )
        gains[task] = {}
        for name, values in one[task]["values"].items():
            mean, half = metrics.paired(np.array(values), np.array(two[task]["values"][name]))
            gains[task] |= {name: mean, f"{name}_ci95": half}
        gains[task]["n_queries"] = len(ids)
    return gains


def results_table(models: Mapping[str, Results]) -> str:
    """A Markdown table of models ("untrained", "trained", ...), one line a task and model.

    Columns are the metrics that any of them has; one that has a 95% interval carries it. Tasks that
    have no metric in common stand in tables of their own.
    """
    tables: list[tuple[dict[str, None], list[tuple[str, str, Mapping[str, float]]]]] = []
    for task in dict.fromkeys(task for results in models.values() for task in results):
        rows = [(task, model, models[model][task]) for model in models if task in models[model]]
        names = dict.fromkeys(n for *_, scores in rows for n in scores if not n.endswith("_ci95"))
        metric = {name for name in names if not name.startswith("n_")}
        same = next((table for table in tables if metric & table[0].keys()), None)
        if same is None:
            tables.append((names, rows))
        else:
            same[0].update(names)
            same[1].extend(rows)
    return "\n".join(_table(*table) for table in tables)


def _table(names: Iterable[str], rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    names = sorted(names, key=lambda name: name.startswith("n_"))  # counts stand last
    head = ["task", "model", *(name.replace("recall@", "R@") for name in names)]
    cells = [
        [task, model, *(_cell(scores, name) for name in names)] for task, model, scores in rows
    ]
    return markdown_table(head, cells) + "\n"


def _cell(scores: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return ""
    if name.startswith("n_"):
        return f"{scores[name]:,}"
    interval = scores.get(f"{name}_ci95")
    return f"{scores[name]:.3f}" + (f" ± {interval:.3f}" if interval is not None else "")


class _Groups:
    """Which gallery rows carry the same value as each query; values are integers or strings."""

    def __init__(self, query_values: np.ndarray, gallery_values: np.ndarray):
        both = np.concatenate([query_values, gallery_values])
        # codes[i]: the value of row i, queries then gallery; first[i]: the first row that has it.
        _, first, self.codes = np.unique(both, return_index=True, return_inverse=True)
        self.first = first[self.codes]
        queries, gallery = np.split(self.codes, [len(query_values)])
        self._rows = np.argsort(gallery, kind="stable")
        self._starts = np.searchsorted(gallery[self._rows], queries, "left")
        self.counts = np.searchsorted(gallery[self._rows], queries, "right") - self._starts

    def members(self, queries: np.ndarray) -> np.ndarray:
        """Gallery rows int64[B, R] of these queries, -1 pads; R a power of two, for few shapes."""
        counts = self.counts[queries][:, None]
        columns = np.arange(1 << (int(counts.max(initial=1)) - 1).bit_length())
        rows = np.minimum(self._starts[queries][:, None] + columns, len(self._rows) - 1)
        return np.where(columns < counts, self._rows[rows], -1)


# (query vectors [B, E], own rows [B, S], relevant rows [B, R], rows to pad to) -> ranks [B, R]
_Ranker = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def _exact_ranker(gallery_vectors: np.ndarray) -> _Ranker:
    gallery = jnp.asarray(gallery_vectors, jnp.float32)

    def ranks(queries: np.ndarray, own: np.ndarray, relevant: np.ndarray, rows: int) -> np.ndarray:
        missing = ((0, rows - len(queries)), (0, 0))
        padded = (
            np.pad(np.asarray(queries, np.float32), missing),
            np.pad(own.astype(np.int32), missing, constant_values=-1),
            np.pad(relevant.astype(np.int32), missing, constant_values=-1),
        )
        return np.asarray(_exact_ranks(*padded, gallery))[: len(queries)]

    return ranks


@jax.jit
def _exact_ranks(
    queries: jax.Array, own: jax.Array, relevant: jax.Array, gallery: jax.Array
) -> jax.Array:
    """Ranks of the relevant rows, best first, 0 for padding: int32[B, R].

    A right listing's rank = wrong listings that score at least as much + its place among the right
    ones. Counting them costs R passes over the scores, or a search of each score among R.
    """
    scores = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    b = jnp.arange(len(queries))[:, None]
    scores = scores.at[b, jnp.where(own >= 0, own, len(gallery))].set(-jnp.inf, mode="drop")
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
    """How many of a row's scores [B, N] are at least each of its thresholds [B, R], descending."""
    passed = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(least[:, ::-1], scores)
    b = jnp.arange(len(scores))[:, None]
    # counts[b, n]: scores that are at least n of the row's thresholds, and no more of them.
    counts = jnp.zeros((len(least), least.shape[1] + 1), jnp.int32).at[b, passed].add(1)
    return jnp.cumsum(counts[:, ::-1], axis=1)[:, :-1]


def _scann_ranker(gallery_vectors: np.ndarray, queries: np.ndarray) -> tuple[_Ranker, float]:
    """The ranker of a large gallery, and its recall of the exact 10 nearest."""
    rows = np.arange(len(gallery_vectors))
    log.info("building ScaNN's index of %d listings", len(rows))
    index = build_index(gallery_vectors, rows, model_version="evaluated", exact_below=0)

    def ranks(queries: np.ndarray, own: np.ndarray, relevant: np.ndarray, _: int) -> np.ndarray:
        # One rank more than is scored, to see whether a tie goes on; ScaNN scores these exactly.
        depth = APPROXIMATE_DEPTH + 1
        ranked, scores = index.search(queries, depth + own.shape[1])
        removed = metrics.places_of(own, ranked) >= 0
        order = np.argsort(removed, axis=1, kind="stable")[:, :depth]  # own rows go last, and off
        ranked, scores = (np.take_along_axis(x, order, axis=1) for x in (ranked, scores))
        return metrics.relevant_ranks(ranked, scores, relevant)

    return ranks, recall_against_exact(index, gallery_vectors, rows, queries)
