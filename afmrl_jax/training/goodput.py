"""Where a run's time goes: goodput, the share of it that trains, and which process holds it up.

Goodput is what is left of the time since the run's first start without what compilation, waits for
input, validation, saving and restarts took, and without steps that a restart did again.

Axes: D devices · P processes · K numbers that a process tells of a step (HOST).
"""

import collections
import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.logs import duration
from afmrl_jax.core.mesh import AXES
from afmrl_jax.core.processes import texts_of_all

# start: of the first attempt, until its first step; restart: from the last sign of life of an
# attempt to the first step of the next; repeated: steps after the checkpoint that it went on from.
LOST = (
    "start", "compilation", "input", "validation", "checkpoints", "tracing", "restart", "repeated",
)  # fmt: skip
REMEMBERED = 32  # checkpoints whose time is known, of which a restart may go on from any
NAME_BYTES = 64  # of a machine's name

# Of a step, in seconds but for the first: whether the process was asked to stop; the step before;
# its wait for the batch, and its other work between two steps, while the device had nothing to do.
HOST = ("stop", "step", "input", "other")
SLOW = 2.0  # times the median
SLOW_SHARE = 0.1  # of a step: by less than that nobody is held up
SLOW_WINDOWS = 3  # logged ones, in a row
SLOW_PAUSE = 600  # seconds until the same is told again


class _Compilation:
    """Seconds of tracing, lowering and compiling in this process, so far."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: collections.deque = collections.deque(maxlen=10_000)  # (start, end)

    def __call__(self, event: str, seconds: float, **_: object) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.monotonic()
        start = end - seconds
        while self._spans and self._spans[-1][0] >= start:  # one function traced inside another
            inner = self._spans.pop()
            self.seconds -= inner[1] - inner[0]
        start = max(start, self._spans[-1][1]) if self._spans else start
        self._spans.append((start, max(start, end)))
        self.seconds += self._spans[-1][1] - start


_compilation = _Compilation()
jax.monitoring.register_event_duration_secs_listener(_compilation)


class Clock:
    """A run's time since its first start, over all of its starts; made where the program begins.

    It goes on from what an earlier attempt left in its file.
    """

    def __init__(self, path: Path):
        """path: goodput.json in the workdir, which the first process writes."""
        self._path, self._opened = path, time.monotonic()
        self._before, self.starts = 0.0, 1  # seconds before this attempt; attempts with this one
        self._lost = dict.fromkeys(LOST, 0.0)
        self._compiled = _compilation.seconds
        self._trained_at: dict[int, float] = {}  # step of a checkpoint -> productive seconds

    def begin(self, step: int) -> None:
        """The first step follows; `step` is the state's, 0 in a run that begins."""
        ready = time.monotonic() - self._opened
        ready -= _compilation.seconds - self._compiled
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            self._lost["start"] += ready
            return
        # Two readings of the wall clock, which may have been set meanwhile.
        gap = max(0.0, time.time() - (time.monotonic() - self._opened) - record["written"])
        self._before, self.starts = record["seconds"] + gap, record["starts"] + 1
        self._lost |= record["lost"]
        trained = record["seconds"] - sum(record["lost"].values())
        trained_at = {int(at): seconds for at, seconds in record["trained_at"].items()}
        self._trained_at = {at: s for at, s in trained_at.items() if at <= step}
        kept = self._trained_at[max(self._trained_at)] if self._trained_at else 0.0
        self._lost["restart"] += gap + ready
        self._lost["repeated"] += trained - kept

    @property
    def seconds(self) -> float:
        """Since the first start."""
        return self._before + time.monotonic() - self._opened

    @property
    def lost_seconds(self) -> dict[str, float]:
        """Seconds that did not train, by LOST."""
        compiled = _compilation.seconds - self._compiled
        return self._lost | {"compilation": self._lost["compilation"] + compiled}

    @property
    def trained(self) -> float:
        """Productive seconds."""
        return self.seconds - sum(self.lost_seconds.values())

    @property
    def stepping(self) -> float:
        """Seconds that went into steps, with their waits for input: what rates are of."""
        return self.trained + self._lost["input"]

    @contextlib.contextmanager
    def lost(self, what: str) -> Iterator[None]:
        """Counts what happens inside as lost; but compilation as that."""
        before = self.trained
        try:
            yield
        finally:
            self._lost[what] += max(0.0, self.trained - before)

    def waited(self, seconds: float) -> None:
        """Steps waited so long for input."""
        self._lost["input"] += seconds

    def saved(self, step: int) -> None:
        """All up to this step is in a checkpoint, from which another attempt may go on."""
        self._trained_at[step] = self.trained
        self._trained_at = dict(list(self._trained_at.items())[-REMEMBERED:])
        self.write()

    def write(self) -> None:
        """Leaves what another attempt goes on from."""
        if jax.process_index() == 0:
            record = {
                "seconds": self.seconds,
                "written": time.time(),
                "starts": self.starts,
                "lost": self.lost_seconds,
                "trained_at": self._trained_at,
            }
            write_atomically(self._path, json.dumps(record, indent=2))

    def scalars(self) -> dict[str, float]:
        """For the logs: goodput in [0, 1], and the seconds lost so far, since the first start."""
        lost = {f"lost_{what}_seconds": seconds for what, seconds in self.lost_seconds.items()}
        return {"goodput": self.trained / self.seconds} | lost

    def table(self) -> str:
        """Where the time went, a line each."""
        attempts = "" if self.starts == 1 else f", over {self.starts} starts"
        lines = [f"Time since the first start: {duration(self.seconds)}{attempts}"]
        rows = {"training (goodput)": self.trained} | self.lost_seconds
        for what, seconds in rows.items():
            lines.append(f"  {what:<20}{duration(seconds):>10}{seconds / self.seconds:>8.1%}")
        return "\n".join(lines)


