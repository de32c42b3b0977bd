"""Trains the generator by what its attributes find: retrieval-aware reinforcement (RAR); METHOD:
section 5.

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

Axes: A micro-batches · C queries of one · Q = A C queries · G answers of a query · B = Q G ·
T tokens of an answer · E embedding.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from afmrl_jax.attributes import comparison
from afmrl_jax.catalog.groups import askers, whole_products
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions
from afmrl_jax.checkpoints.record import MAY_CHANGE, recorded
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.logs import cut_back
from afmrl_jax.core.mesh import local_rows, put_batch
from afmrl_jax.core.options import Options, between, check_options
from afmrl_jax.data.queries import QueryBatches
from afmrl_jax.data.stream import StreamOptions
from afmrl_jax.data.views import sampled_cuts
from afmrl_jax.losses.policy import PolicyGradient
from afmrl_jax.models import lora
from afmrl_jax.models.partition import MATRIX
from afmrl_jax.models.sampler import Samples
from afmrl_jax.planning.report import Part, check_fits
from afmrl_jax.rl.environment import Environment, Laps, RewardedAnswers, append_groups, none_is_read
from afmrl_jax.rl.gallery import Gallery, GallerySize, open_gallery
from afmrl_jax.rl.held_out import Arms, HeldOut, QueryAnswer, comparison_table
from afmrl_jax.rl.policy import Built, PolicyOptions, Rollouts, build, parts
from afmrl_jax.rl.rewards import Reward, bounded_k
from afmrl_jax.rl.watch import WatchLimits, stopped, watch
from afmrl_jax.training.evaluators import Evaluators, Trained, make_evaluator
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.optimizer import Optimizer
from afmrl_jax.training.run import Run, RunOptions, fresh_params, micro_batch
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.step import Params

BATCH_FIELD = "queries"  # the field of the configuration that micro_batches divides
SHARES_WORKDIR = True  # all processes read it
NO_EFFECT = (*MAY_CHANGE, "rollouts_every", "watch.")  # on what a run computes


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
    *(PolicyGradient, Reward, GallerySize, WatchLimits, CatalogOptions, StreamOptions),
    *(HeldOutQueries, PolicyEvaluators),
)
FOLDER_OPTIONS = (GeneratorRows,)  # of a generator that does not know its rows


def sampler_weights(trained: Any, frozen: Any) -> Any:
    """The parameters that answers are drawn with: the policy's own, with nothing copied."""
    return lora.join(trained, frozen)


