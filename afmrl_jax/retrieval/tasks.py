"""Runs retrieval tasks: catalogues in, scores out.

Axes: Q queries · N gallery listings · E embedding.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from afmrl_jax.catalog.groups import has_another, whole_products
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_choice
from afmrl_jax.data.processor import Processor, Row
from afmrl_jax.data.views import AttributeCuts, evaluation_row, listing_text
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
            if not _finds_any(task, self._catalog, asked, others):
                continue
            scores = rank_and_score(
                self.vectors(task.query_view, asked, self.enriched.queries),
                identities[asked],
                products[asked],
                self.vectors(task.gallery_view, others, self.enriched.gallery),
                identities[others],
                products[others],
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


def parts_of(catalog: Catalog, listings: np.ndarray) -> dict[str, np.ndarray]:
    """Which of the listings, int64[N], have what a view shows: bool[N] for each view.

    "image+text" shows what there is of the two: every listing has it. Attributes are no text, so
    that the same queries are judged with them and without.
    """
    read = (catalog.listing(int(index)) for index in listings)
    has = [(listing.n_images > 0, bool(listing_text(listing).strip())) for listing in read]
    image, text = np.array(has, bool).reshape(-1, 2).T
    return {"image": image, "text": text, "image+text": image | text}


def can_be_run(
    task: Task, catalog: Catalog, queries: np.ndarray, gallery: np.ndarray | None = None
) -> bool:
    """Whether any query has what its view shows, and something to find among those of the gallery
    (by default, the queries) that have what theirs shows."""
    gallery = queries if gallery is None else gallery
    asked = queries[parts_of(catalog, queries)[task.query_view]]
    return _finds_any(task, catalog, asked, gallery[parts_of(catalog, gallery)[task.gallery_view]])


def choose_tasks(
    tasks: Sequence[Task],
    catalog: Catalog,
    queries: np.ndarray,
    gallery: np.ndarray | None = None,
) -> list[Task]:
    """Those that `can_be_run`; tells which are not, which leave listings out, and why.

    Raises UserError where every task shows something that none of its listings has.
    """
    gallery = queries if gallery is None else gallery
    asking, searched = parts_of(catalog, queries), parts_of(catalog, gallery)
    chosen, blind = [], 0
    for task in tasks:
        asked, others = asking[task.query_view], searched[task.gallery_view]
        lacking = [
            f"{np.sum(~has):,} of {len(has):,} {side} have no {view}"
            for has, side, view in (
                (asked, "queries", task.query_view),
                (others, "gallery listings", task.gallery_view),
            )
            if not has.all()
        ]
        blind += not (asked.any() and others.any())
        if _finds_any(task, catalog, queries[asked], gallery[others]):
            chosen.append(task)
            if lacking:
                log.warning("%s leaves listings out: %s", task.name, ", ".join(lacking))
        else:
            nothing = "no query's product has another listing in the gallery"
            log.warning("%s is left out: %s", task.name, ", ".join(lacking) or nothing)
    if len(queries) and len(gallery) and blind == len(tasks):
        raise UserError(
            f"eval.tasks={', '.join(task.name for task in tasks)} shows what no listing of "
            f"{catalog.name} has: choose tasks of what its listings have, as text->text for one "
            "without images, or mend the catalogue"
        )
    return chosen


def _finds_any(task: Task, catalog: Catalog, queries: np.ndarray, gallery: np.ndarray) -> bool:
    return bool(has_another(catalog, queries, gallery, exclude_self=task.exclude_self).any())


def validation_task(
    catalog: Catalog, tasks: Sequence[Task], limit: int
) -> tuple[Task, np.ndarray] | None:
    """The task by which the best checkpoint is chosen, the first that has something to find among
    some validation listings, and these, int64[N]; None where there is none. Tells so, and where it
    is not the first of all. limit: as in `validation_sample`."""
    listings = validation_sample(catalog, tasks, limit)
    task = next((t for t in tasks if can_be_run(t, catalog, listings)), None)
    if task is None:
        log.warning(
            "no task can be judged on validation listings of %s: the last checkpoint is the best",
            catalog.name,
        )
        return None
    if task != tasks[0]:
        log.warning(
            "%s cannot be judged on the validation listings of %s: the best checkpoint is chosen "
            "by %s",
            *(tasks[0].name, catalog.name, task.name),
        )
    return task, listings


def validation_sample(catalog: Catalog, tasks: Sequence[Task], limit: int) -> np.ndarray:
    """Some `limit` listings of the validation split, whole products, the same at each call.

    They serve the first task that can be run on the split: listings that have neither of what it
    shows are left out, and products with several listings come first where it needs them.
    """
    listings = catalog.indices("validation")
    has, serves = parts_of(catalog, listings), tasks[0]
    for task in tasks:
        asked, others = has[task.query_view], has[task.gallery_view]
        if _finds_any(task, catalog, listings[asked], listings[others]):
            listings, serves = listings[asked | others], task
            break
    return whole_products(catalog, listings, limit, several=serves.exclude_self)
