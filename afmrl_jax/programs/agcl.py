"""Trains the encoder with attribute-guided contrastive learning (AGCL); METHOD: section 3.

1. Draw pairs of listings of one product, look-alikes beside them.
2. Embed queries and targets; weigh and mask the negatives by their attributes.
3. Update; every so often validate and checkpoint.
4. Judge the encoder before and after by finding the test listings' products.

With weights and attribute masks off the same program is VLM2Vec: configs/agcl.py:vlm2vec. With a
head beside it, which tells attributes from embeddings and is left out when they are judged:
configs/agcl.py:head.

Axes: A micro-batches · C examples of one · V views of an example (query, target, hard negatives) ·
B = A C pairs · E embedding.
"""

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from afmrl_jax.assembly.pretrained import Base, Pretrained, find_pretrained, planned, read_base
from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints, checkpoint_folder
from afmrl_jax.checkpoints.record import (
    check_catalogue,
    check_statistics,
    check_unchanged,
)
from afmrl_jax.checkpoints.state import TrainState, abstract_state, init_state, zeros
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
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
from afmrl_jax.data.pairs import Composition, PairBatches, PairSampler
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import Stream, StreamOptions
from afmrl_jax.data.views import Augmentation, listing_text, parse_mixture, sampled_cuts
from afmrl_jax.losses.contrastive import Contrastive, contrastive_loss
from afmrl_jax.losses.labels import LabelHead, Labels, frequent_labels, label_loss
from afmrl_jax.models import lora
from afmrl_jax.planning import cost
from afmrl_jax.planning.report import Part, check_fits, step_part
from afmrl_jax.retrieval.evaluator import SIDES, Evaluator, catalogue_attributes, enrichment
from afmrl_jax.retrieval.scores import results_table, write_evaluation
from afmrl_jax.retrieval.tasks import Task, choose_tasks, parse_task, validation_task
from afmrl_jax.training import gradcache
from afmrl_jax.training.goodput import Clock, abstract_host
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.optimizer import Optimizer, make_optimizer
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.tracing import traced_steps

log = logging.getLogger(__name__)

PATCHES = ("patches", "patch_positions", "patch_segments", "patch_grids")
ROWS = ("tokens", "token_mask", "positions", *PATCHES)
TERMS = ("product", "terms", "query_weights", "document_weights")
HEAD = "head"  # the name of its parameters beside the encoder's
EVALUATIONS = {"before": "evaluation_before.json", "after": "evaluation.json"}
TOKENIZER_LISTINGS = 20_000  # whose texts a preset's tokenizer is trained on
VALIDATION_LISTINGS = 600


@dataclass(frozen=True)
class PairTraining(Options, section=""):
    """What a run trains on, and begins with."""

    batch: int = between(1)  # pairs
    init_from: str  # a checkpoint or a Hugging Face folder; "" = from scratch


@dataclass(frozen=True)
class PairRows(Options, section="data"):
    """What the rows of a pair show."""

    query_views: str
    target_views: str
    described_only: bool  # training listings without attributes are left out
    max_terms: int = between(1)  # attribute terms kept of a listing


@dataclass(frozen=True)
class EncoderEvaluation(Options, section="eval"):
    """How the encoder is judged."""

    tasks: str
    batch: int = between(1)  # rows embedded at once
    attributes: str = among("none", "oracle")  # oracle: the catalogue's join the texts
    enrich: str = among(*SIDES)  # the side whose texts they join


OPTIONS = (
    *(Schedule, PairTraining, Optimizer, Contrastive, LabelHead),
    *(Embedding, EncoderRows, TrainingOptions, PresetOptions),
    *(CatalogOptions, Composition, Augmentation, PairRows, StreamOptions, EncoderEvaluation),
)


