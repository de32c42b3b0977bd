"""Runs retrieval tasks: catalogues in, scores out.

Axes: Q queries · N gallery listings · E embedding.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.views import evaluation_row
from afmrl_jax.retrieval.evaluation import Results, Task, embed_listings, rank_and_score


class Judge:
    """Embeds listings of one catalogue, each view once, and scores tasks on them.

    embed: rows of `batch` -> float32[batch, E]. attributes: whether texts carry the structured
    attributes.
    """

    def __init__(
        self,
        embed: Callable[[dict[str, np.ndarray]], jax.Array],
        processor: Processor,
        catalog: Catalog,
        *,
        batch: int,
        attributes: bool,
    ):
        self._embed, self._processor, self._catalog = embed, processor, catalog
        self._batch, self._attributes = batch, attributes
        self._vectors: dict[tuple[str, bytes], np.ndarray] = {}

    def vectors(self, view: str, indices: np.ndarray) -> np.ndarray:
        """float32[N, E] of the listings' view; kept, so that tasks share them."""
        key = (view, indices.tobytes())
        if key not in self._vectors:

            def rows(batch: np.ndarray) -> dict[str, np.ndarray]:
                listed = [
                    evaluation_row(
                        self._catalog,
                        int(index),
                        view,
                        attributes=self._attributes,
                        max_images=self._processor.max_images,
                    )
                    for index in batch
                ]
                return self._processor(listed)

            self._vectors[key] = embed_listings(self._embed, rows, indices, self._batch)
        return self._vectors[key]

    def run(self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray) -> Results:
        """Scores of each task; queries int64[Q] and gallery int64[N] are listings' indices.

        A task in which the query's own listing does not count is left out where no query's product
        has another listing in the gallery: there is nothing to find.
        """
        products = self._catalog.products
        counts = np.bincount(products[gallery], minlength=int(products.max()) + 1)
        others = counts[products[queries]] - np.isin(queries, gallery)
        results = {}
        for task in tasks:
            if task.exclude_self and not (others > 0).any():
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
