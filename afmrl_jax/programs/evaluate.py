"""Judges any checkpoint on any catalogues.

1. Open the catalogues of the queries and of the gallery.
2. Embed both with the checkpoint's encoder, each view that a task needs.
3. Rank the gallery for each query; write and print the scores.
"""

import functools
import logging
import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, flatten
from afmrl_jax.core.writer import write_atomically
from afmrl_jax.data.catalog import Catalog, ConcatCatalog
from afmrl_jax.data.opening import open_listings, with_attributes
from afmrl_jax.retrieval.evaluation import parse_task, results_table, write_evaluation
from afmrl_jax.retrieval.tasks import Judge
from afmrl_jax.training.encoder import abstract_params, host_embedder
from afmrl_jax.training.pretrained import find_pretrained

log = logging.getLogger(__name__)


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Writes `evaluation.json` into the workdir; see configs/evaluate.py."""
    # ---- checkpoint
    check_ranges(flatten(config), {"eval.batch": (1, math.inf)})
    if not config.checkpoint:
        raise UserError("say which checkpoint to judge, as --config.checkpoint=runs/agcl")
    tasks = [parse_task(name) for name in config.eval.tasks.split(",")]
    if (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a training run: name another --workdir for the scores")
    source = find_pretrained(config.checkpoint, best=config.best)
    if source.enc.settings:
        log.info(
            "%s was trained with settings of its own, which are used: this configuration's "
            "model fields, prompt, instruction and row sizes do not count",
            config.checkpoint,
        )

    # ---- catalogues
    queries = _names(config.eval.queries) or [config.data.path]
    gallery = _names(config.eval.gallery) or queries
    opened = {
        name: open_listings(name, config.data, workdir) for name in dict.fromkeys(queries + gallery)
    }
    # By content: a catalogue named twice, in two ways, would let a query find itself.
    distinct = {catalog.fingerprint: catalog for catalog in opened.values()}
    catalog = with_attributes(ConcatCatalog(list(distinct.values())), config.data, workdir)
    starts = dict(zip(distinct, np.cumsum([0, *map(len, distinct.values())])))

    def indices(names: list[str], split: str) -> np.ndarray:
        named = {opened[name].fingerprint: opened[name] for name in names}
        parts = [_indices(part, split) + starts[key] for key, part in named.items()]
        return np.concatenate(parts)

    # ---- encoder
    enc = source.model(config)
    params = source.load(abstract_params(enc, mesh))
    embed, local = host_embedder(enc.embed(), mesh, config.eval.batch)
    judge = Judge(
        functools.partial(embed, params),
        enc.processor(),
        catalog,
        batch=config.eval.batch,
        local=local,
        attributes=config.eval.attributes,
    )

    # ---- scores
    results = judge.run(
        tasks,
        indices(queries, config.eval.query_split),
        indices(gallery, config.eval.gallery_split),
    )
    if not results:
        raise UserError(
            "no query's product has another listing in the gallery: add a catalogue to "
            "eval.gallery, or a task as image->text to eval.tasks"
        )
    if jax.process_index() == 0:
        write_atomically(workdir / "config.json", config.to_json(indent=2))
        write_evaluation(workdir / "evaluation.json", results)
        print(f"{source.told}, on {catalog.name}:")
        print(results_table({"checkpoint": results}), flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _indices(catalog: Catalog, split: str) -> np.ndarray:
    """A split's listings; with "" the test split's where there is one, else all."""
    listings = catalog.indices(split or "test")
    if not split and not len(listings):
        listings = catalog.indices("all")
    if not len(listings):
        raise UserError(
            f"{catalog.name} has no listings in its {split} split: choose another with "
            "eval.query_split or eval.gallery_split (train, validation, test, all)"
        )
    return listings
