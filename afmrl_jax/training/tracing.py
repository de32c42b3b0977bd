"""The profiler's trace of some steps of a run: what host and devices do, and when."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from afmrl_jax.core.errors import UserError


def traced_steps(profile: str, steps: int) -> range:
    """The steps that `config.profile`, as START:END, asks for, both included; none for "".

    Raises UserError where it does not read so, or where a run of so many steps has them not.
    """
    if not profile:
        return range(0)
    bounds = re.fullmatch(r"(\d+):(\d+)", profile)
    if not bounds or not 1 <= int(bounds[1]) <= int(bounds[2]) <= steps:
        raise UserError(
            f"profile is {profile!r}: give the first and the last step to trace, as 11:13, from 1 "
            f"to {steps}, the run's steps"
        )
    return range(int(bounds[1]), int(bounds[2]) + 1)


class Tracer:
    """Traces steps into a folder; a run that ends among them leaves what it has of them."""

    def __init__(self, steps: range, folder: Path, say: Callable[[str], None]):
        self._left, self._folder, self._say = steps, folder, say
        if jax.process_count() > 1:  # each has devices of its own
            self._folder = folder / f"process_{jax.process_index()}"
        self._running = False

    def begins(self, step: int) -> bool:
        """Whether tracing begins with this step: then call `start`, with nothing under way."""
        return not self._running and step in self._left

    def ends(self, step: int) -> bool:
        """Whether this is the last one: then call `stop`, when it is done."""
        return self._running and step == self._left[-1]

    def start(self) -> None:
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._running = True

    def stop(self) -> None:
        """Writes the trace and says where it lies."""
        self._running = False
        jax.profiler.stop_trace()
        self._left = range(0)
        self._say(
            f"the trace lies in {self._folder}: open it by xprof --logdir={self._folder} (pip "
            "install xprof) or TensorBoard's Profile tab, or give perfetto_trace.json.gz in it to "
            "ui.perfetto.dev"
        )

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            self.stop()
