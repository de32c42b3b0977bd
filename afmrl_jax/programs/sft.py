"""Trains the generator to answer a listing with its attributes (SFT); METHOD: section 4.

1. Show listings as questions; their attributes, as the catalogue or an oracle gives them, are the
   answers. A base (configs/pretrain.py) is also asked for some attributes, and for titles.
2. Update by the cross-entropy of the answers' tokens; every so often let it answer, checkpoint.
3. Judge the answers to the test listings: format, pairs, whole sets; beside them what one would
   guess who knows the category alone.

With a larger model's attributes (data.attributes) the same program distils that model.

Axes: A micro-batches · C rows of one · S tokens.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import (
    Computation,
    GeneratorOptions,
    GeneratorRows,
    PresetOptions,
    TrainingOptions,
)
from afmrl_jax.assembly.pretrained import planned
from afmrl_jax.attributes.text import MAX_CHARACTERS, MAX_PAIRS, format_attributes, normalise
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions
from afmrl_jax.checkpoints.state import TrainState, abstract_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import parse_mixture
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.mesh import batch_sharding, batch_shards, local_rows
from afmrl_jax.core.options import Options, between, check_options
from afmrl_jax.core.processes import first_says
from afmrl_jax.data.answers import (
    SAMPLED,
    AnswerBatches,
    AnswerOptions,
    described,
    learnable,
)
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import StreamOptions
from afmrl_jax.data.views import VIEWS, listing_text
from afmrl_jax.models import lora
from afmrl_jax.planning import cost
from afmrl_jax.planning.report import Part, check_fits
from afmrl_jax.training.answer_evaluator import AnswerEvaluation, AnswerEvaluator, results_table
from afmrl_jax.training.evaluators import Evaluators, Trained, make_evaluator
from afmrl_jax.training.gradients import accumulate
from afmrl_jax.training.loop import Training, fit
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
from afmrl_jax.training.step import Batch, Memory, Params, TrainStep, make_step

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
BATCH_FIELD = "batch"  # the field of the configuration that micro_batches divides
SHARES_WORKDIR = False  # as in agcl.py


@dataclass(frozen=True)
class AnswerTraining(Options, section=""):
    """What a step trains on."""

    batch: int = between(1)  # answers
    vocabulary_chunk: int = between(1)  # tokens of each row whose logits are in memory at once


class AnswerEvaluators(Evaluators):
    known = ("answers",)


OPTIONS = (
    *(Schedule, AnswerTraining, Beginning, AnswerEvaluators),
    *(Optimizer, TrainingOptions, PresetOptions),
    *(Computation, GeneratorRows, CatalogOptions, AnswerOptions, StreamOptions, AnswerEvaluation),
)


def build(config: ConfigDict, mesh: Mesh, generator: Generator) -> TrainStep:
    """The train step of a configuration, jitted for a mesh; nothing is computed yet.

    Its batches are arrays [A, C, ...].
    """
    optimizer = make_optimizer(Optimizer.of(config), config.steps)
    params, model = abstract_params(generator, mesh), generator.model_config
    trained, frozen = lora.split(params)
    abstract = abstract_state(trained, optimizer, mesh)
    loss = generator.answer_loss(config.vocabulary_chunk)

    def gradient(trained: Params, frozen: Params, memory: Memory, rows: Batch):
        def of_part(trained: Params, rows: Batch) -> tuple[jax.Array, jax.Array]:
            return loss(lora.join(trained, frozen), rows)

        (value, count), gradients = accumulate(of_part)(trained, rows)
        return (value, memory, {"answer_tokens": count}), gradients

    def flops(rows: Batch) -> jax.Array:
        # A row's first token has nothing before it, and is never scored.
        logits = rows["answer_mask"][..., 1:].sum(dtype=jnp.float32)
        work = cost.work(model, rows) | {"logits": logits}
        return cost.step_flops(model, params, work, gradcache=False)

    step = make_step(gradient, optimizer, abstract, mesh, flops)
    return TrainStep(step, optimizer, abstract, frozen)


def part(
    config: ConfigDict, mesh: Mesh, generator: Generator, step: TrainStep, length: int = 0
) -> Part:
    """The train step as planning compiles it, its rows full. length: S, the longest by default."""
    rows, data = micro_batch(config.batch, config.micro_batches, BATCH_FIELD), config.data
    length, model = length or data.max_tokens + data.max_answer, generator.model_config
    leading, sharding = (config.micro_batches, rows), batch_sharding(mesh, 1)
    batch = generator.abstract_rows(leading, sharding, answers=data.max_answer, length=length)
    amount = cost.most_work(model, config.batch, length, data.max_patches)
    amount |= {"logits": float(config.batch * data.max_answer)}
    logits = 4.0 * rows * config.vocabulary_chunk * model.vocab_size
    params = lora.join(step.abstract.params, step.frozen)
    useful = cost.step_flops(model, params, amount, gradcache=False)
    return step.part(batch, intermediates={"logits": logits / batch_shards(mesh)}, useful=useful)


def plan(config: ConfigDict, mesh: Mesh) -> list[Part]:
    """What `plan` compiles of a run with this configuration: no catalogue is opened."""
    rows = micro_batch(config.batch, config.micro_batches, BATCH_FIELD)
    local_rows(mesh, rows, "batch / micro_batches")
    options, training = GeneratorOptions.of(config), TrainingOptions.of(config)
    generator = planned(config.init_from or config.model.preset, Generator, options, training)
    return [part(config, mesh, generator, build(config, mesh, generator))]


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or resumes, the whole of it in `workdir`; see configs/sft.py."""
    check_options(config, OPTIONS)
    with Run(RunOptions.of(config), config.to_json(), workdir, mesh) as run:
        # ---- catalogue
        rows = micro_batch(config.batch, config.micro_batches, BATCH_FIELD)
        local = local_rows(mesh, rows, "batch / micro_batches")
        catalog = run.open_catalogue(CatalogOptions.of(config))
        listings = _listings(config, catalog)

        # ---- generator and batches
        options, texts = GeneratorOptions.of(config), _tokenizer_texts(config, catalog)
        generator, source = run.model(Generator, options, ModelOptions.of(config), texts)
        processor = generator.processor(answers=True)
        _check_answers_fit(catalog, listings["train"], processor)
        run.keep(generator)
        batches = AnswerBatches(
            catalog,
            listings["train"],
            {"attributes": processor} | _other_processors(config, generator),
            batch=config.batch,
            micro_batches=config.micro_batches,
            rows=local,
            options=AnswerOptions.of(config),
            seed=config.seed,
            steps=config.steps,
        )

        # ---- step and state
        step = build(config, mesh, generator)
        # The longest rows first: what does not fit is told before all the others are compiled.
        lengths = reversed(batches.lengths)
        parts = {length: part(config, mesh, generator, step, length) for length in lengths}
        compiled = {length: check_fits(parts[length], mesh) for length in parts}
        state, frozen = run.start(step, generator, source)
        if not run.saved:
            (workdir / EVALUATION).unlink(missing_ok=True)  # of a run that never saved

        # ---- train
        def params(state: TrainState) -> Params:
            return lora.join(state.params, frozen)

        trained = Trained(config, mesh, catalog, generator, params)
        options = AnswerEvaluation.of(config)
        evaluator = AnswerEvaluator(trained, options, config.vocabulary_chunk, listings, workdir)
        evaluator.go_on(int(state.step))
        evaluators = {"answers": evaluator if len(listings["validation"]) else None}
        training = Training(
            step=lambda state, batch: compiled[batch["tokens"].shape[-1]](frozen, state, batch),
            batches=batches,
            examples=config.batch,
            unit="answers",
            rows=rows,
            validate=make_evaluator(config.evaluators, evaluators, trained),
            shapes=len(compiled),
        )
        state = fit(training, state, run)

    # ---- judge
    path = workdir / EVALUATION
    split = "test" if len(listings["test"]) else "validation"
    if not first_says(path.exists()) and len(listings[split]):
        results = evaluator.scores(state, split)
        views = parse_mixture(config.data.question_views, "data.question_views", VIEWS)[0]
        if len(views) > 1:
            results["by_view"] = evaluator.by_view(state, split, views)
        if run.first_process:
            write_atomically(path, json.dumps(results, indent=2))
    if run.first_process and path.exists():
        print(f"{catalog.name}, {split} split, after {config.steps} steps:")
        print(results_table(json.loads(path.read_text(encoding="utf-8"))), flush=True)


