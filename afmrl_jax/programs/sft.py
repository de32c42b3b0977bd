"""Trains the generator to answer a listing with its attributes (SFT); METHOD: section 4.

1. Show listings as questions; their attributes, as the catalogue or an oracle gives them, are the
   answers.
2. Update by the cross-entropy of the answers' tokens; every so often let it answer, checkpoint.
3. Judge the answers to the test listings: format, pairs, whole sets; beside them what one would
   guess who knows the category alone.

With a larger model's attributes (data.attributes) the same program distils that model.

Axes: A micro-batches · C rows of one · S tokens.
"""

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.generator import Generator, batches_of
from afmrl_jax.assembly.loaded import LoadedGenerator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import (
    Computation,
    GeneratorOptions,
    GeneratorRows,
    PresetOptions,
    TrainingOptions,
)
from afmrl_jax.assembly.pretrained import Base, Pretrained, find_pretrained, planned, read_base
from afmrl_jax.attributes.agreement import Majority, agreement, agreement_by_name
from afmrl_jax.attributes.text import (
    MAX_CHARACTERS,
    MAX_PAIRS,
    Verdict,
    format_attributes,
    normalise,
    parse,
)
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints, checkpoint_folder
from afmrl_jax.checkpoints.record import check_catalogue, check_unchanged
from afmrl_jax.checkpoints.state import TrainState, abstract_state, init_state
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.logs import cut_back
from afmrl_jax.core.mesh import batch_sharding, batch_shards, local_rows, put_batch, replicated
from afmrl_jax.core.options import Options, between, check_options
from afmrl_jax.core.processes import first_says
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.data.answers import (
    SAMPLED,
    AnswerBatches,
    AnswerOptions,
    described,
    learnable,
    question_and_answer,
)
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.stream import Stream, StreamOptions
from afmrl_jax.data.views import listing_text
from afmrl_jax.models import lora
from afmrl_jax.planning import cost
from afmrl_jax.planning.report import Part, check_fits, step_part
from afmrl_jax.training import accumulate
from afmrl_jax.training.goodput import Clock, abstract_host
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.optimizer import Optimizer, make_optimizer
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.tracing import traced_steps

log = logging.getLogger(__name__)

ROWS = (
    *("tokens", "token_mask", "positions", "answer_mask"),
    *("patches", "patch_positions", "patch_segments", "patch_grids"),
)
TOKENIZER_LISTINGS = 20_000  # whose texts a preset's tokenizer is trained on
MAJORITY_LISTINGS = 20_000  # of the training split, from which the guesses are learned


@dataclass(frozen=True)
class AnswerTraining(Options, section=""):
    """What a run trains on, and begins with."""

    batch: int = between(1)  # answers
    vocabulary_chunk: int = between(1)  # tokens of each row whose logits are in memory at once
    init_from: str  # a checkpoint or a Hugging Face folder; "" = from scratch


@dataclass(frozen=True)
class AnswerEvaluation(Options, section="eval"):
    """How the generator is judged."""

    batch: int = between(1)  # listings answered at once
    validation_listings: int = between(1)
    listings: int = between(1)  # of the test split
    samples: int = between(0)  # answers shown of each evaluation


OPTIONS = (
    *(Schedule, AnswerTraining, Optimizer, TrainingOptions, PresetOptions),
    *(Computation, GeneratorRows, CatalogOptions, AnswerOptions, StreamOptions, AnswerEvaluation),
)


