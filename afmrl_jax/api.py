"""The functions for notebooks and services: `import afmrl_jax as aj`, then `aj.load` and the rest.

A wrong argument raises UserError with a readable message. Axes: N rows · E embedding.
"""

import contextlib
import dataclasses
import difflib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.loaded import LoadedEncoder, LoadedGenerator, chosen_listings
from afmrl_jax.assembly.options import EncoderOptions
from afmrl_jax.assembly.pretrained import find_pretrained, model_class_of
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.configs import common
from afmrl_jax.configs import evaluate as evaluate_page
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.mesh import batch_shards, local_rows, make_mesh
from afmrl_jax.core.pages import check_page, load_page
from afmrl_jax.data.views import catalogue_attributes
from afmrl_jax.retrieval import indexes
from afmrl_jax.retrieval.evaluator import RetrievalEvaluator, enrichment
from afmrl_jax.retrieval.index import Index
from afmrl_jax.retrieval.tasks import choose_tasks, parse_task

BATCH = 32  # rows at once, where a mesh can split so many


def load(
    path: str | Path,
    *,
    batch: int | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    **fields: Any,
) -> LoadedEncoder | LoadedGenerator:
    """The encoder or generator that `path` names, with its parameters on the devices.

        model = aj.load("runs/agcl")

    path: a run's workdir (of an encoder its last checkpoint, of a generator the best on
    validation), one checkpoint, an exported or other Hugging Face folder, a name on the hub.
    batch: rows computed at once; 32, or what the mesh can split, by default. mesh: a mesh, or the
    lengths of its axes as in a configuration ({"fsdp": 4}); by default each device is a replica.
    fields: of configs/evaluate.py, as **{"data.prompt": "chat"}, for a folder that no run wrote.

    Raises UserError where there is no model, or fields are given for a model that a run wrote.
    """
    if not isinstance(mesh, Mesh):
        lengths = dict(common.get_config().mesh)
        if unknown := sorted(set(mesh or {}) - set(lengths)):
            raise UserError(f"mesh has no axis {unknown[0]!r}: it has {', '.join(lengths)}")
        mesh = make_mesh(lengths | dict(mesh or {}))
    shards = batch_shards(mesh)
    batch = shards * math.ceil(BATCH / shards) if batch is None else batch
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"batch is {batch!r}: give a whole number of rows, 1 or more")
    local_rows(mesh, batch, "batch")
    path = str(path)
    model_class = model_class_of(path)
    best = False if model_class is Encoder else None
    source = find_pretrained(path, model_class, best=best)
    if fields and source.model.options:
        raise UserError(
            f"{path} was trained by a run, which says how it is used: leave out "
            f"{', '.join(sorted(fields))}"
        )
    if model_class is Encoder:
        options = EncoderOptions.of(_with_fields(evaluate_page.get_config(), fields))
        return LoadedEncoder.of(source, mesh, batch, options)
    return LoadedGenerator.of(source, mesh, batch)


def open_catalog(path: str | Path, *, report_dir: str | Path = ".", **fields: Any) -> Catalog:
    """A catalogue of listings.

        catalog = aj.open_catalog("products/", attributes="runs/annotated/attributes.jsonl")

    path: "builtin", a folder with a products.jsonl, a Parquet file, tfds:NAME, or several with
    commas between. report_dir: folder for the report of bad listings. fields: attributes,
    cache_dir, on_bad_listing, shared_ids and builtin.NAME of the configuration's `data`. Raises
    UserError where the catalogue cannot be read.
    """
    page = evaluate_page.get_config().data
    defaults = {field.name: page[field.name] for field in dataclasses.fields(CatalogOptions)}
    data = _with_fields(ConfigDict(defaults), {**fields, "path": str(path)})
    return open_catalogue(CatalogOptions.of({"data": data}), Path(report_dir))