def _listings(config: ConfigDict, catalog: Catalog) -> dict[str, np.ndarray]:
    """split -> int64, its listings that have attributes; of validation and test as many as are
    asked for, the same at each call."""
    cache = CatalogOptions.of(config).cache_folder / "answers"
    splits = {split: described(catalog, split, cache) for split in ("train", "validation", "test")}
    if not len(splits["train"]):
        raise UserError(
            f"no listing of the training split of {catalog.name} has attributes to learn from: "
            "have some written (configs/annotate.py) and name them with data.attributes"
        )
    limits = {"validation": config.eval.validation_listings, "test": config.eval.listings}
    for split, limit in limits.items():
        splits[split] = np.random.default_rng(0).permutation(splits[split])[:limit]
    if not len(splits["validation"]):
        log.warning("%s has no validation listings to judge by: the last is the best", catalog.name)
    return splits


def _other_processors(config: ConfigDict, generator: Generator) -> dict[str, Processor]:
    """The processor of each other kind of answer than all attributes."""
    return {
        kind: generator.processor(answers=True, instruction=words)
        for kind, words in AnswerOptions.of(config).instructions.items()
    }


def _check_answers_fit(catalog: Catalog, listings: np.ndarray, processor: Processor) -> None:
    """Warns where some of the listings have more attributes than an answer holds; raises UserError
    where no attribute fits."""
    sample = np.random.default_rng(0).permutation(listings)[:SAMPLED].tolist()
    answers = [
        learnable(normalise(catalog.listing(index).attributes), processor) for index in sample
    ]
    shorter = [answer for answer in answers if answer.left_out]
    if not shorter:
        return
    needed = max(answer.needed for answer in shorter)
    longer = f"--config.data.max_answer={needed}"
    if not any(answer.pairs for answer in answers):
        raise UserError(
            f"no attribute of {len(answers)} training listings fits into an answer of "
            f"data.max_answer={processor.max_answer} tokens: {longer} holds theirs"
        )
    advice = f"; {longer} holds all of theirs that can be valid"
    log.warning(
        "%d of %d training listings have more attributes than an answer holds, by "
        "data.max_answer=%d tokens and the format's %d pairs and %d characters: %d of their %d "
        "attributes are not learned, and count as missed in F1%s",
        *(len(shorter), len(answers), processor.max_answer, MAX_PAIRS, MAX_CHARACTERS),
        sum(answer.left_out for answer in shorter),
        sum(answer.left_out + answer.pairs for answer in shorter),
        advice if needed > processor.max_answer else "",
    )
    if silent := sum(not answer.pairs for answer in answers):
        log.warning("%d of them teach nothing: no single attribute fits", silent)


def _tokenizer_texts(config: ConfigDict, catalog: Catalog) -> Iterator[str]:
    """What rows are made of, as often as it stands in them: the words of the turns as well."""
    others = AnswerOptions.of(config).instructions.values()
    for index in first_listings(catalog):
        listing = catalog.listing(index)
        yield from (f"system\n{config.data.instruction}", "user\n", "assistant\n")
        yield from (f"system\n{words}" for words in others)
        yield from (listing_text(listing), format_attributes(listing.attributes))
