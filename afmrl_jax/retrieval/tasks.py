"""Retrieval tasks: the views of queries and gallery, and which tasks a catalogue allows.

Axes: Q queries · N gallery listings.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afmrl_jax.catalog.groups import has_another, whole_products
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.views import VIEWS, listing_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The view of a listing that is the query, and the view that is searched: image->text."""

    query_view: str
    gallery_view: str

    @property
    def name(self) -> str:
        return f"{self.query_view}->{self.gallery_view}"

    @property
    def exclude_self(self) -> bool:
        """Whether the query's listing is taken out of the ranking.

        Where the views share a modality, the listing would find itself by comparing a photo or a
        text with itself. Where they share none (image->text), the listing's text is a right answer.
        """
        return bool(set(self.query_view.split("+")) & set(self.gallery_view.split("+")))


def parse_task(name: str) -> Task:
    """Reads "QUERY->GALLERY", each one of VIEWS. Raises UserError, with a suggestion, otherwise."""
    tasks = {task.name: task for task in (Task(q, g) for q in VIEWS for g in VIEWS)}
    sides = name.replace(" ", "").lower().split("->")
    plain = "->".join(
        "+".join(sorted(side.split("+"))) for side in sides
    )  # text+image is known too
    if plain in tasks:
        return tasks[plain]
    close = difflib.get_close_matches(plain, tasks, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(tasks)}"
    raise UserError(f'evaluation task "{name}" is not known; {hint}')


def parts_of(catalog: Catalog, listings: np.ndarray) -> dict[str, np.ndarray]:
    """Which of the listings, int64[N], have the text or image of a view: bool[N] for each view.

    For "image+text" one of the two is enough. Attributes do not count as text, so that the same
    queries are scored with and without them.
    """
    read = (catalog.listing(int(index)) for index in listings)
    has = [(listing.n_images > 0, bool(listing_text(listing).strip())) for listing in read]
    image, text = np.array(has, bool).reshape(-1, 2).T
    return {"image": image, "text": text, "image+text": image | text}


def can_be_run(
    task: Task, catalog: Catalog, queries: np.ndarray, gallery: np.ndarray | None = None
) -> bool:
    """Whether any query that has its view's text or image can find a listing of its product: one of
    the gallery (the queries by default) that has the gallery view's."""
    gallery = queries if gallery is None else gallery
    sources = queries[parts_of(catalog, queries)[task.query_view]]
    targets = gallery[parts_of(catalog, gallery)[task.gallery_view]]
    return finds_any(task, catalog, sources, targets)


def choose_tasks(
    tasks: Sequence[Task],
    catalog: Catalog,
    queries: np.ndarray,
    gallery: np.ndarray | None = None,
) -> list[Task]:
    """The tasks that `can_be_run`; warns of the others, and of listings that a task leaves out.

    Raises UserError where no task has a query and a gallery listing with the text or image of its
    views.
    """
    gallery = queries if gallery is None else gallery
    query_parts, gallery_parts = parts_of(catalog, queries), parts_of(catalog, gallery)
    chosen, blind = [], 0
    for task in tasks:
        sources, targets = query_parts[task.query_view], gallery_parts[task.gallery_view]
        lacking = [
            f"{np.sum(~has):,} of {len(has):,} {side} have no {view}"
            for has, side, view in (
                (sources, "queries", task.query_view),
                (targets, "gallery listings", task.gallery_view),
            )
            if not has.all()
        ]
        blind += not (sources.any() and targets.any())
        if finds_any(task, catalog, queries[sources], gallery[targets]):
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


def finds_any(task: Task, catalog: Catalog, queries: np.ndarray, gallery: np.ndarray) -> bool:
    """Whether any of the queries has another listing of its product among those of the gallery."""
    return bool(has_another(catalog, queries, gallery, exclude_self=task.exclude_self).any())


def validation_task(
    catalog: Catalog, tasks: Sequence[Task], limit: int
) -> tuple[Task, np.ndarray] | None:
    """The task by which the best checkpoint is chosen, and validation listings for it, int64[N].

    It is the first task that `can_be_run` on the listings; None where there is none. Warns where it
    is not the first of the tasks. limit: as in `validation_sample`."""
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
    """About `limit` listings of the validation split, whole products, the same at each call.

    They are chosen for the first task that can be run on the split: listings without the text or
    image of its views are left out, and products with several listings come first where the task
    needs several.
    """
    listings = catalog.indices("validation")
    has, serves = parts_of(catalog, listings), tasks[0]
    for task in tasks:
        sources, targets = has[task.query_view], has[task.gallery_view]
        if finds_any(task, catalog, listings[sources], listings[targets]):
            listings, serves = listings[sources | targets], task
            break
    return whole_products(catalog, listings, limit, several=serves.exclude_self)