def abstract_host(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What a step finds as `host` in its batch, and returns whole in its metrics: float32[D, K]."""
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    return jax.ShapeDtypeStruct((mesh.size, len(HOST)), np.float32, sharding=sharding)


class Device:
    """Since when this process's devices have had nothing to do: a thread waits for each step's
    result and notes the time, so that the loop itself need not wait."""

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue = queue.SimpleQueue()  # (number, result); None: no more
        self._given, self._done = 0, (0, time.monotonic())  # steps; the last one done, and when
        threading.Thread(target=self._watch, name="device", daemon=True).start()

    def _watch(self) -> None:
        while (step := self._steps.get()) is not None:
            number, result = step
            with contextlib.suppress(Exception):  # the loop meets it too, and says it
                jax.block_until_ready(result)
            self._done = number, time.monotonic()
            del step, result  # they would be held until the next one

    def dispatched(self, result: jax.Array) -> None:
        """The devices have got one more step, with this among its results."""
        self._given += 1
        self._steps.put((self._given, result))

    def idle_since(self) -> float | None:
        """By time.monotonic(); None while they are busy."""
        number, ended = self._done
        return ended if number == self._given else None

    def close(self) -> None:
        self._steps.put(None)


def held_up(idle: float, asked: float, got: float, now: float) -> tuple[float, float]:
    """For how long the device had nothing to do until `now`, while a batch was waited for and for
    other reasons. idle: since when. asked, got: when that wait began and ended."""
    waited = max(0.0, got - max(asked, idle))
    return waited, max(0.0, now - idle) - waited


class HostNumbers:
    """What each process tells of its steps: it travels with the batch and comes back as a metric,
    so that all know it at the same step, and nobody waits for it."""

    def __init__(self, mesh: Mesh):
        self._host = abstract_host(mesh)
        owners = np.array([device.process_index for device in mesh.devices.flat])
        self._rows = np.unique(owners, return_index=True)[1]  # int[P], a device of each

    def put(self, *, stop: bool, step: float, waited: float, other: float) -> jax.Array:
        """This process's numbers of a step, as HOST says, on its devices: float32[D, K]."""
        row = np.array([[stop, step, waited, other]], np.float32)
        return jax.make_array_from_callback(self._host.shape, self._host.sharding, lambda _: row)

    def read(self, host: jax.Array) -> np.ndarray:
        """All processes' numbers of a step that is done, from its metrics: float32[P, K]."""
        return np.asarray(host)[self._rows]


class Processes:
    """How long each process's steps take, and who holds up the others."""

    def __init__(self, machines: list[str]):
        """machines: P names."""
        self._names = machines
        self._sums, self._steps = np.zeros((len(machines), len(HOST))), 0
        self._streak = np.zeros(len(machines), int)
        self._told = np.full(len(machines), -np.inf)

    def add(self, steps: np.ndarray) -> None:
        """Counts steps, float32[steps, P, K], for the table."""
        self._sums, self._steps = self._sums + steps.sum(0), self._steps + len(steps)

    def spread(self, steps: np.ndarray) -> dict[str, float]:
        """For the logs, of float32[steps, P, K]: how long steps took, and what held them up."""
        on_host = steps[:, :, 2:].sum(-1).mean(0)
        scalars = {
            "step_seconds": float(np.median(steps[:, :, 1])),
            "step_seconds_max": float(steps[:, :, 1].max()),
            "host_seconds": _median(on_host),
            "host_seconds_max": float(on_host.max()),
        }
        return scalars | ({"slowest_process": int(on_host.argmax())} if len(on_host) > 1 else {})

    def slow(self, steps: np.ndarray, now: float) -> str | None:
        """A sentence about a process that has long held up the others; None where none does.

        steps: a logged window's, float32[steps, P, K]. now: seconds. In lock-step all processes'
        steps take equally long: only what each does between them tells who is slow.
        """
        mean = steps.mean(0)
        on_host = mean[:, 2:].sum(-1)
        usual = _median(on_host)
        is_slow = (on_host > SLOW * usual) & (on_host - usual > SLOW_SHARE * np.median(mean[:, 1]))
        self._streak = np.where(is_slow, self._streak + 1, 0)
        due = (self._streak >= SLOW_WINDOWS) & (now - self._told > SLOW_PAUSE)
        if not due.any():
            return None
        slowest = int(np.where(due, on_host, -1).argmax())
        self._told[slowest] = now
        _, _, waited, other = mean[slowest]
        what = "a step's batch takes" if waited > other else "between two steps its own work takes"
        return (
            f"process {slowest} ({self._names[slowest]}) is slow: {what} "
            f"{max(waited, other):.2f} s there, where the median is "
            f"{_median(mean[:, 2 if waited > other else 3]):.2f} s: look what else runs on that "
            "machine, and how fast it reads data.path"
        )

    def table(self, rows: int = 16) -> str:
        """Mean seconds a step of each process, of this attempt; of many, those slowest by
        themselves."""
        mean = self._sums / max(1, self._steps)
        order = np.argsort(-mean[:, 2:].sum(-1), kind="stable")[:rows]
        lines = [f"{'process':<28}{'step s':>10}{'input s':>10}{'other s':>10}"]
        for process in sorted(order):
            _, step, waited, other = mean[process]
            name = f"{process} ({self._names[process]})"
            lines.append(f"{name:<28}{step:>10.3f}{waited:>10.3f}{other:>10.3f}")
        if left := len(mean) - len(order):
            lines.append(f"and {left} faster ones")
        return "\n".join(lines)


def _median(numbers: np.ndarray) -> float:
    """The lower median: of two the lesser, so that one of two can be slow."""
    return float(np.sort(numbers)[(len(numbers) - 1) // 2])


def machine_names() -> list[str]:
    """Of all P processes, which ask at the same time."""
    return texts_of_all(socket.gethostname(), NAME_BYTES)