def build_index(
    vectors: np.ndarray, ids: Sequence[int] | np.ndarray | None = None, *, model: LoadedEncoder
) -> Index:
    """An index of vectors that a model made: exact, or ScaNN's from 50,000 rows on.

        index = aj.build_index(model.embed(texts), ids=range(len(texts)), model=model)
        ids, scores = index.search(model.embed("blue dress"), k=5)

    vectors: float32[N, E]. ids: N whole numbers, unique and not negative; 0 to N - 1 by default.
    The index records the model's version. Raises UserError for other vectors or ids.
    """
    if not isinstance(model, LoadedEncoder):
        raise UserError("model is no encoder: give what aj.load returned of one")
    vectors = np.asarray(vectors)
    ids = np.arange(len(vectors)) if ids is None else np.asarray(ids)
    return indexes.build_index(vectors, ids, model_version=model.version)


def evaluate(
    model: LoadedEncoder,
    catalog: Catalog,
    tasks: str = "image+text->image+text",
    *,
    split: str = "",
    attributes: str = "none",
    enrich: str = "both",
) -> dict[str, dict[str, float]]:
    """Retrieval scores of a model on a catalogue: {task: {metric: value}}.

        scores = aj.evaluate(model, catalog, tasks="image->text, text->image")

    tasks: QUERY->GALLERY each, with commas between. split: the listings; "" = the test split where
    there is one, else all. attributes: none, or oracle, the catalogue's. enrich: the side whose
    texts get attributes: both, queries or gallery. Raises UserError for another word, and where no
    listing has another of its product to find.
    """
    if not isinstance(model, LoadedEncoder):
        raise UserError("model is no encoder: give what aj.load returned of one")
    if attributes not in ("none", "oracle"):
        raise UserError(f"attributes is {attributes!r}: give none or oracle")
    named = [parse_task(name) for name in tasks.split(",")]
    split = split or ("test" if len(catalog.indices("test")) else "all")
    listings = chosen_listings(catalog, split)
    chosen = choose_tasks(named, catalog, listings)
    if not chosen:
        raise UserError(
            f"no listing of the {split} split of {catalog.name} has another of its product there"
        )
    carried = catalogue_attributes(catalog) if attributes == "oracle" else None
    evaluator = RetrievalEvaluator(model, catalog, enrichment(carried, enrich))
    scores = evaluator.run(chosen, listings, listings)
    return {task: dict(values) for task, values in scores.items()}


def train(config: str | Path, workdir: str | Path, **fields: Any) -> Path:
    """Runs a program, as `python -m afmrl_jax.main --config=...` does; returns the workdir.

        run = aj.train("configs/agcl.py", "runs/mine", steps=120, **{"data.path": "products/"})

    config: a page, with :ARM where it has arms; those of the package are found from any folder.
    workdir: the folder of the run; a second call resumes it. fields: values that replace those of
    the page. Raises UserError for fields that neither the page nor a method outside the package
    has, and as the program does.
    """
    from afmrl_jax.runner import run

    page = _updated(load_page(str(config)), fields)
    check_page(page)
    with _messages_shown():
        run(page, Path(workdir))
    return Path(workdir)


def _with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """`_updated`; raises UserError for a field that the configuration does not have, too."""
    known = flatten(config)
    for name in fields.keys() - known:
        raise _no_field(name, known)
    return _updated(config, fields)


def _no_field(name: str, known: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return UserError(f"there is no field {name!r}{hint}")


def _updated(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """The configuration with dotted fields set, or added. Raises UserError for a value of another
    type than the field has."""
    config, values = ConfigDict(config.to_dict()), flatten(config)
    for name, value in fields.items():
        try:
            config.update_from_flattened_dict({name: value})
        except (KeyError, TypeError):
            if name not in values:  # a section, or inside a field
                raise _no_field(name, values) from None
            raise UserError(
                f"{name} is {value!r}: expected {type(values[name]).__name__}, as {values[name]!r}"
            ) from None
    return config.lock()


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
    """Prints the package's messages where its logger has no handler, and silences Orbax, which
    would warn of its temporary folders at each save."""
    from absl import logging as absl_logging

    logger, verbosity = logging.getLogger("afmrl_jax"), absl_logging.get_verbosity()
    before, handler = (logger.level, logger.propagate), None
    absl_logging.set_verbosity("fatal")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl's handler would print it again
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
        if handler:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before