@dataclass(frozen=True)
class Built:
    """The compiled parts of a run, and the state that they expect."""

    start: Callable[[Any], TrainState]  # from parameters, or from scratch with None
    step: Callable[[Any, TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    loss: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]
    abstract: TrainState
    frozen: Any  # abstract parameters beside the state's; {} where all are trained


def build(config: ConfigDict, mesh: Mesh, generator: Generator) -> Built:
    """The train step of a configuration, jitted for a mesh; nothing is computed yet.

    step: (frozen parameters, state, batch of arrays [A, C, ...]) -> (state, metrics), the state
    donated; the frozen ones are only read, so there is one copy of them.
    loss: (params, rows with answers) -> (sum in nats, number of tokens).
    """
    if config.batch % config.micro_batches:
        raise UserError(
            f"micro_batches is {config.micro_batches}, which does not divide the batch of "
            f"{config.batch}"
        )
    optimizer = make_optimizer(Optimizer.of(config), config.steps)
    params = abstract_params(generator, mesh)
    trained, frozen = lora.split(params)
    abstract = abstract_state(trained, optimizer, mesh)
    loss = generator.answer_loss(config.vocabulary_chunk)
    model = generator.model_config

    @functools.partial(
        jax.jit,
        donate_argnames="state",
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), replicated(mesh)),
    )
    def step(frozen: Any, state: TrainState, batch: dict[str, jax.Array]):
        rows = {name: batch[name] for name in ROWS}
        gradient = accumulate.value_and_grad(
            lambda trained, rows: loss(lora.join(trained, frozen), rows)
        )
        (value, count), gradients = gradient(state.params, rows)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        norm, change = optax.global_norm(gradients), optax.global_norm(updates)
        metrics = {
            "loss": value,
            "answer_tokens": count,
            "gradient_norm": norm,
            "finite": jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(change),
            "host": batch["host"],
            "flops": cost.step_flops(
                model, params, cost.work(model, rows) | {"logits": count}, gradcache=False
            ),
        }
        trained = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, trained, opt_state), metrics

    def fresh() -> Any:
        return lora.split(generator.init_params(config.seed))[0]

    return Built(
        lambda given: init_state(fresh if given is None else given, optimizer, abstract),
        step,
        jax.jit(loss, out_shardings=replicated(mesh)),
        abstract,
        frozen,
    )


