"""The loop that every training program shares: batches in, steps, logs, validation, checkpoints.

A run goes on from the state that it is given. Nothing in the loop waits for the device but the look
at the step before, one step late.
"""

import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import put_batch
from afmrl_jax.core.writer import RunWriter
from afmrl_jax.data.pipeline import Batch, Stream
from afmrl_jax.training import cost
from afmrl_jax.training.checkpoint import Checkpoints
from afmrl_jax.training.preemption import Preemption
from afmrl_jax.training.state import TrainState

HOST_ONLY = ("listing",)  # names of a batch's arrays that the step does not read
MAX_SHAPES = 1  # batches of one run have one set of shapes: each further one is a compilation


@dataclass(frozen=True)
class Training:
    """What a program gives to the loop.

    step: jitted (state, batch) -> (state, metrics), the state donated; metrics holds `loss`,
    `finite` (bool), `flops`, useful ones of the whole step, and `stop`, whether any process asked
    for it in the batch's `stop` bool[A, C]. validate: state -> metrics, of which `validation` is
    the one that chooses the best checkpoint; None where there is nothing to validate on.
    """

    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    open_stream: Callable[[int], Stream]
    examples: int  # of a global batch: what is counted per second
    unit: str  # what an example is called in the logs, as "pairs"
    chunk: int  # rows of the sharded axis, the batch's second
    validate: Callable[[TrainState], dict[str, float]] | None
    name_listings: Callable[[np.ndarray], list[str]]
    record: dict[str, str]
    waits: bool = False  # whether a step waits for its own numbers: the next then begins with them


