"""Runs retrieval tasks: catalogues in, scores out.

Axes: Q queries · N gallery listings · E embedding.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.corpus import listings_by_product
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.retrieval.evaluation import Results, Task, embed_listings, rank_and_score


class Judge:
    """Embeds listings of one catalogue, each view once, and scores tasks on them.

    embed: this process's rows of a batch -> float32[batch, E]. batch: rows embedded at once, by all
    processes; local: which of them this process makes. attributes: whether texts carry the
    structured attributes.
    """

    def __init__(
        self,
        embed: Callable[[dict[str, np.ndarray]], jax.Array],
        processor: Processor,
        catalog: Catalog,
        *,
        batch: int,
        local: slice,
        attributes: bool,
    ):
        self._embed, self._processor, self._catalog = embed, processor, catalog
        self._batch, self._local, self._attributes = batch, local, attributes
        self._vectors: dict[tuple[str, bytes], np.ndarray] = {}

    def vectors(self, view: str, indices: np.ndarray) -> np.ndarray:
        """float32[N, E] of the listings' view; kept, so that tasks share them."""
        key = (view, indices.tobytes())
        if key not in self._vectors:
            # Decided by the view and not by the rows, so that all processes agree.
            buckets = [self._processor.text_bucket] if view == "text" else []

            def rows(batch: np.ndarray) -> dict[str, np.ndarray]:
                listed = [
                    evaluation_row(
                        self._catalog,
                        int(index),
                        view,
                        attributes=self._attributes,
                        max_images=self._processor.max_images,
                    )
                    for index in batch[self._local]
                ]
                return self._processor(listed, buckets)

            self._vectors[key] = embed_listings(self._embed, rows, indices, self._batch)
        return self._vectors[key]

    def run(self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray) -> Results:
        """Scores of each task; queries int64[Q] and gallery int64[N] are listings' indices.

        A task is left out where there is nothing to find: no queries, or none whose product has
        another listing in the gallery, where the query's own does not count.
        """
        products = self._catalog.products
        results = {}
        for task in tasks:
            if not can_be_run(task, self._catalog, queries, gallery):
                continue
            results[task.name] = rank_and_score(
                self.vectors(task.query_view, queries),
                queries,
                products[queries],
                self.vectors(task.gallery_view, gallery),
                gallery,
                products[gallery],
                exclude_self=task.exclude_self,
            )
        return results


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
