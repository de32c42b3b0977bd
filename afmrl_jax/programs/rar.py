"""Trains the generator by what its attributes find: retrieval-aware reinforcement (RAR); see
docs/method.md.

1. Draw queries: training listings whose product has another listing in the gallery.
2. Let the generator answer each of them several times.
3. Read the answers; append each one's attributes to its query's text.
4. Embed the queries with the frozen encoder, and search the gallery, where a query's own listing
   never counts.
5. Reward each answer by what it found, and compare it with the others to its query.
6. Update the generator by the policy gradient, held near the one that it was.
7. Watch for answers that earn their reward by other means; every so often judge on held-out
   queries, at the end beside queries without attributes, with those of SFT, with those of which SFT
   is sure, and with true ones.

Axes: C queries of a micro-batch · N listings.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.loaded import LoadedEncoder, LoadedGenerator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.assembly.options import (
    DTYPES,
    Computation,
    GeneratorOptions,
    GeneratorRows,
    TrainingOptions,
)
from afmrl_jax.assembly.pretrained import Base, find_pretrained, planned, read_base
from afmrl_jax.catalog.groups import askers
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions
from afmrl_jax.checkpoints.record import MAY_CHANGE, recorded
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.logs import cut_back
from afmrl_jax.core.mesh import local_rows
from afmrl_jax.core.options import Options, between, check_options
from afmrl_jax.data.queries import QueryBatches
from afmrl_jax.data.stream import StreamOptions
from afmrl_jax.losses.policy import PolicyGradient
from afmrl_jax.planning.report import Part
from afmrl_jax.rl.changes import changes_table
from afmrl_jax.rl.credit import PairCredit
from afmrl_jax.rl.environment import Environment, check_attributes_are_read
from afmrl_jax.rl.gallery import GallerySize, gallery_of_split
from afmrl_jax.rl.held_out import Arms, HeldOut, QueryAnswer, comparison_table
from afmrl_jax.rl.learner import Learner, as_multiplied, make_learner
from afmrl_jax.rl.policy import PolicyOptions, Rollouts, build, parts
from afmrl_jax.rl.rewards import Reward, bounded_k
from afmrl_jax.rl.step import KeptRollouts, Step
from afmrl_jax.rl.watch import WatchLimits
from afmrl_jax.training.evaluators import Evaluators, Trained, make_evaluator
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.optimizer import Optimizer
from afmrl_jax.training.run import Run, RunOptions, micro_batch
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.step import Params

BATCH_FIELD = "queries"  # the field of the configuration that micro_batches divides
SHARES_WORKDIR = True  # all processes read it
# On what a run computes.
NO_EFFECT = (*MAY_CHANGE, "rollouts_every", "watch.", "policy.credit_checks")
ROLLOUTS = "rollouts.jsonl"


@dataclass(frozen=True)
class RewardedGenerator(Options, section=""):
    """Whose answers are drawn, what rewards them, and how many are kept."""

    generator: str  # a workdir, a checkpoint or a Hugging Face folder
    encoder: str  # a workdir, a checkpoint or a folder exported from one
    rollouts_every: int = between(0)  # queries of which one is kept; 0: none


@dataclass(frozen=True)
class HeldOutQueries(Options, section="eval"):
    """How the generator is judged."""

    batch: int = between(1)  # listings answered at once
    validation_listings: int = between(1)
    listings: int = between(1)  # of the test split


class PolicyEvaluators(Evaluators):
    known = ("held_out",)


OPTIONS = (
    *(Schedule, RewardedGenerator, Rollouts, Optimizer, Computation, TrainingOptions),
    *(PolicyGradient, PairCredit, Reward, GallerySize, WatchLimits, CatalogOptions),
    *(StreamOptions, HeldOutQueries, PolicyEvaluators),
)
FOLDER_OPTIONS = (GeneratorRows,)  # of a generator that does not know its rows


def plan(config: ConfigDict, mesh: Mesh) -> list[Part]:
    """What `plan` compiles of a run with this configuration, whose generator may be a preset: rows
    as the configuration's data says, no catalogue and no encoder."""
    queries = micro_batch(config.queries, config.micro_batches, BATCH_FIELD)
    local_rows(mesh, queries, "queries / micro_batches")
    options, training = GeneratorOptions.of(config), TrainingOptions.of(config)
    generator = planned(config.generator, Generator, options, training)
    policy = PolicyOptions.of(config)
    return parts(policy, mesh, generator, build(policy, mesh, generator))


