"""Judges any checkpoint on any catalogues.

1. Open the catalogues of the queries and of the gallery.
2. Where eval.attributes names a generator, let it describe the listings whose texts get attributes.
3. Embed each view that a task needs with the checkpoint's encoder.
4. Rank the gallery for each query; with eval.downstream, predict the queries' categories, too.
5. Write and print the scores.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.loaded import LoadedEncoder, load_generator
from afmrl_jax.assembly.options import Embedding, EncoderOptions, EncoderRows
from afmrl_jax.assembly.pretrained import find_pretrained
from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.catalog.opening import (
    CatalogOptions,
    catalogue_names,
    open_listings,
    with_attributes,
)
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.mesh import local_rows
from afmrl_jax.core.options import Options, among, between, check_options
from afmrl_jax.data.views import Attributes, catalogue_attributes
from afmrl_jax.retrieval.downstream import CategoryTask, Unlabelled
from afmrl_jax.retrieval.evaluator import (
    SIDES,
    Enrichment,
    RetrievalEvaluator,
    enrichment,
)
from afmrl_jax.retrieval.scores import results_table, write_evaluation, write_queries
from afmrl_jax.retrieval.tasks import choose_tasks, parse_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedCheckpoint(Options, section=""):
    """The model that is judged."""

    seed: int = between(0, 2**32 - 1)  # of the probe and of k-means
    checkpoint: str  # a workdir, a checkpoint or a Hugging Face folder
    best: bool  # of a workdir, the best on validation instead of the last


@dataclass(frozen=True)
class Retrieval(Options, section="eval"):
    """Queries, gallery, tasks and attributes."""

    queries: str  # catalogues; "" = data.path
    gallery: str  # catalogues; "" = the queries'
    query_split: str = among("", *SPLITS, "all")  # "" = test, else all
    gallery_split: str = among("", *SPLITS, "all")
    tasks: str
    batch: int = between(1)  # rows embedded at once
    attributes: str  # none | oracle | a generator's workdir, checkpoint or folder
    enrich: str = among(*SIDES)  # the side whose texts get attributes
    min_confidence: float = between(0, 1)  # of a generator's attributes
    downstream: bool  # whether categories are predicted, too
    probe_listings: int = between(2)  # at most, for the probe


SHARES_WORKDIR = True  # all processes read it
OPTIONS = (EvaluatedCheckpoint, CatalogOptions, Retrieval)


FOLDER_OPTIONS = (Embedding, EncoderRows)  # for a Hugging Face folder, which does not record them


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes `evaluation.json` and `evaluation_queries.json` into the workdir; see
    configs/evaluate.py."""
    # ---- tasks and encoder
    check_options(config, OPTIONS)
    if not config.checkpoint:
        raise UserError("say which checkpoint to judge, as --config.checkpoint=runs/agcl")
    tasks = [parse_task(name) for name in config.eval.tasks.split(",")]
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for the scores")
    source = find_pretrained(config.checkpoint, best=config.best)
    if source.model.options:
        log.info(
            "%s was trained with settings of its own, which are used: this configuration's "
            "model fields, prompt, instruction and row sizes do not count",
            config.checkpoint,
        )
    options = None if source.model.options else EncoderOptions.of(config)
    # Wrong row sizes or batches should raise their errors before a generator is read.
    source.with_options(options).processor()
    local_rows(mesh, config.eval.batch, "eval.batch")

    # ---- catalogues
    catalog, queries, gallery, training = _listings(config, workdir)
    first, category = tasks[0], None
    tasks = choose_tasks(tasks, catalog, queries, gallery)
    view = (tasks or [first])[0].query_view
    if training is not None:
        limit = config.eval.probe_listings
        category = CategoryTask(catalog, training, queries, view, limit, config.seed)
    if not tasks and not category:
        raise UserError(
            "no query's product has another listing in the gallery: add a catalogue to "
            "eval.gallery, or a task as image->text to eval.tasks"
        )

    # ---- attributes
    embedded = [("queries", task.query_view, queries) for task in tasks]
    embedded += [("gallery", task.gallery_view, gallery) for task in tasks]
    if category:
        embedded += [("queries", view, queries), ("queries", view, category.probe)]
    enriched = _enrichment(config, mesh, catalog, embedded)

    # ---- scores
    model = LoadedEncoder.of(source, mesh, config.eval.batch, options)
    scores_of = RetrievalEvaluator(model, catalog, enriched).scores(tasks, queries, gallery)
    if category:
        vectors = functools.partial(RetrievalEvaluator(model, Unlabelled(catalog)).vectors, view)
        scores_of[category.name] = category.scores(
            functools.partial(vectors, attributes=enriched.queries)
        )
    results = {task: scores.means() for task, scores in scores_of.items()}
    if jax.process_index() == 0:
        write_atomically(workdir / "config.json", config.to_json(indent=2))
        listing_ids = [catalog.listing(int(i)).listing_id for i in queries]
        write_queries(workdir / "evaluation_queries.json", scores_of, listing_ids)
        write_evaluation(workdir / "evaluation.json", results)
        print(f"{source.label}, on {catalog.name}:")
        print(results_table({"checkpoint": results}), flush=True)


