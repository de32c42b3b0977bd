"""Retrieval tasks: what of a listing asks, what is searched, and which tasks can be judged.

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
    return finds_any(task, catalog, asked, gallery[parts_of(catalog, gallery)[task.gallery_view]])


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
        if finds_any(task, catalog, queries[asked], gallery[others]):
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
    """Whether any query has something to find; queries, gallery: those that have what is shown."""
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
        if finds_any(task, catalog, listings[asked], listings[others]):
            listings, serves = listings[asked | others], task
            break
    return whole_products(catalog, listings, limit, several=serves.exclude_self)