@dataclass(frozen=True)
class Built:
    """The compiled parts of a run, and the state that they expect."""

    start: Callable[[Any], TrainState]  # from parameters, or from scratch with None
    step: Callable[[Any, TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    abstract: TrainState
    frozen: Any  # abstract parameters beside the state's; {} where all are trained


def build(
    config: ConfigDict, mesh: Mesh, enc: Encoder, statistics: CorpusStatistics | None
) -> Built:
    """The train step of a configuration, jitted for a mesh; nothing is computed yet.

    statistics: of the training listings' attributes, from which the head's labels are taken; None
    where there is no head.
    step: (frozen parameters, state, batch of arrays [A, C, V, ...]) -> (state, metrics), the state
    donated; the frozen ones are only read, so there is one copy of them.
    """
    if config.batch % config.micro_batches:
        raise UserError(
            f"micro_batches is {config.micro_batches}, which does not divide the batch of "
            f"{config.batch}"
        )
    optimizer = make_optimizer(Optimizer.of(config), config.steps)
    params = abstract_params(enc, mesh)
    trained, frozen = lora.split(params)
    loss, head = _objective(config, enc, statistics, mesh)
    abstract = abstract_state(trained | head, optimizer, mesh)
    embed = enc.embed()

    @functools.partial(
        jax.jit,
        donate_argnames="state",
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), replicated(mesh)),
    )
    def step(frozen: Any, state: TrainState, batch: dict[str, jax.Array]):
        rows = {name: batch[name] for name in ROWS}
        gradient = gradcache.value_and_grad(
            lambda trained, rows: embed(encoder_params(trained, frozen), rows),
            functools.partial(loss, batch=batch),
        )
        (value, metrics), gradients = gradient(state.params, rows)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        norm, change = optax.global_norm(gradients), optax.global_norm(updates)
        metrics |= {
            "loss": value,
            "gradient_norm": norm,
            "finite": jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(change),
            "host": batch["host"],
            "flops": cost.step_flops(
                enc.model_config,
                params,
                cost.work(enc.model_config, rows),
                gradcache=config.micro_batches > 1,
            ),
        }
        trained = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, trained, opt_state), metrics

    def fresh() -> Any:
        return lora.split(enc.init_params(config.seed))[0] | zeros(head)

    return Built(
        lambda given: init_state(given | zeros(head) if given else fresh, optimizer, abstract),
        step,
        abstract,
        frozen,
    )


def part(config: ConfigDict, mesh: Mesh, enc: Encoder, built: Built) -> Part:
    """The train step as planning compiles it, its rows full."""
    micro_batches, data = config.micro_batches, config.data
    leading = micro_batches, config.batch // micro_batches, 2 + data.hard_negatives
    sharding = batch_sharding(mesh, 1)
    floats = jax.ShapeDtypeStruct((*leading, data.max_terms), jnp.float32, sharding=sharding)
    batch = enc.abstract_rows(leading, sharding) | {
        "product": jax.ShapeDtypeStruct(leading, jnp.int32, sharding=sharding),
        "terms": jax.ShapeDtypeStruct(floats.shape, jnp.int32, sharding=sharding),
        "query_weights": floats,
        "document_weights": floats,
        "host": abstract_host(mesh),
    }
    frozen, state, model = built.frozen, built.abstract, enc.model_config
    amount = cost.most_work(model, math.prod(leading), data.max_tokens, data.max_patches)
    params = encoder_params(state.params, frozen)
    pairs = config.batch * config.batch * (leading[-1] - 1) / batch_shards(mesh)
    inside = {"a matrix of all pairs": 4.0 * pairs}
    useful = cost.step_flops(model, params, amount, gradcache=micro_batches > 1)
    return step_part(built.step, frozen, state, batch, inside=inside, useful=useful)