class Step:
    """One step of the run: (state, rows) -> (state, metrics), for `training.loop`."""

    def __init__(
        self,
        config: ConfigDict,
        built: Built,
        generator: Generator,
        frozen: Any,
        reference: Any,
        batches: QueryBatches,
        environment: Environment,
        workdir: Path,
        mesh: Mesh,
    ):
        """frozen: what is not trained, {} where all is. reference: parameters to stay near, as
        `Built.reference` takes them; None without."""
        self._config, self._built, self._generator = config, built, generator
        self._frozen, self._reference = frozen, reference
        self._batches, self._environment = batches, environment
        self._limits, self._workdir, self._mesh = WatchLimits.of(config), workdir, mesh

    def __call__(self, state: TrainState, rows: dict[str, jax.Array]):
        laps, number = Laps(), int(state.step)
        rows = dict(rows)
        host = rows.pop("host")
        weights = sampler_weights(state.params, self._frozen)
        samples = jax.tree.map(np.asarray, self._built.rollout(weights, rows, number))
        laps("rollout")
        judged = self._judge(number, samples, laps)
        verdict = watch(judged.rollouts, self._limits)
        self._keep(number, judged, everything=bool(verdict.sentence))
        if verdict.sentence:
            raise stopped(number + 1, verdict, self._workdir / "rollouts.jsonl")
        state, metrics = self._learn(state, rows, samples, judged, host)
        laps("update")
        watched = {f"watch_{name}": figure for name, figure in verdict.figures.items()}
        return state, metrics | judged.metrics() | watched | laps.seconds

    def _judge(self, number: int, samples: Samples, laps: Laps) -> RewardedAnswers:
        lengths = samples.mask.sum(-1)
        answers = [
            self._generator.read(
                samples.tokens[place][: lengths[place]],
                samples.log_probs[place][: lengths[place]],
                bool(samples.truncated[place]),
            )
            for place in np.ndindex(lengths.shape)
        ]
        listings, draws = self._batches.draw(number)
        return self._environment.judge(
            listings,
            draws,
            [answer.text for answer in answers],
            [answer.closed for answer in answers],
            lengths.reshape(-1),
            laps,
        )

    def _learn(
        self,
        state: TrainState,
        rows: dict[str, jax.Array],
        samples: Samples,
        judged: RewardedAnswers,
        host: jax.Array,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The updates by one step's answers; the metrics are the last one's."""
        plain = self._config.temperature == 1  # then the policy's own are what was drawn from
        values = {
            "tokens": samples.tokens,
            "mask": samples.mask,
            "sampler_log_probs": samples.log_probs if plain else samples.sampling_log_probs,
            "truncated": samples.truncated,
            "advantages": judged.advantages.values,
            "zero_variance": np.broadcast_to(
                judged.advantages.zero_variance[:, None], samples.truncated.shape
            ),
        }
        micro_batches, queries = (
            self._batches.micro_batches,
            self._batches.queries // self._batches.micro_batches,
        )
        local = {
            name: x.reshape(micro_batches, queries, *x.shape[1:])[:, self._batches.rows]
            for name, x in values.items()
        }
        answers = put_batch(local, self._mesh, axis=1, rows=queries)
        if self._reference is not None:
            scores = self._built.reference(self._reference, rows, answers)
            answers["reference_log_probs"] = scores
        batch = {"rows": rows, "answers": answers, "host": host}
        for epoch in range(1, self._config.inner_epochs + 1):
            batch["advance"] = int(epoch == self._config.inner_epochs)
            state, metrics = self._built.update.function(self._frozen, state, batch)
            if self._config.inner_epochs > 1:
                batch["answers"] = answers | {"old_log_probs": metrics.pop("old_log_probs")}
        return state, jax.block_until_ready(metrics)

    def _keep(self, number: int, judged: RewardedAnswers, *, everything: bool) -> None:
        """Adds every n-th group of the run, or all of a step, to rollouts.jsonl."""
        every = 1 if everything else self._config.rollouts_every
        if every and jax.process_index() == 0:
            first = number * self._config.queries
            groups = [g for q, g in enumerate(judged.groups()) if (first + q) % every == 0]
            append_groups(self._workdir / "rollouts.jsonl", number + 1, groups)


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
        _check_attributes_are_read(config, catalog, encoder)

        # ---- galleries
        reward = Reward.of(config)
        opened = functools.partial(_gallery, config, workdir, catalog, encoder)
        gallery = opened("train")
        if gallery is None:
            raise UserError(
                f"no product of {catalog.name}'s training split has two listings, so that none can "
                "find another: RAR needs several listings a product"
            )
        reward = dataclasses.replace(reward, k=bounded_k(reward.k, len(gallery)))
        environment = Environment(
            catalog, encoder, gallery, reward, config.samples, config.policy.objective == "grpo"
        )
        limits = {"validation": config.eval.validation_listings, "test": config.eval.listings}
        held_out = {
            split: HeldOut(catalog, split, searched, encoder, reward, limit)
            for split, limit in limits.items()
            if (searched := opened(split))
        }

        # ---- policy and the reference that it stays near
        options = PolicyOptions.of(config)
        built = build(options, mesh, generator)
        for part in parts(options, mesh, generator, built):
            check_fits(part, mesh)
        params, base = read_base(generator, built.params, base)
        frozen, reference = (params, params) if generator.lora else ({}, None)
        if config.policy.kl and not generator.lora:
            reference = _as_multiplied(params, DTYPES[config.model.dtype])
        reference = reference if config.policy.kl else None
        judge_record = json.dumps(dataclasses.asdict(encoder_base))
        run.keep(generator, **base.record(), encoder=judge_record)
        loaded = LoadedGenerator(generator, None, mesh, config.eval.batch)

        def answer(trained: Params, listings: np.ndarray) -> list[QueryAnswer]:
            policy = loaded.with_params(sampler_weights(trained, frozen))
            descriptions = policy.describe(catalog, listings)
            return [QueryAnswer(listing.answer.text, listing.sure) for listing in descriptions]

        judge = Arms(workdir, held_out, answer, WatchLimits.of(config))
        adapters = functools.partial(fresh_params, generator, config.seed)
        begin = adapters if generator.lora else params
        if run.saved:
            state = run.restore(built.update)
            if not judge.has_begun():  # checkpoints elsewhere outlive a workdir
                judge.begin(built.update.initial(begin).params)
        else:
            state = built.update.initial(begin)
            judge.begin(state.params)
        del params, begin
        if run.first_process:
            cut_back(workdir / "rollouts.jsonl", int(state.step))

        # ---- train
        batches = QueryBatches(
            catalog,
            askers(catalog, "train", gallery.listings),
            generator.processor(answers=False),
            queries=config.queries,
            micro_batches=config.micro_batches,
            rows=local,
            seed=config.seed,
            steps=config.steps,
        )
        found = functools.partial(_held_out_scores, judge) if "validation" in held_out else None
        trained = Trained(
            config, mesh, catalog, generator, lambda state: sampler_weights(state.params, frozen)
        )
        training = Training(
            step=Step(
                config, built, generator, frozen, reference, batches, environment, workdir, mesh
            ),
            batches=batches,
            examples=config.queries * config.samples,
            unit="answers",
            rows=queries,
            validate=make_evaluator(config.evaluators, {"held_out": found}, trained),
            waits=True,
        )
        state = fit(training, state, run)

        # ---- judge
        chosen, policy = run.checkpoints.best or int(state.step), state.params
        if chosen != int(state.step):
            policy = run.checkpoints.restore_params(chosen, built.update.abstract.params)
        judge.end(policy, chosen)
    if run.first_process and judge.path.exists():
        results = json.loads(judge.path.read_text(encoding="utf-8"))
        print(f"{catalog.name}, {results['split']} split, after {results['step']} steps:")
        print(comparison_table(results), flush=True)


def _held_out_scores(judge: Arms, state: TrainState) -> dict[str, float]:
    """The evaluator `held_out`."""
    return judge.validate(state.params, int(state.step))


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
    params = _as_multiplied(params, DTYPES[enc.options.model.dtype])
    return LoadedEncoder(enc, params, mesh, config.reward.batch), base


def _check_attributes_are_read(
    config: ConfigDict, catalog: Catalog, encoder: LoadedEncoder
) -> None:
    """Warns where the encoder's rows are too short for true attributes of some training listings;
    raises UserError where it reads none of them."""
    cuts = sampled_cuts(catalog, "train", encoder.processor, encoder.processor.max_images)
    if cuts.none_is_read:
        raise none_is_read(cuts, f"true attributes, as {config.encoder} reads them")
    cuts.tell(f"true attributes, as {config.encoder} reads them")


def _as_multiplied(params: Any, dtype: Any) -> Any:
    """A copy with the matrices as products round them: half the memory, and the same numbers."""

    def rounded(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.copy(x).astype(dtype if MATRIX.search(name) else x.dtype)

    shardings = jax.tree.map(lambda x: x.sharding, params)
    copy = functools.partial(jax.tree_util.tree_map_with_path, rounded)
    return jax.jit(copy, out_shardings=shardings)(params)


def _gallery(
    config: ConfigDict,
    workdir: Path,
    catalog: Catalog,
    encoder: LoadedEncoder,
    split: str,
) -> Gallery | None:
    """The gallery of a split's listings; None where nothing can be found, or in a split for judging
    nothing wrong can."""
    listings = whole_products(catalog, catalog.indices(split), config.reward.gallery)
    if not len(askers(catalog, split, listings)):
        return None
    if split != "train" and len(np.unique(catalog.products[listings])) == 1:
        return None
    attributes = config.reward.gallery_attributes
    parts = [encoder.version, str(encoder.batch), catalog.fingerprint, str(attributes)]
    parts += [listings.tobytes().hex()]
    if attributes:  # as texts with attributes are since titles are cut before them; of attributes
        parts += ["kept whole", str(comparison.VERSION)]  # those stand there that say something

    def of(number: int) -> Mapping[str, str]:
        return catalog.listing(int(listings[number])).attributes

    def embed(listings: np.ndarray) -> np.ndarray:
        carried = of if attributes else None
        return encoder.embed_listings(
            catalog, listings, attributes=carried, where="the gallery"
        ).vectors

    version = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return open_gallery(workdir / "gallery", version, catalog, listings, embed)