class _Listings(NamedTuple):
    """The catalogues of queries and gallery as one, and indices of its listings, int64 each."""

    catalog: Catalog
    queries: np.ndarray
    gallery: np.ndarray
    training: np.ndarray | None  # of the queries' catalogues; None without a probe


def _listings(config: ConfigDict, workdir: Path) -> _Listings:
    # Each is opened separately, so that one that is in both lists has one fingerprint.
    queries = catalogue_names(config.eval.queries or config.data.path) or [""]
    gallery = catalogue_names(config.eval.gallery) or queries
    options = CatalogOptions.of(config)
    opened = {
        name: open_listings(dataclasses.replace(options, path=name), workdir)
        for name in dict.fromkeys(queries + gallery)
    }
    # By content: a catalogue that is named in two ways would let a query find itself.
    distinct = {catalog.fingerprint: catalog for catalog in opened.values()}
    joined = ConcatCatalog(list(distinct.values()), options.shared_ids)
    catalog = with_attributes(joined, options, workdir)
    starts = dict(zip(distinct, np.cumsum([0, *map(len, distinct.values())])))

    def indices(names: list[str], of: Callable[[Catalog], np.ndarray]) -> np.ndarray:
        """Each listing once, though several of the catalogues may hold it."""
        named = {opened[name].fingerprint: opened[name] for name in names}
        listings = np.concatenate([of(part) + starts[key] for key, part in named.items()])
        _, first = np.unique(catalog.identities[listings], return_index=True)
        return listings[np.sort(first)]

    query_indices = indices(queries, lambda part: _indices(part, config.eval.query_split))
    gallery_indices = indices(gallery, lambda part: _indices(part, config.eval.gallery_split))
    training = None
    if config.eval.downstream:
        training = indices(queries, lambda part: part.indices("train"))
        is_query = np.isin(catalog.identities[training], catalog.identities[query_indices])
        training = training[~is_query]
    return _Listings(catalog, query_indices, gallery_indices, training)


def _indices(catalog: Catalog, split: str) -> np.ndarray:
    """The listings of a split; "" = of the test split where there is one, else all."""
    listings = catalog.indices(split or "test")
    if not split and not len(listings):
        listings = catalog.indices("all")
    if not len(listings):
        raise UserError(
            f"{catalog.name} has no listings in its {split} split: choose another with "
            "eval.query_split or eval.gallery_split (train, validation, test, all)"
        )
    return listings


def _enrichment(
    config: ConfigDict, mesh: Mesh, catalog: Catalog, embedded: list[tuple[str, str, np.ndarray]]
) -> Enrichment:
    """The attributes of eval.attributes for the sides of eval.enrich. A generator describes each
    listing once, at once: its parameters leave the device's memory when this returns.

    embedded: the listings that will be embedded, as (side, view, listings).
    """
    chosen = config.eval
    if chosen.min_confidence and chosen.attributes in ("none", "oracle"):
        raise UserError(
            f"eval.min_confidence is {chosen.min_confidence}, but eval.attributes is "
            f"{chosen.attributes}: only a generator says how sure it is"
        )
    if chosen.attributes == "none":
        return Enrichment()
    needed = [
        listings
        for side, view, listings in embedded
        if "text" in view and chosen.enrich in (side, "both")
    ]
    if not needed:
        raise UserError(
            f"attributes join texts, and eval.tasks={chosen.tasks} has none to enrich with "
            f"eval.enrich={chosen.enrich}: set eval.attributes=none, or add a task as "
            "image+text->image+text"
        )
    attributes = catalogue_attributes(catalog)
    if chosen.attributes != "oracle":
        attributes = _described(config, mesh, catalog, np.unique(np.concatenate(needed)))
    return enrichment(attributes, chosen.enrich)


def _described(
    config: ConfigDict, mesh: Mesh, catalog: Catalog, listings: np.ndarray
) -> Attributes:
    """A generator's attributes of the listings, of at least eval.min_confidence."""
    path, least = config.eval.attributes, config.eval.min_confidence
    try:
        generator = load_generator(path, mesh, config.eval.batch)
    except UserError as error:
        raise UserError(
            f"eval.attributes is {path!r}, neither none nor oracle, and as a generator: {error}"
        ) from None
    log.info("%s describes %d listings", path, len(listings))
    descriptions = generator.describe(catalog, listings)
    sure = {int(i): listing.sure(least) for i, listing in zip(listings, descriptions)}
    log.info(
        "%.1f%% of them got attributes, %.1f on average",
        100 * np.mean([bool(attributes) for attributes in sure.values()]),
        np.mean([len(attributes) for attributes in sure.values()]),
    )
    return sure.__getitem__
