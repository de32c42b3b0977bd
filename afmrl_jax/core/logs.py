"""A run's logs: metrics.jsonl, TensorBoard, and a line or a progress bar on the terminal."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from afmrl_jax.core.files import write_atomically


def cut_back(path: Path, step: int) -> None:
    """Drops the steps after `step`, and a half-written last line, from a metrics.jsonl."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a process that was killed leaves at most one torn line
        if row["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunWriter:
    """Writes a run's logs; does nothing where `active` is False (every process but the first)."""

    def __init__(self, workdir: Path, *, first_step: int, steps: int, active: bool):
        """Opens the logs and cuts them back to `first_step`, the restored step (0 = from scratch).

        steps: of the whole run.
        """
        self.active = active
        self._first_step, self._steps = first_step, steps
        self._started = time.monotonic()
        self._progress = None
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        cut_back(workdir / "metrics.jsonl", first_step)
        self._jsonl = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=first_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Moves the progress bar, where there is one."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float], summary: str) -> None:
        """Records a step's metrics; the terminal shows `summary`.

        Values that are not finite are written as null: JSON has no NaN.
        """
        if not self.active:
            return
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
        self._jsonl.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._progress:
            self._progress.update(self._task, description=summary, completed=step)
        else:
            spent = time.monotonic() - self._started
            left = spent / max(1, step - self._first_step) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {summary}  ETA {duration(left)}")

    def say(self, text: str) -> None:
        """Prints a plain line, above the progress bar where there is one."""
        if not self.active:
            return
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the files and removes the progress bar."""
        if not self.active:
            return
        if self._progress:
            self._progress.stop()
        self._jsonl.close()
        self._tensorboard.close()
