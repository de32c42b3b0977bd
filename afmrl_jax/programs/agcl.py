"""Trains the encoder with attribute-guided contrastive learning (AGCL); METHOD: section 3.

1. Draw pairs of listings of one product, look-alikes beside them.
2. Embed queries and targets; weigh and mask the negatives by their attributes.
3. Update; every so often validate and checkpoint.
4. Judge the encoder before and after by finding the test listings' products.

With weights and attribute masks off the same program is VLM2Vec: configs/agcl.py:vlm2vec.

Axes: A chunks · C examples of a chunk · V views of an example (query, target, hard negatives) ·
B = A C pairs · E embedding.
"""

import functools
import itertools
import json
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

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import batch_sharding, local_rows, replicated
from afmrl_jax.core.writer import write_atomically
from afmrl_jax.data.catalog import Catalog
from afmrl_jax.data.mining import mine_neighbours
from afmrl_jax.data.opening import cache_folder, open_catalogue
from afmrl_jax.data.pairs import Composition, PairSampler, listings_by_product
from afmrl_jax.data.pipeline import PairBatches, Stream
from afmrl_jax.data.views import Augmentation, listing_text, parse_mixture
from afmrl_jax.losses.contrastive import Options, contrastive_loss
from afmrl_jax.models import hf_weights
from afmrl_jax.retrieval.evaluation import Results, parse_task, results_table, write_evaluation
from afmrl_jax.retrieval.tasks import Judge
from afmrl_jax.training import cost, encoder, gradcache
from afmrl_jax.training.checkpoint import Checkpoints, check_unchanged, find_checkpoints
from afmrl_jax.training.loop import Training, fit
from afmrl_jax.training.optimizer import make_optimizer
from afmrl_jax.training.state import TrainState, abstract_state, init_state

ROWS = ("tokens", "token_mask", "positions", "patches", "patch_positions", "patch_segments")
TERMS = ("product", "terms", "query_weights", "document_weights")
TOKENIZER_LISTINGS = 20_000  # whose texts a preset's tokenizer is trained on
VALIDATION_LISTINGS = 600


@dataclass(frozen=True)
class Built:
    """The compiled parts of a run, and the state that they expect."""

    start: Callable[[Any], TrainState]  # from parameters, or from scratch with None
    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    embed: Callable[[Any, dict[str, np.ndarray]], jax.Array]
    abstract: TrainState


def build(config: ConfigDict, mesh: Mesh, enc: encoder.Encoder) -> Built:
    """The train step of a configuration, jitted for a mesh; nothing is computed yet.

    step: (state, batch of arrays [A, C, V, ...]) -> (state, metrics), the state donated.
    embed: (params, host rows [N, ...]) -> float32[N, E] on every device.
    """
    # A flag can't say None, so a threshold that nothing passes turns a mask off.
    options = Options(**{k: None if v == math.inf else v for k, v in config.loss.items()})
    optimizer = make_optimizer(config.optimizer, config.steps)
    init_params = functools.partial(enc.init_params, config.seed)
    abstract = abstract_state(encoder.abstract_params(enc, mesh), optimizer, mesh)
    embed = enc.embed()
    whole, by_rows = replicated(mesh), batch_sharding(mesh)

    def loss(embeddings: jax.Array, batch: dict[str, jax.Array]):
        side = {name: batch[name] for name in TERMS}
        queries, targets = _sides(embeddings)
        info = {}
        for name, array in side.items():
            query, target = _sides(array)
            info[f"query_{name}"] = jax.lax.with_sharding_constraint(query, by_rows)
            info[f"target_{name}"] = jax.lax.with_sharding_constraint(target, whole)
        total, count, metrics = contrastive_loss(
            jax.lax.with_sharding_constraint(queries, by_rows),
            jax.lax.with_sharding_constraint(targets, whole),
            info,
            options,
        )
        return total / count, metrics

    @functools.partial(
        jax.jit,
        donate_argnames="state",
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), whole),
    )
    def step(state: TrainState, batch: dict[str, jax.Array]):
        rows = {name: batch[name] for name in ROWS}
        gradient = gradcache.value_and_grad(embed, lambda e: loss(e, batch))
        (value, metrics), gradients = gradient(state.params, rows)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        norm = optax.global_norm(gradients)
        metrics |= {
            "loss": value,
            "gradient_norm": norm,
            "finite": jnp.isfinite(value) & jnp.isfinite(norm),
            "flops": cost.step_flops(
                enc.model_config, cost.work(rows), gradcache=config.chunks > 1
            ),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return Built(
        lambda params: init_state(init_params if params is None else params, optimizer, abstract),
        step,
        encoder.host_embedder(embed, mesh),
        abstract,
    )


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
    first_process = jax.process_index() == 0
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(config.data) / "xla"))
    checkpoints = Checkpoints(workdir / "checkpoints", writable=True)
    saved = checkpoints.record(checkpoints.latest) if checkpoints.latest else None
    if saved:
        check_unchanged(saved["config"], config, workdir)
    if first_process:
        write_atomically(workdir / "config.json", config.to_json(indent=2))

    # ---- catalogue and encoder
    catalog = open_catalogue(config.data.path, config.data, workdir)
    statistics, sampler = _sampler(config, catalog, saved)
    enc, source = _encoder(config, catalog, saved)
    processor = enc.processor()
    views = {
        f"{side}_views": parse_mixture(config.data[f"{side}_views"], f"data.{side}_views")
        for side in ("query", "target")
    }
    tasks = [parse_task(name) for name in config.eval.tasks.split(",")]

    # ---- state and step
    built = build(config, mesh, enc)
    record = enc.record() | {"config": config.to_json(), "statistics": statistics.to_json()}
    state = checkpoints.restore(checkpoints.latest, built.abstract) if saved else source(built)

    # ---- judges
    def judge(params: Any) -> Judge:
        embed = functools.partial(built.embed, params)
        return Judge(
            embed,
            processor,
            catalog,
            batch=config.eval.batch,
            attributes=config.eval.attributes,
        )

    def validate(state: TrainState) -> dict[str, float]:
        listings = catalog.indices("validation")[:VALIDATION_LISTINGS]
        results = judge(state.params).run(tasks, listings, listings)
        if not results:
            raise UserError(
                f"the validation split of {catalog.name} has nothing to find for any of "
                f"{config.eval.tasks}: add image->text to eval.tasks, or listings to the split"
            )
        scores = next(iter(results.values()))
        return {"validation": scores["recall@1"], "validation_mrr": scores["mrr"]}

    split = "test" if len(catalog.indices("test")) else "validation"

    def evaluate(state: TrainState, path: Path) -> Results:
        if path.exists():
            return json.loads(path.read_text())
        listings = catalog.indices(split)
        results = judge(state.params).run(tasks, listings, listings)
        if first_process:
            write_evaluation(path, results)
        return results

    # ---- train
    chunk = config.batch // config.chunks
    batches = PairBatches(
        catalog=catalog,
        sampler=sampler,
        processor=processor,
        statistics=statistics,
        augmentation=Augmentation(
            **{name: config.data[name] for name in Augmentation.__dataclass_fields__}
        ),
        **views,
        max_terms=config.data.max_terms,
        chunks=config.chunks,
        rows=local_rows(mesh, chunk),
        seed=config.seed,
        steps=config.steps,
    )
    before = evaluate(state, workdir / "evaluation_before.json") if not saved else None
    training = Training(
        step=built.step,
        open_stream=lambda step: Stream(batches, step, config.data.workers),
        examples=config.batch,
        chunk=chunk,
        validate=validate,
        name_listings=lambda rows: [catalog.listing(int(i)).listing_id for i in rows],
        record=record,
    )
    if int(state.step) == config.steps and first_process:
        print(f"{workdir} is complete: {config.steps} steps are done", flush=True)
    state = fit(training, state, checkpoints, config, workdir, mesh)
    checkpoints.close()

    # ---- judge
    before = before or json.loads((workdir / "evaluation_before.json").read_text())
    after = evaluate(state, workdir / "evaluation.json")
    if first_process:
        print(f"{catalog.name}, {split} split, before and after {config.steps} steps:")
        print(results_table({"untrained": before, "trained": after}), flush=True)


