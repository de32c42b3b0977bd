"""Runs retrieval tasks: catalogues in, scores out.

Axes: Q queries · N gallery listings · E embedding.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from afmrl_jax.core.fields import check_choice
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.corpus import listings_by_product
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import AttributeCuts, evaluation_row
from afmrl_jax.retrieval.evaluation import Results, Scores, Task, embed_listings, rank_and_score

Attributes = Callable[[int], Mapping[str, str]]  # of a listing, by its index
SIDES = ("both", "queries", "gallery")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enrichment:
    """The attributes that join the texts of queries and of the gallery; None: they stay plain.

    A view without text has nowhere to put them, and is the same with and without.
    """

    queries: Attributes | None = None
    gallery: Attributes | None = None


def enrichment(attributes: Attributes | None, side: str) -> Enrichment:
    """Attributes for one of SIDES, or for both. Raises UserError, naming eval.enrich, otherwise."""
    check_choice("eval.enrich", side, SIDES)
    return Enrichment(
        attributes if side != "gallery" else None, attributes if side != "queries" else None
    )


def own_attributes(catalog: Catalog) -> Attributes:
    """Those that the catalogue holds: the oracle's."""
    return lambda index: catalog.listing(index).attributes


class Judge:
    """Embeds listings of one catalogue, each once a view and side, and scores tasks on them.

    embed: this process's rows of a batch -> float32[batch, E]. batch: rows embedded at once, by all
    processes; local: which of them this process makes. enriched: what the two sides' texts carry.
    """

    def __init__(
        self,
        embed: Callable[[dict[str, np.ndarray]], jax.Array],
        processor: Processor,
        catalog: Catalog,
        *,
        batch: int,
        local: np.ndarray,
        enriched: Enrichment = Enrichment(),
    ):
        self._embed, self._processor, self._catalog = embed, processor, catalog
        self._batch, self._local, self.enriched = batch, local, enriched
        # What was embedded, by view and attributes: listings int64[N], ascending, and vectors.
        self._known: dict[tuple[str, Attributes | None], tuple[np.ndarray, np.ndarray]] = {}

    def vectors(
        self, view: str, indices: np.ndarray, attributes: Attributes | None = None
    ) -> np.ndarray:
        """float32[N, E] of the listings' view, with attributes in its text.

        A listing's vector is kept, so that tasks share it, and queries and gallery where both carry
        the same attributes.
        """
        key = (view, attributes if "text" in view else None)
        known, vectors = self._known.get(key, (np.empty(0, np.int64), None))
        new = np.setdiff1d(indices, known)
        if len(new):
            added = self._embedded(*key, new)
            order = np.argsort(np.concatenate([known, new]))
            known = np.concatenate([known, new])[order]
            vectors = added if vectors is None else np.concatenate([vectors, added])[order]
            self._known[key] = known, vectors
        return vectors[np.searchsorted(known, indices)]

    def _embedded(self, view: str, attributes: Attributes | None, new: np.ndarray) -> np.ndarray:
        # Decided by the view and not by the rows, so that all processes agree.
        buckets = [self._processor.text_bucket] if view == "text" else []
        cuts = AttributeCuts(self._processor)

        def row(index: int) -> Row:
            return evaluation_row(
                self._catalog,
                index,
                view,
                max_images=self._processor.max_images,
                attributes=attributes(index) if attributes else {},
            )

        def rows(batch: np.ndarray) -> dict[str, np.ndarray]:
            return self._processor(cuts.made(batch[self._local], row), buckets)

        vectors = embed_listings(self._embed, rows, new, self._batch)
        cuts.tell(view)
        return vectors

    def scores(
        self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray
    ) -> dict[str, Scores]:
        """Scores of each task; queries int64[Q] and gallery int64[N] are listings' indices.

        A task is left out where there is nothing to find: no queries, or none whose product has
        another listing in the gallery, where the query's own does not count.
        """
        products = self._catalog.products
        found = {}
        for task in tasks:
            if not can_be_run(task, self._catalog, queries, gallery):
                continue
            found[task.name] = rank_and_score(
                self.vectors(task.query_view, queries, self.enriched.queries),
                queries,
                products[queries],
                self.vectors(task.gallery_view, gallery, self.enriched.gallery),
                gallery,
                products[gallery],
                exclude_self=task.exclude_self,
            )
        return found

    def run(self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray) -> Results:
        """Their means: what `scores` gives, over the queries."""
        found = self.scores(tasks, queries, gallery)
        return {task: scores.means() for task, scores in found.items()}


def can_be_run(
    task: Task, catalog: Catalog, queries: np.ndarray, gallery: np.ndarray | None = None
) -> bool:
    """Whether any query has something to find in the gallery (by default, the queries)."""
    gallery = queries if gallery is None else gallery
    counts = np.bincount(catalog.products[gallery], minlength=int(catalog.products.max()) + 1)
    found = counts[catalog.products[queries]]
    if task.exclude_self:
        found = found - np.isin(queries, gallery)
    return bool((found > 0).any())


def validation_sample(catalog: Catalog, tasks: Sequence[Task], limit: int) -> np.ndarray:
    """Some `limit` listings of the validation split, whole products, the same at each call.

    Products with several listings come first where the first task needs them.
    """
    listings, starts = listings_by_product(catalog, "validation")
    sizes = np.diff(starts)
    order = np.random.default_rng(0).permutation(len(sizes))
    if tasks[0].exclude_self and (sizes > 1).any():
        order = order[sizes[order] > 1]
    chosen = order[: int(np.searchsorted(np.cumsum(sizes[order]), limit)) + 1]
    parts = [listings[starts[product] : starts[product + 1]] for product in chosen]
    return np.sort(np.concatenate(parts)) if parts else listings
