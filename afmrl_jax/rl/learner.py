"""The generator as RAR trains it: it draws answers to queries, and learns from their advantages.

Axes: A micro-batches · C queries of one · Q = A C queries · G answers of a query · T tokens of an
answer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.options import DTYPES
from afmrl_jax.assembly.pretrained import Base, read_base
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.types import Metrics, Params, Rows
from afmrl_jax.models import lora
from afmrl_jax.models.partition import MATRIX
from afmrl_jax.models.sampler import Samples
from afmrl_jax.planning.report import check_fits
from afmrl_jax.rl.policy import Built, PolicyOptions, Rollouts, build, parts
from afmrl_jax.training.run import fresh_params


@dataclass(frozen=True)
class Learner:
    """The compiled parts with what they take beside a state.

    frozen: parameters that are not trained, {} where all are. reference: parameters to stay near,
    as `Built.reference` takes them; None without.
    """

    generator: Generator
    mesh: Mesh
    options: Rollouts
    built: Built
    frozen: Params
    reference: Params | None

    def weights(self, trained: Params) -> Params:
        """The parameters that answers are drawn with: the policy's, with nothing copied."""
        return lora.join(trained, self.frozen)

    def draw(self, trained: Params, rows: Rows, step: int) -> Samples:
        """Answers to the queries of a step, on the host: arrays [Q, G, ...]. rows: [A, C, ...]."""
        samples = self.built.rollout(self.weights(trained), rows, step)
        return jax.tree.map(np.asarray, samples)

    def learn(
        self, state: TrainState, rows: Rows, answers: Rows, host: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The updates by one step's answers; the metrics are the last one's.

        rows: [A, C, ...]. answers: as `Built.update` takes them, without log-probs but the
        sampler's. host: numbers of the loop, which come back among the metrics.
        """
        if self.reference is not None:
            scores = self.built.reference(self.reference, rows, answers)
            answers = answers | {"reference_log_probs": scores}
        batch = {"rows": rows, "answers": answers, "host": host}
        for epoch in range(1, self.options.inner_epochs + 1):
            batch["advance"] = int(epoch == self.options.inner_epochs)
            state, metrics = self.built.update.function(self.frozen, state, batch)
            if self.options.inner_epochs > 1:
                batch["answers"] = answers | {"old_log_probs": metrics.pop("old_log_probs")}
        return state, jax.block_until_ready(metrics)


def make_learner(
    options: PolicyOptions, mesh: Mesh, generator: Generator, base: Base
) -> tuple[Learner, Params | Callable[[], Params], Base]:
    """The learner, the parameters that are trained as they begin, or what makes them, and the base
    with its fingerprint.

    base: where the generator's parameters lie, to begin with and to stay near. Raises UserError
    where a step does not fit the devices, and as `read_base` does.
    """
    built = build(options, mesh, generator)
    for part in parts(options, mesh, generator, built):
        check_fits(part, mesh)
    params, base = read_base(generator, built.params, base)
    frozen, begin, reference = {}, params, None
    if generator.lora:
        frozen = params
        begin = functools.partial(fresh_params, generator, options.schedule.seed)
    if options.gradient.kl:
        dtype = DTYPES[generator.options.model.dtype]
        reference = params if generator.lora else as_multiplied(params, dtype)
    return Learner(generator, mesh, options.rollouts, built, frozen, reference), begin, base


def as_multiplied(params: Params, dtype: Any) -> Params:
    """A copy with the matrices as products round them: half the memory, and the same numbers."""

    def rounded(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jnp.copy(x).astype(dtype if MATRIX.search(name) else x.dtype)

    shardings = jax.tree.map(lambda x: x.sharding, params)
    copy = functools.partial(jax.tree_util.tree_map_with_path, rounded)
    return jax.jit(copy, out_shardings=shardings)(params)