@dataclass
class _Window:
    """Time and work since the last logged step."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0
    flops: float = 0.0

    def rates(self, examples: int, unit: str) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rates = {
            f"{unit}_per_second": self.steps * examples / seconds,
            "data_wait_share": self.waited / seconds,
            "model_flops_per_second": self.flops / seconds,
        }
        peak = cost.peak_flops(jax.devices()[0])
        if peak:
            rates["utilisation"] = self.flops / seconds / (peak * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            rates["device_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        return rates


def fit(
    training: Training,
    state: TrainState,
    checkpoints: Checkpoints,
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
) -> TrainState:
    """Trains from the state's step to `config.steps`, and returns the last state.

    Raises UserError where a loss is not finite, naming the step and its listings (nothing of it is
    saved), or where batches change shape. SystemExit(143) after a SIGTERM, when all is saved.
    """
    first = int(state.step)
    checkpoints.check_space(state)
    writer = RunWriter(
        workdir, first_step=first, steps=config.steps, active=jax.process_index() == 0
    )
    with contextlib.closing(writer), Preemption() as preemption:
        stream = training.open_stream(first)
        with contextlib.closing(stream):
            run = _Run(training, checkpoints, config, mesh, writer, preemption)
            for number in range(first + 1, config.steps + 1):
                state = run.step(state, stream, number)
                last = number == config.steps
                validation = None
                if training.validate and (
                    last or (config.eval_every and number % config.eval_every == 0)
                ):
                    validation = run.validate(state)
                due = config.checkpoint_every and number % config.checkpoint_every == 0
                if last or due or run.stop or validation is not None:
                    run.save(state, number, validation)
                if run.stop:
                    checkpoints.wait()
                    reason = preemption.reason
                    writer.say(f"stopped by {reason} at step {number}, which is saved: start again")
                    raise SystemExit(143)
    return state


class _Run:
    """One run of the loop: what it counts between steps."""

    def __init__(
        self,
        training: Training,
        checkpoints: Checkpoints,
        config: ConfigDict,
        mesh: Mesh,
        writer: RunWriter,
        preemption: Preemption,
    ):
        self.stop = False  # whether any process was told to, as all of them know it
        self._preemption = preemption
        self._training, self._checkpoints, self._config = training, checkpoints, config
        self._mesh, self._writer = mesh, writer
        self._window = _Window()
        self._shapes: set[tuple] = set()
        self._unseen: collections.deque = collections.deque()  # (step, listings, metrics)

    def step(self, state: TrainState, stream: Stream, number: int) -> TrainState:
        """Dispatches one step, then looks at the one before."""
        if self._training.waits and self._unseen:
            self._look()
        began = time.monotonic()
        batch = next(stream)
        # While the device is still busy with the step before, waiting costs nothing.
        if not self._unseen or self._unseen[-1][2]["loss"].is_ready():
            self._window.waited += time.monotonic() - began
        listings = batch["listing"]
        device_batch = self._put(batch, number)
        state, metrics = self._training.step(state, device_batch)
        self._unseen.append((number, listings, metrics))
        if len(self._unseen) > 1:
            self._look()
        return state

    def _put(self, batch: Batch, number: int) -> dict[str, jax.Array]:
        wanted = {k: v for k, v in batch.items() if k not in HOST_ONLY}
        # It comes back as a metric, so that all processes learn of it at the same step.
        wanted["stop"] = np.full(batch["listing"].shape[:2], self._preemption.asked)
        self._shapes.add(tuple((k, v.shape, str(v.dtype)) for k, v in sorted(wanted.items())))
        if len(self._shapes) > MAX_SHAPES:
            one, other = [set(shapes) for shapes in list(self._shapes)[:2]]
            raise UserError(
                f"step {number} would compile again: the batch has {sorted(one ^ other)}, and a "
                f"run has {MAX_SHAPES} set of shapes; make the data pipeline pad to one size"
            )
        return put_batch(wanted, self._mesh, axis=1, rows=self._training.chunk)

    def _look(self, extra: dict[str, float] | None = None) -> None:
        """Reads the oldest unread step's metrics, checks them, and logs them when it is time.

        extra: what else is known of that step; it is logged then in any case.
        """
        self._check()
        number, _, metrics = self._unseen.popleft()
        self.stop |= bool(metrics.pop("stop"))
        self._window.flops += float(metrics.pop("flops"))
        self._window.steps += 1
        self._writer.advance(number)
        if extra or number % self._config.log_every == 0 or number == self._config.steps:
            values = {k: float(v) for k, v in metrics.items() if k != "finite"}
            training = self._training
            values |= self._window.rates(training.examples, training.unit) | (extra or {})
            self._writer.log(number, values, _told(values, training.unit))
            self._window = _Window()

    def _check(self) -> None:
        """Raises UserError where the oldest unread step was not finite."""
        number, listings, metrics = self._unseen[0]
        if not bool(metrics["finite"]):
            names = self._training.name_listings(np.unique(listings))
            raise UserError(
                f"step {number}: the loss or its gradient is not a finite number (loss "
                f"{float(metrics['loss'])}). Its batch on this process: {', '.join(names)}. Step "
                f"{self._checkpoints.latest or 0} is saved; look at these listings, or lower "
                "optimizer.learning_rate"
            )

    def validate(self, state: TrainState) -> float:
        """Runs the program's validation; its time is not counted as training's."""
        while len(self._unseen) > 1:
            self._look()
        self._check()
        began = time.monotonic()
        values = self._training.validate(state)
        self._window.started += time.monotonic() - began
        self._look(extra=values)
        return values["validation"]

    def save(self, state: TrainState, number: int, validation: float | None) -> None:
        """Saves, once every step up to this one is known to be finite."""
        while self._unseen:
            self._look()
        self._checkpoints.save(state, self._training.record, number, validation)


def _told(values: dict[str, float], unit: str) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    parts += [f"{name} {values[name]:.2f}" for name in ("accuracy", "reward") if name in values]
    parts.append(f"{values[f'{unit}_per_second']:.1f} {unit}/s")
    parts.append(f"{values['model_flops_per_second'] / 1e9:.0f} GFLOP/s")
    if "utilisation" in values:
        parts.append(f"utilisation {values['utilisation']:.1%}")
    if "device_memory_gb" in values:
        parts.append(f"memory {values['device_memory_gb']:.1f} GB")
    if "validation" in values:
        parts.append(f"validation {values['validation']:.3f}")
    parts.append(f"data wait {values['data_wait_share']:.0%}")
    return "  ".join(parts)