def plan(config: ConfigDict, mesh: Mesh) -> list[Part]:
    """What `plan` compiles of a run with this configuration: no catalogue is opened.

    Raises UserError for what depends on one.
    """
    local_rows(mesh, config.batch // config.micro_batches, "batch / micro_batches")
    if config.loss.head_weight:
        raise UserError("the head's labels depend on the catalogue: plan without loss.head_weight")
    options, training = EncoderOptions.of(config), TrainingOptions.of(config)
    enc = planned(config.init_from or config.model.preset, Encoder, options, training)
    return [part(config, mesh, enc, build(config, mesh, enc, None))]


def encoder_params(trained: Any, frozen: Any) -> Any:
    """The encoder's part of what is trained, the head left out, and what is frozen."""
    return lora.join({name: part for name, part in trained.items() if name != HEAD}, frozen)


def _objective(
    config: ConfigDict, enc: Encoder, statistics: CorpusStatistics, mesh: Mesh
) -> tuple[Callable[..., tuple[jax.Array, dict[str, jax.Array]]], Any]:
    """`_loss` of (trained, embeddings, batch), and the head's abstract parameters; {} without."""
    options = Contrastive.of(config)
    weight, labels, head = config.loss.head_weight, None, {}
    if weight:
        labels = frequent_labels(statistics, config.loss.head_labels)
        log.info("the head tells %d values of %d attributes", len(labels.terms), labels.n_names)
        width = config.model.embedding_dim or enc.model_config.text.hidden_size
        head = placed({HEAD: labels.abstract_head(width)}, mesh)
    loss = functools.partial(_loss, options=options, labels=labels, head_weight=weight, mesh=mesh)
    return loss, head


def _loss(
    trained: Any,
    embeddings: jax.Array,
    batch: dict[str, jax.Array],
    *,
    options: Contrastive,
    labels: Labels | None,
    head_weight: float,
    mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss, and its metrics: each device's queries against all targets; the head's loss
    of every view beside it.

    trained: the parameters, of which the head's are read here. embeddings: float32[A, C, V, E].
    """
    info = {}
    for name, array in {"embedding": embeddings, **{n: batch[n] for n in TERMS}}.items():
        query, target = _sides(array)
        info[f"query_{name}"] = jax.lax.with_sharding_constraint(query, batch_sharding(mesh))
        info[f"target_{name}"] = jax.lax.with_sharding_constraint(target, replicated(mesh))
    queries, targets = info.pop("query_embedding"), info.pop("target_embedding")
    total, count, metrics = contrastive_loss(queries, targets, info, options)
    value = total / count
    if labels:
        total, count, of_head = label_loss(trained[HEAD], embeddings, batch["terms"], labels)
        value += head_weight * total / jnp.maximum(count, 1)
        metrics |= of_head
    return value, metrics


def _sides(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[A, C, V, ...] -> queries [B, ...], targets [B (V - 1), ...], the positives first.

    C is what the mesh splits, so it becomes the major part of B: nothing moves between devices.
    """
    array = jnp.swapaxes(array, 0, 1)
    parts = [array[:, :, view].reshape(-1, *array.shape[3:]) for view in range(array.shape[2])]
    return parts[0], jnp.concatenate(parts[1:])


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or resumes, the whole of it in `workdir`; see configs/agcl.py."""
    # ---- what is asked, and what is there
    clock = Clock(workdir / "goodput.json")
    first_process = jax.process_index() == 0
    check_options(config, OPTIONS)
    traced_steps(config.profile, config.steps)
    tasks = [parse_task(name) for name in config.eval.tasks.split(",")]
    local = local_rows(mesh, config.batch // config.micro_batches, "batch / micro_batches")
    with Checkpoints(checkpoint_folder(config, workdir), writable=True) as checkpoints:
        saved = checkpoints.record(checkpoints.latest) if checkpoints.latest else None
        if saved:
            check_unchanged(saved["config"], config, workdir)

        # ---- catalogue and encoder
        listings_of = CatalogOptions.of(config)
        catalog = open_catalogue(listings_of, workdir)
        if config.data.described_only:
            catalog = TrainedOn(catalog, described(catalog, "train", listings_of.cache_folder))
        if saved:
            check_catalogue(saved, catalog.fingerprint, config.data.path, workdir)
        shown = catalogue_attributes(catalog) if config.eval.attributes == "oracle" else None
        enriched = enrichment(shown, config.eval.enrich)
        listings = catalog.indices("test")
        split = "test" if len(listings) else "validation"
        listings = catalog.indices(split)
        judged = choose_tasks(tasks, catalog, listings)
        validated = validation_task(catalog, tasks, VALIDATION_LISTINGS)
        statistics, sampler = _sampler(config, catalog)
        if saved:
            check_statistics(saved, statistics.to_json(), workdir)
        enc, source = _encoder(config, catalog, saved)
        processor = enc.processor()
        _tell_of_cut_attributes(config.data, catalog, processor)
        record = enc.record() | {
            "config": config.to_json(),
            "statistics": statistics.to_json(),
            "catalogue": catalog.fingerprint,
        }
        if first_process:
            write_atomically(workdir / "config.json", config.to_json(indent=2))
            write_atomically(workdir / "tokenizer.json", record["tokenizer"])

        # ---- state, step and judges
        built = build(config, mesh, enc, statistics)
        step = check_fits(part(config, mesh, enc, built), mesh)
        frozen = {}
        if enc.lora:
            begun = Base(source.path if source else "", seed=config.seed)
            base = Base.of_record(saved) if saved else begun
            frozen, base = read_base(enc, built.frozen, base)
            record |= base.record()
        if saved:
            state = checkpoints.restore(checkpoints.latest, built.abstract)
        else:
            given = None
            if source and not enc.lora:
                given = source.load(encoder_params(built.abstract.params, {}))
            state = built.start(given)
            for name in EVALUATIONS.values():  # of a run that died before it saved anything
                (workdir / name).unlink(missing_ok=True)

        loaded = LoadedEncoder(enc, None, mesh, config.eval.batch)

        def evaluator(state: TrainState) -> Evaluator:
            params = encoder_params(state.params, frozen)
            return Evaluator(loaded.with_params(params), catalog, enriched)

        def evaluate(state: TrainState, when: str) -> None:
            results = evaluator(state).run(judged, listings, listings)
            if first_process:
                write_evaluation(workdir / EVALUATIONS[when], results)

        if not saved:
            log.info("judging the untrained encoder on %d listings", len(listings))
            evaluate(state, "before")

        # ---- train
        if int(state.step) < config.steps:
            training = Training(
                step=functools.partial(step, frozen),
                open_stream=_open_stream(config, catalog, sampler, processor, statistics, local),
                examples=config.batch,
                unit="pairs",
                chunk=config.batch // config.micro_batches,
                validate=validated and functools.partial(_validate, evaluator, *validated),
                name_listings=lambda rows: [catalog.listing(int(i)).listing_id for i in rows],
                record=record,
            )
            state = fit(training, state, checkpoints, clock, config, workdir, mesh)
        elif first_process:
            print(f"{workdir} is complete: {config.steps} steps are done", flush=True)

    # ---- judge
    if not first_says((workdir / EVALUATIONS["after"]).exists()):
        evaluate(state, "after")
    if first_process:
        found = {
            when: json.loads((workdir / name).read_text())
            for when, name in EVALUATIONS.items()
            if (workdir / name).exists()
        }
        print(f"{catalog.name}, {split} split, before and after {config.steps} steps:")
        print(results_table(found), flush=True)


def _validate(
    evaluator: Callable[[TrainState], Evaluator],
    task: Task,
    listings: np.ndarray,
    state: TrainState,
) -> dict[str, float]:
    scores = evaluator(state).run([task], listings, listings)[task.name]
    return {"validation": scores["recall@1"], "validation_mrr": scores["mrr"]}


def _sampler(config: ConfigDict, catalog: Catalog) -> tuple[CorpusStatistics, PairSampler]:
    """BM25's statistics of the training split, and the sampler with its look-alikes."""
    cache = CatalogOptions.of(config).cache_folder / "corpus"
    composition = Composition.of(config)
    statistics = corpus_statistics(catalog, "train", cache)
    if config.loss.head_weight:
        _tell_of_cut_labels(catalog, statistics, config.data.max_terms)
    neighbours = None
    if composition.needs_look_alikes:
        neighbours = look_alikes(catalog, "train", composition.neighbours, statistics, cache)
    sampler = PairSampler(catalog, "train", config.batch, composition, config.seed, neighbours)
    return statistics, sampler


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


def _open_stream(
    config: ConfigDict,
    catalog: Catalog,
    sampler: PairSampler,
    processor: Processor,
    statistics: CorpusStatistics,
    local: np.ndarray,
) -> Callable[[int], Stream]:
    """A function from the next step to the stream of batches that begins there."""
    data = config.data
    augmentation = Augmentation.of(config)
    noisy = augmentation.attribute_share and augmentation.attribute_noise
    others = attributes_by_category(example_listings(catalog, "train")) if noisy else {}
    batches = PairBatches(
        catalog=catalog,
        sampler=sampler,
        processor=processor,
        statistics=statistics,
        augmentation=augmentation,
        others=others,
        query_views=parse_mixture(data.query_views, "data.query_views"),
        target_views=parse_mixture(data.target_views, "data.target_views"),
        max_terms=data.max_terms,
        micro_batches=config.micro_batches,
        rows=local,
        seed=config.seed,
        steps=config.steps,
    )
    return lambda step: Stream(batches, step, StreamOptions.of(config))


def _encoder(
    config: ConfigDict, catalog: Catalog, saved: dict[str, str] | None
) -> tuple[Encoder, Pretrained | None]:
    """The encoder, and the model that a new run begins with; None: from scratch, or resumed."""
    options, training, source = EncoderOptions.of(config), TrainingOptions.of(config), None
    if saved:
        enc = Encoder.from_record(options, saved)
    elif config.init_from:
        source = find_pretrained(config.init_from)
        return source.for_training(options, training), source
    else:
        texts = [config.data.instruction]
        for index in catalog.indices("train")[:TOKENIZER_LISTINGS]:
            listing = catalog.listing(int(index))
            texts.append(listing_text(listing, listing.attributes))
        enc = Encoder.from_preset(options, PresetOptions.of(config), texts)
    return enc.for_training(training), source
