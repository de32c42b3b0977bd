"""Judges a loaded encoder by retrieval: does a listing find the other listings of its product?

Axes: Q queries · N gallery listings · E embedding.

1. Embed the listings of each view, once (`LoadedEncoder.embed_listings`).
2. Rank the gallery for each query and score the ranking (`ranking.rank_and_score`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.fields import check_choice
from afmrl_jax.retrieval.ranking import Side, rank_and_score
from afmrl_jax.retrieval.scores import Results, Scores
from afmrl_jax.retrieval.tasks import Task, finds_any, parts_of

Attributes = Callable[[int], Mapping[str, str]]  # of a listing, by its index
SIDES = ("both", "queries", "gallery")


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


def catalogue_attributes(catalog: Catalog) -> Attributes:
    """Those that the catalogue holds: the oracle's."""
    return lambda index: catalog.listing(index).attributes


class Evaluator:
    """Embeds listings of one catalogue, each once a view and side, and scores tasks on them.

        scores = Evaluator(model, catalog).run([parse_task("image->text")], listings, listings)

    enriched: what the two sides' texts carry.
    """

    def __init__(self, model: LoadedEncoder, catalog: Catalog, enriched: Enrichment = Enrichment()):
        self._model, self._catalog, self.enriched = model, catalog, enriched
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
            of = key[1] and (lambda number: key[1](int(new[number])))
            added = self._model.embed_listings(self._catalog, new, view, attributes=of).vectors
            order = np.argsort(np.concatenate([known, new]))
            known = np.concatenate([known, new])[order]
            vectors = added if vectors is None else np.concatenate([vectors, added])[order]
            self._known[key] = known, vectors
        return vectors[np.searchsorted(known, indices)]

    def scores(
        self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray
    ) -> dict[str, Scores]:
        """Scores of each task; queries int64[Q] and gallery int64[N] are listings' indices.

        A listing that lacks what its side's view shows is left out of the task. `n_without` counts
        such queries, where there are any; `n_gallery` is what is left to search. A task is left out
        where it has nothing to find: no queries, or none whose product has another listing in the
        gallery, where the query's own does not count. `choose_tasks` tells of both beforehand.
        """
        products, identities = self._catalog.products, self._catalog.identities
        asking, searched = parts_of(self._catalog, queries), parts_of(self._catalog, gallery)
        found = {}
        for task in tasks:
            places = np.flatnonzero(asking[task.query_view])
            asked, others = queries[places], gallery[searched[task.gallery_view]]
            if not finds_any(task, self._catalog, asked, others):
                continue
            asking_vectors = self.vectors(task.query_view, asked, self.enriched.queries)
            searched_vectors = self.vectors(task.gallery_view, others, self.enriched.gallery)
            scores = rank_and_score(
                Side(asking_vectors, identities[asked], products[asked]),
                Side(searched_vectors, identities[others], products[others]),
                exclude_self=task.exclude_self,
            )
            without = len(queries) - len(asked)
            extra = scores.extra | ({"n_without": without} if without else {})
            found[task.name] = Scores(places[scores.queries], scores.values, extra)
        return found

    def run(self, tasks: Sequence[Task], queries: np.ndarray, gallery: np.ndarray) -> Results:
        """Their means: what `scores` gives, over the queries."""
        found = self.scores(tasks, queries, gallery)
        return {task: scores.means() for task, scores in found.items()}