def part(
    config: ConfigDict, mesh: Mesh, generator: Generator, built: Built, length: int = 0
) -> Part:
    """The train step as planning compiles it, its rows full. length: S, the longest by default."""
    leading, data = (config.micro_batches, config.batch // config.micro_batches), config.data
    length = length or data.max_tokens + data.max_answer
    sharding = batch_sharding(mesh, 1)
    batch = generator.abstract_rows(leading, sharding, answers=data.max_answer, length=length)
    batch |= {"host": abstract_host(mesh)}
    frozen, state, model = built.frozen, built.abstract, generator.model_config
    amount = cost.most_work(model, config.batch, length, data.max_patches)
    amount |= {"logits": float(config.batch * data.max_answer)}
    logits = 4.0 * leading[1] * config.vocabulary_chunk * model.vocab_size
    inside = {"logits": logits / batch_shards(mesh)}
    params = lora.join(state.params, frozen)
    useful = cost.step_flops(model, params, amount, gradcache=False)
    return step_part(built.step, frozen, state, batch, inside=inside, useful=useful)


def plan(config: ConfigDict, mesh: Mesh) -> list[Part]:
    """What `plan` compiles of a run with this configuration: no catalogue is opened."""
    local_rows(mesh, config.batch // config.micro_batches, "batch / micro_batches")
    options, training = GeneratorOptions.of(config), TrainingOptions.of(config)
    generator = planned(config.init_from or config.model.preset, Generator, options, training)
    return [part(config, mesh, generator, build(config, mesh, generator))]


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or resumes, the whole of it in `workdir`; see configs/sft.py."""
    # ---- what is asked, and what is there
    clock = Clock(workdir / "goodput.json")
    first_process = jax.process_index() == 0
    check_options(config, OPTIONS)
    traced_steps(config.profile, config.steps)
    local = local_rows(mesh, config.batch // config.micro_batches, "batch / micro_batches")
    with Checkpoints(checkpoint_folder(config, workdir), writable=True) as checkpoints:
        saved = checkpoints.record(checkpoints.latest) if checkpoints.latest else None
        if saved:
            check_unchanged(saved["config"], config, workdir)

        # ---- catalogue and generator
        catalog = open_catalogue(CatalogOptions.of(config), workdir)
        if saved:
            check_catalogue(saved, catalog.fingerprint, config.data.path, workdir)
        listings = _listings(config, catalog)
        generator, source = _generator(config, catalog, saved)
        processor = generator.processor(answers=True)
        _check_answers_fit(catalog, listings["train"], processor)
        record = generator.record() | {
            "config": config.to_json(),
            "catalogue": catalog.fingerprint,
        }
        if first_process:
            write_atomically(workdir / "config.json", config.to_json(indent=2))
            write_atomically(workdir / "tokenizer.json", record["tokenizer"])

        # ---- state, step and judge
        built = build(config, mesh, generator)
        batches = AnswerBatches(
            catalog,
            listings["train"],
            processor,
            batch=config.batch,
            micro_batches=config.micro_batches,
            rows=local,
            dropout=config.data.answer_dropout,
            buckets=config.data.buckets,
            seed=config.seed,
            steps=config.steps,
        )
        # The longest rows first: what does not fit is told before all the others are compiled.
        parts = {s: part(config, mesh, generator, built, s) for s in reversed(batches.lengths)}
        steps = {s: check_fits(one, mesh) for s, one in parts.items()}
        frozen = {}
        if generator.lora:
            begun = Base(source.path if source else "", seed=config.seed)
            base = Base.of_record(saved) if saved else begun
            frozen, base = read_base(generator, built.frozen, base)
            record |= base.record()
        if saved:
            state = checkpoints.restore(checkpoints.latest, built.abstract)
        else:
            given = source and not generator.lora
            state = built.start(source.load(built.abstract.params) if given else None)
            (workdir / "evaluation.json").unlink(missing_ok=True)  # of a run that never saved
        if first_process:
            cut_back(workdir / "samples.jsonl", int(state.step))
        judge = AnswerEvaluator(config, catalog, generator, built, mesh, workdir, listings["train"])

        def validate(state: TrainState) -> dict[str, float]:
            scores = judge(lora.join(state.params, frozen), listings["validation"], state.step)
            scores = scores["generator"]
            return {"validation": scores["f1"]} | {
                f"validation_{name}": scores[name] for name in ("loss", "exact_match", "valid")
            }

        # ---- train
        if int(state.step) < config.steps:
            training = Training(
                step=lambda state, batch: steps[batch["tokens"].shape[-1]](frozen, state, batch),
                open_stream=lambda step: Stream(batches, step, StreamOptions.of(config)),
                examples=config.batch,
                unit="answers",
                chunk=config.batch // config.micro_batches,
                validate=validate if len(listings["validation"]) else None,
                name_listings=lambda rows: [catalog.listing(int(i)).listing_id for i in rows],
                record=record,
                shapes=len(steps),
            )
            state = fit(training, state, checkpoints, clock, config, workdir, mesh)
        elif first_process:
            print(f"{workdir} is complete: {config.steps} steps are done", flush=True)

    # ---- judge
    path = workdir / "evaluation.json"
    split = "test" if len(listings["test"]) else "validation"
    if not first_says(path.exists()) and len(listings[split]):
        results = judge(lora.join(state.params, frozen), listings[split], state.step)
        if first_process:
            write_atomically(path, json.dumps(results, indent=2))
    if first_process and path.exists():
        print(f"{catalog.name}, {split} split, after {config.steps} steps:")
        print(results_table(json.loads(path.read_text(encoding="utf-8"))), flush=True)


class AnswerEvaluator:
    """Lets the generator answer held-out listings and compares with their attributes."""

    def __init__(
        self,
        config: ConfigDict,
        catalog: Catalog,
        generator: Generator,
        built: Built,
        mesh: Mesh,
        workdir: Path,
        training: np.ndarray,
    ):
        """training: int64, the listings from which the guesses by category are learned."""
        self._config, self._catalog, self._workdir = config, catalog, workdir
        self._mesh, self._loss, self._training = mesh, built.loss, training
        self._generator = LoadedGenerator(generator, None, mesh, config.eval.batch)
        self._processor = generator.processor(answers=True)
        self._local = local_rows(mesh, config.eval.batch, "eval.batch")

    @functools.cached_property
    def _majority(self) -> Majority:
        chosen = np.random.default_rng(0).permutation(self._training)[:MAJORITY_LISTINGS]
        shown = (self._catalog.listing(int(index)) for index in chosen)
        return Majority((listing.category, listing.attributes) for listing in shown)

    def __call__(self, params: Any, indices: np.ndarray, step: jax.Array) -> dict[str, Any]:
        """{"generator", "majority": scores, "by_attribute": {name: f1 of both}} of the listings.

        The first `eval.samples` answers are printed, and added to samples.jsonl.
        """
        listings = [self._catalog.listing(int(index)) for index in indices]
        true = [normalise(listing.attributes) for listing in listings]
        answers = list(self._generator.with_params(params).answers(self._catalog, indices))
        parsed = [parse(answer.text, answer.closed) for answer in answers]
        found = {
            "generator": [one.attributes for one in parsed],
            "majority": [self._majority(listing.category) for listing in listings],
        }
        verdicts = Counter(one.verdict for one in parsed)
        scores = {name: agreement(given, true) for name, given in found.items()}
        scores["generator"] |= {
            "loss": self._mean_loss(params, indices),
            "valid": verdicts[Verdict.VALID] / len(parsed),
            "verdicts": {verdict.value: n / len(parsed) for verdict, n in verdicts.most_common()},
            "listings": len(parsed),
        }
        samples = [
            {
                "step": int(step),
                "listing_id": listing.listing_id,
                "text": listing_text(listing),
                "answer": answer.text,
                "verdict": one.verdict.value,
                "attributes": wanted,
            }
            for listing, answer, one, wanted in zip(listings, answers, parsed, true)
        ]
        if jax.process_index() == 0:
            self._tell(samples[: self._config.eval.samples])
        by_name = {name: agreement_by_name(given, true) for name, given in found.items()}
        scores["by_attribute"] = {
            name: {**of_name, "majority_f1": by_name["majority"][name]["f1"]}
            for name, of_name in by_name["generator"].items()
        }
        return scores

    def _mean_loss(self, params: Any, indices: np.ndarray) -> float:
        """Nats a token of the true answers."""
        sums = np.zeros(2)
        for batch, real in batches_of(indices, self._config.eval.batch):
            shown = [
                question_and_answer(self._catalog, int(index), self._processor)
                for index in batch[self._local]
            ]
            rows = self._processor(shown)
            rows["answer_mask"][np.arange(len(batch))[self._local] >= real] = False
            rows = put_batch(rows, self._mesh, axis=0, rows=len(batch))
            sums += [float(x) for x in self._loss(params, rows)]
        return float(sums[0] / sums[1])

    def _tell(self, samples: list[dict[str, Any]]) -> None:
        path = self._workdir / "samples.jsonl"
        # A run killed before it wrote evaluation.json judges again, and says the same.
        told = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = (json.dumps(sample) for sample in samples)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines if line not in told)
        for sample in samples:
            title = sample["text"].partition("\n")[0]
            true = format_attributes(sample["attributes"])
            print(f"  {title}\n    answer: {sample['answer']}\n    true:   {true}", flush=True)


def results_table(results: dict[str, Any]) -> str:
    """An evaluation.json as Markdown, percentages by row, and the attributes' F1 below."""
    columns = ("f1", "precision", "recall", "exact_match", "valid")
    rows = []
    for name in ("generator", "majority"):
        scores = results[name]
        percent = [f"{scores[c]:.1%}" if c in scores else "" for c in columns]
        rows.append((name, *percent, f"{scores['loss']:.3f}" if "loss" in scores else ""))
    f1 = (
        f"{name} {scores['f1']:.0%} ({scores['majority_f1']:.0%})"
        for name, scores in results["by_attribute"].items()
    )
    table = markdown_table(("", *columns, "loss"), rows)
    return f"{table}\nF1 by attribute (the majority's): {', '.join(f1)}"


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


def _generator(
    config: ConfigDict, catalog: Catalog, saved: dict[str, str] | None
) -> tuple[Generator, Pretrained[Generator] | None]:
    """The generator, and the model that a new run begins with; None: from scratch, or resumed."""
    options, training, source = GeneratorOptions.of(config), TrainingOptions.of(config), None
    if saved:
        generator = Generator.from_record(options, saved)
    elif config.init_from:
        source = find_pretrained(config.init_from, Generator, begin=True)
        return source.for_training(options, training), source
    else:
        texts = _tokenizer_texts(config, catalog)
        generator = Generator.from_preset(options, PresetOptions.of(config), texts)
    return generator.for_training(training), source


def _tokenizer_texts(config: ConfigDict, catalog: Catalog) -> Iterator[str]:
    """What rows are made of, as often as it stands in them: the words of the turns as well."""
    for index in catalog.indices("train")[:TOKENIZER_LISTINGS]:
        listing = catalog.listing(int(index))
        yield from (f"system\n{config.data.instruction}", "user\n", "assistant\n")
        yield from (listing_text(listing), format_attributes(listing.attributes))
