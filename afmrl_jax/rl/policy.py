"""The policy gradient's compiled parts: answers drawn, scored, and learned from.

Axes: A micro-batches · C prompts of one · Q = A C · G answers of a prompt · T answer tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import abstract_params
from afmrl_jax.checkpoints.state import abstract_state
from afmrl_jax.core.mesh import batch_sharding, batch_shards, replicated
from afmrl_jax.core.options import Options, between
from afmrl_jax.losses.policy import PolicyGradient, policy_loss, policy_metrics
from afmrl_jax.models import lora
from afmrl_jax.models.sampler import Samples, generate, sample_keys
from afmrl_jax.planning import cost
from afmrl_jax.planning.report import Part
from afmrl_jax.rl.scoring import score_answers
from afmrl_jax.training.gradients import accumulate
from afmrl_jax.training.optimizer import Optimizer, make_optimizer
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.step import Batch, Gradient, Memory, Params, TrainStep, make_step

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Rollouts(Options, section=""):
    """How many answers a step draws, and how often it learns from them."""

    queries: int = between(1)
    samples: int = between(2)  # answers to each query
    temperature: float = between(0.01, 100)
    inner_epochs: int = between(1)  # updates by the answers of one step
    vocabulary_chunk: int = between(1)  # tokens of each row whose logits are in memory at once


@dataclass(frozen=True)
class PolicyOptions(Options):
    """All of a configuration that the compiled parts need."""

    schedule: Schedule
    rollouts: Rollouts
    optimizer: Optimizer
    gradient: PolicyGradient


@dataclass(frozen=True)
class Built:
    """The compiled parts of a run. Rows are arrays [A, C, ...].

    rollout: (parameters, rows, step) -> Samples of Q queries, whole on every device.
    reference: (parameters without adapters, rows, answers) -> log-probs [A, C, G, T].
    update: its batches are {"rows", "answers", "advance"}. answers: tokens, mask, advantages,
    sampler_log_probs [A, C, G, T]; zero_variance, truncated [A, C, G]; reference_log_probs where
    there is a reference, and old_log_probs after a step's first update. Where a step has several,
    its metrics hold old_log_probs [A, C, G, T], of the parameters before it.
    """

    rollout: Callable[[Params, Arrays, int], Samples]
    reference: Callable[[Params, Arrays, Arrays], jax.Array]
    update: TrainStep
    params: Params  # abstract parameters of the generator without adapters


def build(options: PolicyOptions, mesh: Mesh, generator: Generator) -> Built:
    """Sampler and update, jitted for a mesh; nothing is computed yet."""
    schedule, rollouts = options.schedule, options.rollouts
    optimizer = make_optimizer(options.optimizer, schedule.steps * rollouts.inner_epochs)
    params = abstract_params(generator, mesh)
    trained, frozen = lora.split(params)
    abstract = abstract_state(trained, optimizer, mesh)
    graph, plain = generator.graph(), dataclasses.replace(generator, lora=None).graph()
    sampling = generator.sampling(temperature=rollouts.temperature)
    score = functools.partial(
        score_answers, chunk=rollouts.vocabulary_chunk, temperature=rollouts.temperature
    )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def rollout(params: Params, rows: Arrays, step: int) -> Samples:
        micro_batches, queries = rows["tokens"].shape[:2]
        numbers = jnp.arange(micro_batches * queries).reshape(micro_batches, queries)
        key = jax.random.fold_in(jax.random.key(schedule.seed), step)

        def together(x: jax.Array) -> jax.Array:
            # C is what the mesh splits, so it is the major part: nothing moves between devices.
            return jnp.swapaxes(x, 0, 1).reshape(micro_batches * queries, *x.shape[2:])

        def apart(x: jax.Array) -> jax.Array:
            """[C A, ...] -> [Q, ...] in the order of `numbers`."""
            x = jnp.swapaxes(x.reshape(queries, micro_batches, *x.shape[1:]), 0, 1)
            return x.reshape(-1, *x.shape[2:])

        keys = sample_keys(key, together(numbers), rollouts.samples)
        return jax.tree.map(
            apart, generate(graph, params, jax.tree.map(together, rows), keys, sampling)
        )

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh, 1))
    def reference(params: Params, rows: Arrays, answers: Arrays):
        parts = (rows, {name: answers[name] for name in ("tokens", "mask")})
        return jax.lax.map(lambda part: score(plain, params, *part)[0], parts)

    gradient = _gradient(options, functools.partial(score, graph))
    flops = functools.partial(_flops, options, generator, params)
    step = make_step(gradient, optimizer, abstract, mesh, flops)
    update = TrainStep(step, optimizer, abstract, frozen)
    return Built(rollout, reference, update, frozen or trained)


def _gradient(
    options: PolicyOptions, score: Callable[..., tuple[jax.Array, jax.Array]]
) -> Gradient:
    """The gradient of `Built.update`."""

    def loss(params: Params, part: Batch):
        rows, answers = part["rows"], part["answers"]
        log_probs, entropy = score(params, rows, answers)
        # Before the first update old and new are the same numbers, so that no pass is needed.
        answers = {"old_log_probs": jax.lax.stop_gradient(log_probs)} | answers
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in answers.items()}
        flat_scores = (x.reshape(-1, x.shape[-1]) for x in (log_probs, entropy))
        return *policy_loss(*flat_scores, flat, options.gradient), answers["old_log_probs"]

    def gradient(trained: Params, frozen: Params, memory: Memory, batch: Batch):
        def of_part(trained: Params, part: Batch):
            return loss(lora.join(trained, frozen), part)

        (value, count, totals, old), gradients = accumulate(of_part)(trained, batch)
        # Where all answers were left out nothing moves: neither momentum nor decay.
        metrics = policy_metrics(totals) | {"is_empty": count <= 0}
        if options.rollouts.inner_epochs > 1:
            metrics["old_log_probs"] = old
        return (value, memory, metrics), gradients

    return gradient


def parts(options: PolicyOptions, mesh: Mesh, generator: Generator, built: Built) -> list[Part]:
    """A step's compiled parts as planning compiles them: questions full, answers as long as they
    may be."""
    data, model, rollouts = generator.options.rows, generator.model_config, options.rollouts
    micro_batches = options.schedule.micro_batches
    queries = rollouts.queries // micro_batches
    sharding = batch_sharding(mesh, 1)
    rows = generator.abstract_rows((micro_batches, queries), sharding)

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        shape = micro_batches, queries, rollouts.samples, *shape
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    answers = {"tokens": of(jnp.int32, data.max_answer), "mask": of(jnp.bool, data.max_answer)}
    floats = ["advantages", "sampler_log_probs"]
    floats += ["reference_log_probs"] if options.gradient.kl else []
    answers |= {name: of(jnp.float32, data.max_answer) for name in floats}
    answers |= {"zero_variance": of(jnp.bool), "truncated": of(jnp.bool)}
    params = lora.join(built.update.abstract.params, built.update.frozen)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    advance = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    tokens = rollouts.queries * (data.max_tokens + rollouts.samples * data.max_answer)
    cache = 2 * model.text.num_layers * model.text.num_kv_heads * model.text.head_dim
    cache *= tokens * jnp.dtype(generator.options.model.dtype).itemsize / batch_shards(mesh)
    prompts = cost.most_work(model, rollouts.queries, data.max_tokens, data.max_patches)
    drawn = rollouts.queries * rollouts.samples * data.max_answer
    pairs = (data.max_tokens + data.max_answer / 2) * drawn * model.text.num_layers
    amount = prompts | {"tokens": prompts["tokens"] + drawn, "logits": float(drawn)}
    amount["token_pairs"] += pairs
    whole = functools.partial(cost.step_flops, model, amount=amount, gradcache=False)
    return [
        Part(
            "rollout",
            built.rollout,
            (params, rows, number),
            named_arguments={"parameters": params},
            intermediates={"cache": cache},
            useful=whole(lora.without_adapters(params)) / 3,
            default_trip_count=data.max_answer,
        ),
        built.update.part(
            {"rows": rows, "answers": answers, "advance": advance},
            intermediates={},
            useful=whole(params),
            name="update",
        ),
    ]


def _flops(options: PolicyOptions, generator: Generator, params: Params, batch: Batch) -> jax.Array:
    """Useful FLOPs of the generator in one step: answers drawn, scored and learned from."""
    model, rows, answers = generator.model_config, batch["rows"], batch["answers"]
    prompts = cost.work(model, rows)
    lengths = rows["token_mask"].sum(-1, dtype=jnp.float32)[..., None]
    tokens = answers["mask"].sum(dtype=jnp.float32)
    # All tokens of answers attend to themselves and to their prompt, which is read once.
    drawn = answers["mask"].sum(-1, dtype=jnp.float32)
    pairs = (drawn * lengths + drawn * (drawn + 1) / 2).sum() * model.text.num_layers
    amount = prompts | {
        "tokens": prompts["tokens"] + tokens,
        "token_pairs": prompts["token_pairs"] + pairs,
        "logits": tokens,
    }
    count = functools.partial(cost.step_flops, model, amount=amount, gradcache=False)
    passes = 2 if options.gradient.kl else 1  # without a gradient, a third each: sampler, reference
    forward = passes * count(lora.without_adapters(params)) / 3
    return options.rollouts.inner_epochs * count(params) + forward