def _sampler(
    config: ConfigDict, catalog: Catalog, saved: dict[str, str] | None
) -> tuple[CorpusStatistics, PairSampler]:
    """BM25's statistics of the training split, and the sampler with its look-alikes."""
    data = config.data
    composition = Composition(
        config.batch, data.lookalike_share, data.lookalike_group, data.hard_negatives
    )
    if config.chunks < 1 or config.batch % config.chunks:
        raise UserError(
            f"chunks is {config.chunks}, which does not divide the batch of {config.batch}"
        )
    listings, starts = listings_by_product(catalog, "train")
    attributes = []  # of each product, its listings' together
    for start, end in itertools.pairwise(starts):
        merged = {}
        for listing in listings[start:end]:
            merged |= catalog.listing(int(listing)).attributes
        attributes.append(merged)
    if saved:
        statistics = CorpusStatistics.from_json(saved["statistics"])
    else:
        statistics = CorpusStatistics.from_documents(attributes)
    neighbours = None
    if data.lookalike_share or data.hard_negatives:
        neighbours, _ = mine_neighbours(
            attributes,
            data.neighbours,
            statistics,
            cache_dir=cache_folder(data) / "neighbours",
            fingerprint=f"{catalog.fingerprint}/train",
        )
    return statistics, PairSampler(catalog, "train", composition, config.seed, neighbours)


def _encoder(
    config: ConfigDict, catalog: Catalog, saved: dict[str, str] | None
) -> tuple[encoder.Encoder, Callable[[Built], TrainState]]:
    """The encoder, and how its first state is made: anew, or from a run or a folder."""
    if saved:
        return encoder.from_record(config, saved), lambda built: built.start(None)
    if not config.init_from:
        listings = catalog.indices("train")[:TOKENIZER_LISTINGS]
        texts = [config.data.instruction]
        for index in listings:
            listing = catalog.listing(int(index))
            texts.append(listing_text(listing, listing.attributes))
        return encoder.from_preset(config, texts), lambda built: built.start(None)
    folder = Path(config.init_from)
    if any(folder.glob("*.safetensors")):
        enc = encoder.from_folder(config, folder)
        return enc, lambda built: built.start(
            hf_weights.load(folder, built.abstract.params, enc.model_config)
        )
    checkpoints, step = find_checkpoints(config.init_from)
    return encoder.from_record(config, checkpoints.record(step)), lambda built: built.start(
        checkpoints.restore_params(step, built.abstract.params)
    )
