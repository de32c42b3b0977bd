"""One step of RAR: answers drawn, rewarded, watched, and learned from.

Axes: A micro-batches · C queries of one · Q = A C queries · G answers of a query · B = Q G ·
T tokens of an answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from afmrl_jax.assembly.generator import Answer
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.mesh import put_batch
from afmrl_jax.core.types import Metrics, Rows
from afmrl_jax.data.queries import QueryBatches
from afmrl_jax.models.sampler import Samples
from afmrl_jax.rl.credit import token_advantages
from afmrl_jax.rl.environment import Environment, Laps, RewardedAnswers
from afmrl_jax.rl.learner import Learner
from afmrl_jax.rl.watch import WatchLimits, stopped, watch


@dataclass(frozen=True)
class KeptRollouts:
    """The rollouts.jsonl of a run. every: queries of which one is kept; 0: none."""

    path: Path
    every: int

    def add(self, step: int, rewarded: RewardedAnswers, *, everything: bool) -> None:
        """Adds every n-th group of the run, or all of a step, by the first process."""
        every = 1 if everything else self.every
        if every and jax.process_index() == 0:
            groups = rewarded.groups()
            first = (step - 1) * len(groups)
            kept = [group for q, group in enumerate(groups) if (first + q) % every == 0]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **group}) + "\n" for group in kept)


class Step:
    """A step of a run, as `training.loop` calls it: (state, rows) -> (state, metrics)."""

    def __init__(
        self,
        learner: Learner,
        batches: QueryBatches,
        environment: Environment,
        limits: WatchLimits,
        kept: KeptRollouts,
    ):
        self._learner, self._batches, self._environment = learner, batches, environment
        self._limits, self._kept = limits, kept

    def __call__(self, state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        """rows: [A, C, ...], and `host`, which the loop adds. Raises UserError where the watch sees
        reward hacking, and where the reward's function fails."""
        laps, number = Laps(), int(state.step)
        rows = dict(rows)
        host = rows.pop("host")
        samples = self._learner.draw(state.params, rows, number)
        laps("rollout")
        drawn = self._read(samples)
        rewarded = self._reward(number, samples, drawn, laps)
        verdict = watch(rewarded.rollouts, self._limits)
        self._kept.add(number + 1, rewarded, everything=bool(verdict.sentence))
        if verdict.sentence:
            raise stopped(number + 1, verdict, self._kept.path)
        answers = self._answers(samples, drawn, rewarded)
        state, metrics = self._learner.learn(state, rows, answers, host)
        laps("update")
        watched = {f"watch_{name}": figure for name, figure in verdict.figures.items()}
        return state, metrics | rewarded.metrics() | watched | laps.seconds

    def _read(self, samples: Samples) -> list[Answer]:
        lengths = samples.mask.sum(-1)
        return [
            self._learner.generator.read(
                samples.tokens[place][: lengths[place]],
                samples.log_probs[place][: lengths[place]],
                bool(samples.truncated[place]),
            )
            for place in np.ndindex(lengths.shape)
        ]

    def _reward(
        self, number: int, samples: Samples, answers: Sequence[Answer], laps: Laps
    ) -> RewardedAnswers:
        listings, draws = self._batches.draw(number)
        return self._environment.judge(
            listings,
            draws,
            [answer.text for answer in answers],
            [answer.closed for answer in answers],
            samples.mask.sum(-1).reshape(-1),
            laps,
        )

    def _answers(
        self, samples: Samples, answers: Sequence[Answer], rewarded: RewardedAnswers
    ) -> Rows:
        """What the update reads of all answers, as [A, C, ...] on the mesh."""
        plain = self._learner.options.temperature == 1  # then the policy itself was drawn from
        drawn_from = samples.log_probs if plain else samples.sampling_log_probs
        values = {
            "tokens": samples.tokens,
            "mask": samples.mask,
            "sampler_log_probs": drawn_from,
            "truncated": samples.truncated,
            "advantages": token_advantages(
                rewarded.advantages.values,
                rewarded.pair_advantages,
                answers,
                self._learner.generator.tokenizer,
                samples.mask.shape[-1],
            ),
            "zero_variance": np.broadcast_to(
                rewarded.advantages.zero_variance[:, None], samples.truncated.shape
            ),
        }
        micro_batches = self._batches.micro_batches
        queries = self._batches.queries // micro_batches
        local = {
            name: x.reshape(micro_batches, queries, *x.shape[1:])[:, self._batches.rows]
            for name, x in values.items()
        }
        return put_batch(local, self._learner.mesh, axis=1, rows=queries)
