"""Trains the encoder with attribute-guided contrastive learning (AGCL); METHOD: section 3.

1. Draw pairs of listings of one product, look-alikes beside them.
2. Embed queries and targets; weigh and mask the negatives by their attributes.
3. Update; every so often validate and checkpoint.
4. Judge the encoder before and after by finding the test listings' products.

With weights and attribute masks off the same program is VLM2Vec: configs/agcl.py:vlm2vec. With a
head beside it, which tells attributes from embeddings and is left out when they are judged:
configs/agcl.py:head. The loss is the objective that `method` names (`training/objective.py`).

Axes: A micro-batches · C examples of one · V views of an example (query, target, hard negatives) ·
B = A C pairs · E embedding.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.loaded import LoadedEncoder
from afmrl_jax.assembly.model import abstract_params, placed
from afmrl_jax.assembly.options import (
    Embedding,
    EncoderOptions,
    EncoderRows,
    PresetOptions,
    TrainingOptions,
)
from afmrl_jax.assembly.pretrained import planned
from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions
from afmrl_jax.catalog.teachers import TeacherFiles, Teachers
from afmrl_jax.checkpoints.record import check_statistics
from afmrl_jax.checkpoints.state import TrainState, abstract_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import Mixture, parse_mixture
from afmrl_jax.core.mesh import batch_sharding, batch_shards, local_rows, replicated
from afmrl_jax.core.options import Options, among, between, check_options
from afmrl_jax.core.processes import first_says
from afmrl_jax.data.answers import described
from afmrl_jax.data.corpus import (
    TrainedOn,
    attributes_by_category,
    corpus_statistics,
    example_listings,
    look_alikes,
)
from afmrl_jax.data.feed import Feed, true_products
from afmrl_jax.data.pairs import Composition, PairBatches, PairSampler
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import StreamOptions
from afmrl_jax.data.views import (
    PARTS,
    VIEWS,
    Augmentation,
    TrainingViews,
    catalogue_attributes,
    listing_text,
    sampled_cuts,
)
from afmrl_jax.losses.labels import LabelHead
from afmrl_jax.models import lora
from afmrl_jax.planning import cost
from afmrl_jax.planning.report import Part, check_fits
from afmrl_jax.retrieval.evaluator import (
    SIDES,
    RetrievalEvaluator,
    enrichment,
)
from afmrl_jax.retrieval.scores import results_table, write_evaluation
from afmrl_jax.retrieval.tasks import choose_tasks, parse_task, validation_task
from afmrl_jax.training.evaluators import Evaluators, Trained, make_evaluator
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.objective import (
    Method,
    Objective,
    abstract_parts,
    find_objective,
    objective_gradient,
    without_heads,
)
from afmrl_jax.training.optimizer import Optimizer, make_optimizer
from afmrl_jax.training.run import (
    Beginning,
    ModelOptions,
    Run,
    RunOptions,
    first_listings,
    micro_batch,
)
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.step import Batch, Params, TrainStep, make_step

log = logging.getLogger(__name__)

EVALUATIONS = {"before": "evaluation_before.json", "after": "evaluation.json"}
VALIDATION_LISTINGS = 600
TEACHER = "teacher"  # the array of a batch that an objective reads if it has teachers
BATCH_FIELD = "batch"  # the field of the configuration that micro_batches divides
# The first process alone reads and writes the workdir: where checkpoints go to a bucket, each
# machine of a pod may have a workdir of its own.
SHARES_WORKDIR = False


@dataclass(frozen=True)
class PairTraining(Options, section=""):
    """What a step trains on."""

    batch: int = between(1)  # pairs


@dataclass(frozen=True)
class PairRows(Options, section="data"):
    """What the rows of a pair show."""

    query_views: str
    target_views: str
    parts: str  # of pairs of one listing
    described_only: bool  # training listings without attributes are left out
    max_terms: int = between(1)  # attribute terms kept of a listing


@dataclass(frozen=True)
class EncoderEvaluation(Options, section="eval"):
    """How the encoder is judged."""

    tasks: str
    batch: int = between(1)  # rows embedded at once
    attributes: str = among("none", "oracle")  # oracle: the catalogue's join the texts
    enrich: str = among(*SIDES)  # the side whose texts they join


class EncoderEvaluators(Evaluators):
    known = ("retrieval",)


OPTIONS = (
    *(Schedule, Method, PairTraining, Beginning, Optimizer, EncoderEvaluators),
    *(Embedding, EncoderRows, TrainingOptions, PresetOptions),
    *(CatalogOptions, Feed, Composition, Augmentation, PairRows, StreamOptions, EncoderEvaluation),
)


def build(
    config: ConfigDict,
    mesh: Mesh,
    encoder: Encoder,
    objective: Objective,
    batch: Batch,
) -> TrainStep:
    """The train step of a configuration, jitted for a mesh; nothing is computed yet.

    batch: `abstract_batch`, arrays [A, C, V, ...].
    """
    optimizer = make_optimizer(Optimizer.of(config), config.steps)
    params = abstract_params(encoder, mesh)
    trained, frozen = lora.split(params, objective.trainable)
    width = config.model.embedding_dim or encoder.model_config.text.hidden_size
    heads, memory = abstract_parts(objective, trained, batch, width)
    heads, whole = placed(heads, mesh), replicated(mesh)
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), memory)
    abstract = abstract_state(trained | heads, optimizer, mesh, memory)
    gradient = objective_gradient(objective, encoder.embed(), heads)

    def flops(batch: Batch) -> jax.Array:
        amount = cost.work(encoder.model_config, batch)
        return _step_flops(config, encoder, objective, params, amount)

    step = make_step(gradient, optimizer, abstract, mesh, flops)
    return TrainStep(step, optimizer, abstract, frozen, heads)


def abstract_batch(
    config: ConfigDict, mesh: Mesh, encoder: Encoder, teachers: Teachers | None = None
) -> Batch:
    """Shapes, dtypes and shardings of `PairBatches`' arrays that the step may read."""
    rows = micro_batch(config.batch, config.micro_batches, BATCH_FIELD)
    leading = config.micro_batches, rows, 2 + config.data.hard_negatives
    sharding, terms = batch_sharding(mesh, 1), (*leading, config.data.max_terms)
    arrays = {
        "product": (leading, jnp.int32),
        "true_product": (leading, jnp.int32),
        "terms": (terms, jnp.int32),
        "query_weights": (terms, jnp.float32),
        "document_weights": (terms, jnp.float32),
    }
    if teachers:
        arrays["teacher"] = (*leading, teachers.vectors.shape[1]), jnp.float32
        arrays["teacher_weight"] = (*leading, teachers.weights.shape[1]), jnp.float32
    return encoder.abstract_rows(leading, sharding) | {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def _step_flops(
    config: ConfigDict, encoder: Encoder, objective: Objective, params: Params, amount: Any
) -> Any:
    """Useful FLOPs of a step. amount: as `cost.work` gives it."""
    return cost.step_flops(
        encoder.model_config,
        params,
        amount,
        gradcache=config.micro_batches > 1,
        trainable=objective.trainable,
    )


def part(
    config: ConfigDict,
    mesh: Mesh,
    encoder: Encoder,
    objective: Objective,
    step: TrainStep,
    batch: Batch,
) -> Part:
    """The train step as planning compiles it, its rows full. batch: `abstract_batch`."""
    data = config.data
    amount = cost.most_work(
        encoder.model_config, math.prod(batch["product"].shape), data.max_tokens, data.max_patches
    )
    params = encoder_params(step, step.abstract.params, step.frozen)
    pairs = config.batch * config.batch * (1 + data.hard_negatives) / batch_shards(mesh)
    useful = _step_flops(config, encoder, objective, params, amount)
    return step.part(batch, intermediates={"a matrix of all pairs": 4.0 * pairs}, useful=useful)


def plan(config: ConfigDict, mesh: Mesh) -> list[Part]:
    """What `plan` compiles of a run with this configuration: no catalogue is opened.

    Raises UserError for what depends on one.
    """
    rows = micro_batch(config.batch, config.micro_batches, BATCH_FIELD)
    local_rows(mesh, rows, "batch / micro_batches")
    if LabelHead.of(config).head_weight:
        raise UserError("the head's labels depend on the catalogue: plan without loss.head_weight")
    method = find_objective(config.method)
    if TEACHER in method.batch_arrays:
        raise UserError("the teachers' vectors depend on the catalogue: plan with method=agcl")
    options, training = EncoderOptions.of(config), TrainingOptions.of(config)
    encoder = planned(config.init_from or config.model.preset, Encoder, options, training)
    objective = method.of(config, None, mesh)
    batch = abstract_batch(config, mesh, encoder)
    step = build(config, mesh, encoder, objective, batch)
    return [part(config, mesh, encoder, objective, step, batch)]


def encoder_params(step: TrainStep, trained: Params, frozen: Params) -> Params:
    """The encoder's parameters, without the objective's."""
    return lora.join(without_heads(trained, step.heads), frozen)


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or resumes, the whole of it in `workdir`; see configs/agcl.py."""
    check_options(config, OPTIONS)
    with Run(RunOptions.of(config), config.to_json(), workdir, mesh) as run:
        # ---- catalogue
        rows = micro_batch(config.batch, config.micro_batches, BATCH_FIELD)
        local = local_rows(mesh, rows, "batch / micro_batches")
        options = CatalogOptions.of(config)
        cache = options.cache_folder / "corpus"
        catalog = run.open_catalogue(options, functools.partial(_trained_on, config, cache))
        tasks = EvaluationTasks(config, catalog)
        statistics = corpus_statistics(catalog, "train", cache)
        statistics_json = statistics.to_json()
        if run.saved:
            check_statistics(run.saved, statistics_json, workdir)

        # ---- encoder and batches
        options, texts = EncoderOptions.of(config), _tokenizer_texts(config, catalog)
        encoder, source = run.model(Encoder, options, ModelOptions.of(config), texts)
        run.keep(encoder, statistics=statistics_json)
        processor = encoder.processor()
        objective = find_objective(config.method).of(config, statistics, mesh)
        teachers = _teachers(config, catalog, objective)
        batches = pair_batches(config, catalog, processor, statistics, cache, local)
        batches = dataclasses.replace(batches, teachers=teachers)

        # ---- step and state
        batch = abstract_batch(config, mesh, encoder, teachers)
        step = build(config, mesh, encoder, objective, batch)
        compiled = check_fits(part(config, mesh, encoder, objective, step, batch), mesh)
        state, frozen = run.start(step, encoder, source, objective.trainable)

        # ---- judge before
        def params(state: TrainState) -> Params:
            return encoder_params(step, state.params, frozen)

        evaluator = EncoderEvaluator(tasks, Trained(config, mesh, catalog, encoder, params))
        if not run.saved:
            for name in EVALUATIONS.values():  # of a run that died before it saved anything
                (workdir / name).unlink(missing_ok=True)
            log.info("judging the untrained encoder on %d listings", len(tasks.listings))
            evaluator.write(state, workdir / EVALUATIONS["before"])

        # ---- train
        evaluators = {"retrieval": evaluator if tasks.validation else None}
        training = Training(
            step=functools.partial(compiled, frozen),
            batches=batches,
            examples=config.batch,
            unit="pairs",
            rows=rows,
            validate=make_evaluator(config.evaluators, evaluators, evaluator.trained),
        )
        state = fit(training, state, run)

    # ---- judge after
    if not first_says((workdir / EVALUATIONS["after"]).exists()):
        evaluator.write(state, workdir / EVALUATIONS["after"])
    if run.first_process:
        found = {
            when: json.loads((workdir / name).read_text())
            for when, name in EVALUATIONS.items()
            if (workdir / name).exists()
        }
        print(f"{catalog.name}, {tasks.split} split, before and after {config.steps} steps:")
        print(results_table(found), flush=True)


class EvaluationTasks:
    """By which tasks, and on which listings, an encoder is judged.

    listings: int64, of `split`. validation: a task and listings of the validation split; None where
    that holds nothing to find.
    """

    def __init__(self, config: ConfigDict, catalog: Catalog):
        tasks = [parse_task(name) for name in config.eval.tasks.split(",")]
        self.split = "test" if len(catalog.indices("test")) else "validation"
        self.listings = catalog.indices(self.split)
        self.tasks = choose_tasks(tasks, catalog, self.listings)
        self.validation = validation_task(catalog, tasks, VALIDATION_LISTINGS)
        attributes = catalogue_attributes(catalog) if config.eval.attributes == "oracle" else None
        self.enriched = enrichment(attributes, config.eval.enrich)


class EncoderEvaluator:
    """Judges states of the encoder; called with one it is the evaluator `retrieval`."""

    def __init__(self, tasks: EvaluationTasks, trained: Trained):
        self.tasks, self.trained = tasks, trained
        batch = trained.config.eval.batch
        self._loaded = LoadedEncoder(trained.model, None, trained.mesh, batch)

    def _evaluator(self, state: TrainState) -> RetrievalEvaluator:
        loaded = self._loaded.with_params(self.trained.params(state))
        return RetrievalEvaluator(loaded, self.trained.catalog, self.tasks.enriched)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Recall@1 and MRR of the validation task."""
        task, listings = self.tasks.validation
        scores = self._evaluator(state).run([task], listings, listings)[task.name]
        return {"recall@1": scores["recall@1"], "mrr": scores["mrr"]}

    def write(self, state: TrainState, path: Path) -> None:
        """Writes the scores of all tasks."""
        listings = self.tasks.listings
        results = self._evaluator(state).run(self.tasks.tasks, listings, listings)
        if jax.process_index() == 0:
            write_evaluation(path, results)


def _trained_on(config: ConfigDict, cache: Path, catalog: Catalog) -> Catalog:
    """The catalogue with its training listings as the feed brings them; with described_only without
    those that have no attributes."""
    feed = Feed.of(config)
    catalog = feed.with_attributes(catalog, config.seed)
    if config.data.described_only:
        catalog = TrainedOn(catalog, described(catalog, "train", cache))
    return feed.with_ids(catalog, config.seed)


def _tokenizer_texts(config: ConfigDict, catalog: Catalog) -> Iterator[str]:
    yield config.data.instruction
    for index in first_listings(catalog):
        listing = catalog.listing(index)
        yield listing_text(listing, listing.attributes)


def _teachers(config: ConfigDict, catalog: Catalog, objective: Objective) -> Teachers | None:
    """The vectors that the objective learns from, if it does."""
    files = TeacherFiles.of(config)
    if TEACHER in objective.batch_arrays:
        return files.read(catalog)
    if files.teachers:
        raise UserError(
            f"data.teachers is {files.teachers!r}, but the method {config.method} has no teachers: "
            "take configs/distill.py"
        )
    return None


def pair_batches(
    config: ConfigDict,
    catalog: Catalog,
    processor: Processor,
    statistics: CorpusStatistics,
    cache: Path,
    local: np.ndarray,
) -> PairBatches:
    """The batches of a run, step by step.

    statistics: of the training listings. cache: the folder where look-alikes are kept. local:
    int64[C], this process's rows of each micro-batch.
    """
    data, composition = config.data, Composition.of(config)
    augmentation = Augmentation.of(config)
    parts = parse_mixture(data.parts, "data.parts", PARTS)
    _tell_of_equal_photos(data, parts)
    _tell_of_cut_attributes(data, catalog, processor)
    if LabelHead.of(config).head_weight:
        _tell_of_cut_labels(catalog, statistics, data.max_terms)
    neighbours = None
    if composition.needs_look_alikes:
        kept, drop = composition.neighbours, composition.agreeing_neighbours == "drop"
        neighbours = look_alikes(catalog, "train", kept, statistics, cache, drop)
    noisy = augmentation.attribute_share and augmentation.attribute_noise
    others = attributes_by_category(example_listings(catalog, "train")) if noisy else {}
    return PairBatches(
        views=TrainingViews(catalog, augmentation, others),
        sampler=PairSampler(catalog, "train", config.batch, composition, config.seed, neighbours),
        processor=processor,
        statistics=statistics,
        query_views=parse_mixture(data.query_views, "data.query_views", VIEWS),
        target_views=parse_mixture(data.target_views, "data.target_views", VIEWS),
        parts=parts,
        one_rendering=data.identity != "product",
        truth=true_products(catalog),
        max_terms=data.max_terms,
        micro_batches=config.micro_batches,
        rows=local,
        seed=config.seed,
        steps=config.steps,
    )


def _tell_of_equal_photos(data: ConfigDict, parts: Mixture) -> None:
    """Warns where photos give away which listing is whose."""
    if data.identity != "product" and data.crop_area == 1 and {"halves", "words"} & {*parts[0]}:
        log.warning(
            "data.parts=%r shows the same photo on both sides of a pair of one listing, and by its "
            "pixels they match: set data.crop_area below 1, or take modalities and photo alone",
            data.parts,
        )


def _tell_of_cut_labels(catalog: Catalog, statistics: CorpusStatistics, most: int) -> None:
    """Warns where training listings, or some of very many, have more terms than are kept: those are
    the rarest, and what the head tells are the most frequent ones."""
    listings = example_listings(catalog, "train")
    sizes = [len(set(statistics.terms(listing.attributes))) for listing in listings]
    if cut := sum(size > most for size in sizes):
        log.warning(
            "%d of %d training listings read have more than data.max_terms=%d attribute terms, of "
            "which the rarest are kept: the head does not learn their most common labels. "
            "--config.data.max_terms=%d keeps all of theirs",
            *(cut, len(sizes), most, max(sizes)),
        )


def _tell_of_cut_attributes(data: ConfigDict, catalog: Catalog, processor: Processor) -> None:
    """Warns where texts of training listings do not hold the attributes that they are to carry."""
    if data.attribute_share and "text" in data.query_views + data.target_views:
        cuts = sampled_cuts(catalog, "train", processor, max_images=1)
        cuts.tell("training texts with all their attributes")