def main(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Runs, or resumes, the whole of it in `workdir`; see configs/rar.py."""
    rows = dataclasses.fields(GeneratorRows)
    may_change = (*NO_EFFECT, *(GeneratorRows.name_of(field.name) for field in rows))
    check_options(config, OPTIONS)
    with Run(RunOptions.of(config), config.to_json(), workdir, mesh, may_change) as run:
        queries = micro_batch(config.queries, config.micro_batches, BATCH_FIELD)
        local = local_rows(mesh, queries, "queries / micro_batches")

        # ---- generator, catalogue and encoder
        config, generator, base = _generator(config, run.saved)
        run.config = config.to_json()  # with the generator's rows
        catalog = run.open_catalogue(CatalogOptions.of(config))
        encoder, encoder_base = _encoder(config, run.saved, mesh)
        check_attributes_are_read(catalog, encoder, config.encoder)

        # ---- galleries
        environment, held_out = _searches(config, workdir, catalog, encoder)

        # ---- policy and the reference that it stays near
        learner, begin, base = make_learner(PolicyOptions.of(config), mesh, generator, base)
        run.keep(generator, **base.record(), encoder=json.dumps(dataclasses.asdict(encoder_base)))
        answer = _answering(config, learner, catalog)
        arms = Arms(workdir, held_out, answer, WatchLimits.of(config))
        state = _begin(run, learner, begin, arms)
        del begin  # the memory of its parameters

        # ---- train
        batches = _batches(config, environment, generator, local)
        kept = KeptRollouts(workdir / ROLLOUTS, config.rollouts_every)
        evaluators = {"held_out": arms if "validation" in held_out else None}
        trained = Trained(
            config, mesh, catalog, generator, lambda state: learner.weights(state.params)
        )
        training = Training(
            step=Step(learner, batches, environment, WatchLimits.of(config), kept),
            batches=batches,
            examples=config.queries * config.samples,
            unit="answers",
            rows=queries,
            validate=make_evaluator(config.evaluators, evaluators, trained),
            waits=True,
        )
        state = fit(training, state, run)

        # ---- judge
        chosen, params = run.checkpoints.best or int(state.step), state.params
        if chosen != int(state.step):
            params = run.checkpoints.restore_params(chosen, learner.built.update.abstract.params)
        arms.end(params, chosen)
    if run.first_process and arms.path.exists():
        results = json.loads(arms.path.read_text(encoding="utf-8"))
        print(f"{catalog.name}, {results['split']} split, after {results['step']} steps:")
        print(comparison_table(results))
        print(changes_table(results["changes"]), flush=True)


def _generator(
    config: ConfigDict, saved: dict[str, str] | None
) -> tuple[ConfigDict, Generator, Base]:
    """The configuration with the rows that the generator was trained on, the generator, and the
    parameters that it begins with, which are also those to stay near."""
    training = TrainingOptions.of(config)
    if saved:
        options = GeneratorOptions.of(recorded(saved["config"], "--workdir"))
        base = Base.of_record(saved)
        generator = Generator.from_record(options, saved).for_training(training)
    elif config.generator:
        source = find_pretrained(config.generator, Generator)
        known, base = source.model.options, Base(source.path)
        rows = known.rows if known else GeneratorRows.of(config)
        options = GeneratorOptions(Computation.of(config), rows)
        generator = source.for_training(options, training)
    else:
        raise UserError("say which generator to train, as --config.generator=runs/sft")
    config = ConfigDict(config.to_dict())
    config.data.update(dataclasses.asdict(options.rows))
    return config.lock(), generator, base


def _encoder(
    config: ConfigDict, saved: dict[str, str] | None, mesh: Mesh
) -> tuple[LoadedEncoder, Base]:
    """The frozen encoder, and where it was read."""
    local_rows(mesh, config.reward.batch, "reward.batch")
    if not config.encoder:
        raise UserError("say which encoder rewards the answers, as --config.encoder=runs/agcl")
    base = Base(**json.loads(saved["encoder"])) if saved else Base(config.encoder)
    source = find_pretrained(base.path)
    enc = source.model
    if enc.options is None:
        raise UserError(
            f"{config.encoder} does not know how its rows are made: name a run's workdir, or a "
            "folder that was exported from one"
        )
    params, base = read_base(enc, abstract_params(enc, mesh), Base(source.path, base.fingerprint))
    params = as_multiplied(params, DTYPES[enc.options.model.dtype])
    return LoadedEncoder(enc, params, mesh, config.reward.batch), base


def _searches(
    config: ConfigDict, workdir: Path, catalog: Catalog, encoder: LoadedEncoder
) -> tuple[Environment, dict[str, HeldOut]]:
    """What rewards answers to training queries, and the held-out queries of each split that has
    any."""
    size, options = GallerySize.of(config), Reward.of(config)
    opened = functools.partial(gallery_of_split, size, workdir / "gallery", catalog, encoder)
    gallery = opened("train")
    if gallery is None:
        raise UserError(
            f"no product of {catalog.name}'s training split has two listings, so that none can "
            "find another: RAR needs several listings a product"
        )
    options = dataclasses.replace(options, k=bounded_k(options.k, len(gallery)))
    scale = config.policy.objective == "grpo"
    environment = Environment(
        catalog, encoder, gallery, options, config.samples, scale, PairCredit.of(config)
    )
    limits = {"validation": config.eval.validation_listings, "test": config.eval.listings}
    held_out = {
        split: HeldOut(catalog, split, searched, encoder, options, limit)
        for split, limit in limits.items()
        if (searched := opened(split))
    }
    return environment, held_out


def _answering(
    config: ConfigDict, learner: Learner, catalog: Catalog
) -> Callable[[Params, np.ndarray], list[QueryAnswer]]:
    """(trained parameters, listings int64[N]) -> the policy's most probable answers."""
    loaded = LoadedGenerator(learner.generator, None, learner.mesh, config.eval.batch)

    def answer(trained: Params, listings: np.ndarray) -> list[QueryAnswer]:
        policy = loaded.with_params(learner.weights(trained))
        descriptions = policy.describe(catalog, listings)
        return [QueryAnswer(listing.answer.text, listing.sure) for listing in descriptions]

    return answer


def _begin(
    run: Run, learner: Learner, begin: Params | Callable[[], Params], arms: Arms
) -> TrainState:
    """The state to go on from. begin: the parameters of a new run; the arms judge them first."""
    update = learner.built.update
    if run.saved:
        state = run.restore(update)
        if not arms.has_begun():  # checkpoints elsewhere outlive a workdir
            arms.begin(update.initial(begin).params)
    else:
        state = update.initial(begin)
        arms.begin(state.params)
    if run.first_process:
        cut_back(run.workdir / ROLLOUTS, int(state.step))
    return state


def _batches(
    config: ConfigDict, environment: Environment, generator: Generator, local: np.ndarray
) -> QueryBatches:
    """The queries of the run. local: this process's rows of each micro-batch."""
    catalog = environment.catalog
    return QueryBatches(
        catalog,
        askers(catalog, "train", environment.gallery.listings),
        generator.processor(answers=False),
        queries=config.queries,
        micro_batches=config.micro_batches,
        rows=local,
        seed=config.seed,
        steps=config.steps,
    )
