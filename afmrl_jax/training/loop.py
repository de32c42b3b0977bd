"""The loop that every training program shares: batches in, steps, logs, validation, checkpoints.

A run goes on from the state that it is given. Nothing in the loop waits for the device but the look
at the step before, one step late.
"""

import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.chips import chip_of
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.logs import RunWriter
from afmrl_jax.core.mesh import put_batch
from afmrl_jax.data.stream import Batch, Batches, Stream
from afmrl_jax.training.goodput import (
    HOST,
    Device,
    HostNumbers,
    Processes,
    held_up,
    machine_names,
)
from afmrl_jax.training.preemption import Preemption
from afmrl_jax.training.run import Run
from afmrl_jax.training.tracing import Tracer, traced_steps

HOST_ONLY = ("listing",)  # names of a batch's arrays that the step does not read


@dataclass(frozen=True)
class Training:
    """What a program gives to the loop.

    step: (state, batch) -> (state, metrics), the state donated, as `step.make_step` makes it.
    validate: state -> metrics, of which `validation` is the one that chooses the best checkpoint;
    None where there is nothing to validate on.
    """

    step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
    batches: Batches
    examples: int  # of a global batch: what is counted per second
    unit: str  # what an example is called in the logs, as "pairs"
    rows: int  # length of the batch's second axis, which the mesh splits
    validate: Callable[[TrainState], dict[str, float]] | None
    shapes: int = 1  # sets of shapes that batches have: each further one would be a compilation
    waits: bool = False  # whether a step waits for its own numbers: the next then begins with them


