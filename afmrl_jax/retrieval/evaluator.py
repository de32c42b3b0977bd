"""Judges a loaded encoder by retrieval: does a listing find the other listings of its product?

Axes: Q queries · N gallery listings · E embedding.

1. Embed the listings of each view, once (`LoadedEncoder.embed_listings`).
2. Rank the gallery for each query and score the ranking (`ranking.rank_and_score`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.fields import check_choice
from afmrl_jax.data.views import Attributes
from afmrl_jax.retrieval.ranking import Side, rank_and_score
from afmrl_jax.retrieval.scores import Results, Scores
from afmrl_jax.retrieval.tasks import Task, finds_any, parts_of

SIDES = ("both", "queries", "gallery")


@dataclass(frozen=True)
class Enrichment:
    """The attributes that are appended to the texts of queries and of the gallery; None: no text
    gets any.

    A view without text is the same with and without attributes.
    """

    queries: Attributes | None = None
    gallery: Attributes | None = None


def enrichment(attributes: Attributes | None, side: str) -> Enrichment:
    """Attributes for one of SIDES, or for both. Raises UserError, naming eval.enrich, otherwise."""
    check_choice("eval.enrich", side, SIDES)
    return Enrichment(
        attributes if side != "gallery" else None, attributes if side != "queries" else None
    )


class RetrievalEvaluator:
    """Embeds the listings of one catalogue, once per view and side, and scores tasks on them.

        evaluator = RetrievalEvaluator(model, catalog)
        scores = evaluator.run([parse_task("image->text")], listings, listings)

    enriched: the attributes in the texts of either side.
    """

    def __init__(self, model: LoadedEncoder, catalog: Catalog, enriched: Enrichment = Enrichment()):
        self._model, self._catalog, self.enriched = model, catalog, enriched
        # The vectors so far, by view and attributes: listings int64[N], ascending, and vectors.
        self._embedded: dict[tuple[str, Attributes | None], tuple[np.ndarray, np.ndarray]] = {}

    def vectors(
        self, view: str, indices: np.ndarray, attributes: Attributes | None = None
    ) -> np.ndarray:
        """Vectors of a view of the listings, float32[N, E], with attributes in its text.

        A listing's vector is kept: tasks share it, and so do queries and gallery where both carry
        the same attributes.
        """
        key = (view, attributes if "text" in view else None)
        listings, vectors = self._embedded.get(key, (np.empty(0, np.int64), None))
        new = np.setdiff1d(indices, listings)
        if len(new):
            of = key[1] and (lambda number: key[1](int(new[number])))
            added = self._model.embed_listings(self._catalog, new, view, attributes=of).vectors
            order = np.argsort(np.concatenate([listings, new]))
            listings = np.concatenate([listings, new])[order]
            vectors = added if vectors is None else np.concatenate([vectors, added])[order]
            self._embedded[key] = listings, vectors
        return vectors[np.searchsorted(listings, indices)]

    def scores(
        self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray
    ) -> dict[str, Scores]:
        """Scores of each task; queries int64[Q] and gallery int64[N] are listings' indices.

        A listing without the text or image that its side's view shows is left out of the task.
        `n_without` counts such queries, where there are any; `n_gallery` counts the gallery
        listings that remain. A task is left out where it has nothing to find: no queries, or no
        query whose product has another listing in the gallery (under `exclude_self` the query's
        listing does not count). `choose_tasks` warns of both beforehand.
        """
        products, identities = self._catalog.products, self._catalog.identities
        query_parts = parts_of(self._catalog, queries)
        gallery_parts = parts_of(self._catalog, gallery)
        scores_of = {}
        for task in tasks:
            places = np.flatnonzero(query_parts[task.query_view])
            sources, targets = queries[places], gallery[gallery_parts[task.gallery_view]]
            if not finds_any(task, self._catalog, sources, targets):
                continue
            source_vectors = self.vectors(task.query_view, sources, self.enriched.queries)
            target_vectors = self.vectors(task.gallery_view, targets, self.enriched.gallery)
            scores = rank_and_score(
                Side(source_vectors, identities[sources], products[sources]),
                Side(target_vectors, identities[targets], products[targets]),
                exclude_self=task.exclude_self,
            )
            without = len(queries) - len(sources)
            extra = scores.extra | ({"n_without": without} if without else {})
            scores_of[task.name] = Scores(places[scores.queries], scores.values, extra)
        return scores_of

    def run(self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray) -> Results:
        """Means of `scores` over the queries, {task: {metric: value}}."""
        scores_of = self.scores(tasks, queries, gallery)
        return {task: scores.means() for task, scores in scores_of.items()}