@dataclass
class _Window:
    """Time and work since the last logged step."""

    began: float  # by Clock.stepping
    flops: float = 0.0
    steps: list[np.ndarray] = field(default_factory=list)  # float32[P, K] each, as HOST says

    def rates(self, examples: int, unit: str, now: float) -> dict[str, float]:
        seconds = max(now - self.began, 1e-9)
        # All wait for the process that waits the longest.
        waited = np.stack(self.steps)[:, :, HOST.index("input")].max(1).sum()
        rates = {
            f"{unit}_per_second": len(self.steps) * examples / seconds,
            "data_wait_share": min(1.0, float(waited) / seconds),
            "model_flops_per_second": self.flops / seconds,
        }
        if chip := chip_of(jax.devices()[0]):
            rates["utilisation"] = self.flops / seconds / (chip.flops * jax.device_count())
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            rates["device_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        return rates


def fit(training: Training, state: TrainState, run: Run) -> TrainState:
    """Trains from the state's step to the schedule's last, and returns the last state.

    Raises UserError where a loss is not finite, naming the step and its listings (nothing of it is
    saved), or where batches change shape. SystemExit(143) after a SIGTERM, when all is saved.
    """
    first, schedule = int(state.step), run.schedule
    if first >= schedule.steps:
        if run.first_process:
            print(f"{run.workdir} is complete: {schedule.steps} steps are done", flush=True)
        return state
    run.checkpoints.check_space(state)
    writer = RunWriter(
        run.workdir, first_step=first, steps=schedule.steps, active=run.first_process
    )
    traced = traced_steps(schedule.profile, schedule.steps)
    tracer = Tracer(traced, run.workdir / "profile", writer.say)
    with contextlib.closing(writer), Preemption() as preemption, tracer:
        with (
            contextlib.closing(Stream(training.batches, first, run.stream)) as stream,
            contextlib.closing(Device()) as device,
        ):
            steps = _Steps(training, run, writer, preemption, device)
            steps.begin(first)
            for number in range(first + 1, schedule.steps + 1):
                if tracer.begins(number):
                    jax.block_until_ready(state)  # so that these steps are alone in the trace
                    with run.clock.lost("tracing"):
                        tracer.start()
                state = steps.step(state, stream, number)
                if tracer.ends(number):
                    jax.block_until_ready(state)
                    with run.clock.lost("tracing"):
                        tracer.stop()
                last = number == schedule.steps
                validation = None
                if training.validate and (last or _is_due(number, schedule.eval_every)):
                    validation = steps.validate(state)
                due = _is_due(number, schedule.checkpoint_every)
                if last or due or steps.stop or validation is not None:
                    steps.save(state, number, validation)
                if steps.stop:
                    writer.say(steps.table())
                    run.checkpoints.wait()
                    reason = preemption.reason
                    writer.say(f"stopped by {reason} at step {number}, which is saved: start again")
                    raise SystemExit(143)
        run.checkpoints.wait()  # whoever asks for the best next must see the last one too
        writer.say(steps.table())
    return state


def _is_due(step: int, every: int) -> bool:
    """every: steps; 0 for never."""
    return bool(every) and step % every == 0


class _Steps:
    """The steps of one run of the loop, and what it counts between them."""

    def __init__(
        self,
        training: Training,
        run: Run,
        writer: RunWriter,
        preemption: Preemption,
        device: Device,
    ):
        self.stop = False  # whether any process was told to, as all of them know it
        self._training, self._run, self._writer = training, run, writer
        self._preemption, self._device = preemption, device
        self._clock, self._schedule = run.clock, run.schedule
        self._host, self._processes = HostNumbers(run.mesh), Processes(machine_names())
        self._shapes: set[tuple] = set()
        self._unseen: collections.deque = collections.deque()  # (step, listings, metrics)
        self._seen_at, self._step_seconds = 0.0, 0.0  # by the last look
        self._free_at = time.monotonic()  # since then this process waits for nothing
        self._window = _Window(0.0)

    def begin(self, step: int) -> None:
        """The first step comes next, after this one."""
        self._clock.begin(step)
        self._seen_at, self._free_at = self._clock.stepping, time.monotonic()
        self._window = _Window(self._seen_at)

    def step(self, state: TrainState, stream: Stream, number: int) -> TrainState:
        """Dispatches one step, then looks at the one before."""
        if self._training.waits:
            self.catch_up()
        asked = time.monotonic()
        batch = next(stream)
        got = time.monotonic()
        listings = batch["listing"]
        device_batch = self._put(batch, number, asked, got)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = self._training.step(state, device_batch)
        self._free_at = time.monotonic()  # what a step itself waits for, as to compile, is no delay
        self._device.dispatched(metrics["loss"])
        self._unseen.append((number, listings, metrics))
        if len(self._unseen) > 1:
            self._look()
        # Several must agree on a step: what one is told comes back with a batch two steps later.
        self.stop |= self._preemption.asked and jax.process_count() == 1
        return state

    def _put(self, batch: Batch, number: int, asked: float, got: float) -> dict[str, jax.Array]:
        """The batch on the devices, with what this process has to tell, of a wait for it too: it
        was asked for and got at these times."""
        wanted = {k: v for k, v in batch.items() if k not in HOST_ONLY}
        shapes = tuple((k, v.shape, str(v.dtype)) for k, v in sorted(wanted.items()))
        if shapes not in self._shapes and len(self._shapes) == self._training.shapes:
            new = sorted(set(shapes).difference(*self._shapes))
            raise UserError(
                f"step {number} would compile again: the batch has {new}, and this "
                f"run's have {self._training.shapes} sets of shapes; make the data pipeline pad to "
                "one of them"
            )
        self._shapes.add(shapes)
        arrays = put_batch(wanted, self._run.mesh, axis=1, rows=self._training.rows)
        # While the device is still busy with the step before, all of that costs nothing.
        idle = self._device.idle_since() if self._unseen else self._free_at
        waited, other = 0.0, 0.0
        if idle is not None:
            waited, other = held_up(max(idle, self._free_at), asked, got, time.monotonic())
        seconds = {"step": self._step_seconds, "waited": waited, "other": other}
        return arrays | {"host": self._host.put(stop=self._preemption.asked, **seconds)}

    def _look(self, extra: dict[str, float] | None = None) -> None:
        """Reads the oldest unread step's metrics, checks them, and logs them when it is time.

        extra: what else is known of that step; it is logged then in any case.
        """
        self._check()
        self._free_at, now = time.monotonic(), self._clock.stepping
        self._seen_at, self._step_seconds = now, now - self._seen_at
        number, _, metrics = self._unseen.popleft()
        host = self._host.read(metrics.pop("host"))
        self.stop |= bool(host[:, HOST.index("stop")].any())
        self._clock.waited(float(host[:, HOST.index("input")].max()))
        self._window.flops += float(metrics.pop("flops"))
        self._window.steps.append(host)
        self._writer.advance(number)
        last = number == self._schedule.steps
        if extra or last or _is_due(number, self._schedule.log_every):
            values = {k: float(v) for k, v in metrics.items() if k != "finite"} | (extra or {})
            self._log(number, values, now)

    def _log(self, number: int, values: dict[str, float], now: float) -> None:
        """Logs a step with the rates of its window, which ends with it."""
        steps, unit = np.stack(self._window.steps), self._training.unit
        values |= self._window.rates(self._training.examples, unit, now)
        values |= self._processes.spread(steps) | self._clock.scalars()
        self._processes.add(steps)
        self._writer.log(number, values, _told(values, unit))
        if slow := self._processes.slow(steps, time.monotonic()):
            self._writer.say(slow)
        self._clock.write()
        self._window = _Window(now)

    def _check(self) -> None:
        """Raises UserError where the oldest unread step was not finite."""
        number, listings, metrics = self._unseen[0]
        if not bool(metrics["finite"]):
            names = self._run.name_listings(np.unique(listings))
            raise UserError(
                f"step {number}: the loss or its gradient is not a finite number (loss "
                f"{float(metrics['loss'])}). Its batch on this process: {', '.join(names)}. Step "
                f"{self._run.checkpoints.latest or 0} is saved; look at these listings, or lower "
                "optimizer.learning_rate"
            )

    def catch_up(self) -> None:
        """Waits for all steps that are under way, and looks at them."""
        while self._unseen:
            self._look()

    def validate(self, state: TrainState) -> float:
        """Runs the program's validation; its time is not counted as training's."""
        while len(self._unseen) > 1:
            self._look()
        self._check()
        with self._clock.lost("validation"):
            values = self._training.validate(state)
        self._look(extra=values)
        return values["validation"]

    def save(self, state: TrainState, number: int, validation: float | None) -> None:
        """Saves, once every step up to this one is known to be finite."""
        self.catch_up()
        with self._clock.lost("checkpoints"):
            self._run.checkpoints.save(state, self._run.record, number, validation)
        self._clock.saved(number)
        self._free_at = time.monotonic()

    def table(self) -> str:
        """Where the time went, and how long each process's steps took."""
        return f"{self._clock.table()}\n{self._processes.table()}"


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
    parts.append(f"goodput {values['goodput']:.0%}")
    return "  ".join(parts)
