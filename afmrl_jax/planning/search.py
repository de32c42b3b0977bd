"""Searches settings that fit a machine: first any that fit, then faster ones."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from afmrl_jax.core.tables import markdown_table
from afmrl_jax.models.layers import REMATS

log = logging.getLogger(__name__)

TRIES = 12  # compilations a search


@dataclass(frozen=True)
class Choice:
    """The settings of a run that the search may change."""

    mesh: tuple[tuple[str, int], ...]  # (axis, size)
    remat: str
    micro_batches: int

    @property
    def label(self) -> str:
        """The settings, for a table."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh if size > 1)
        return f"{mesh or 'one device'}, remat {self.remat}, micro_batches {self.micro_batches}"


@dataclass(frozen=True)
class Trial:
    """The measured costs of a choice."""

    choice: Choice
    fits: bool
    seconds: float | None  # a step; None on unknown chips, or where it does not fit
    needed: float  # bytes of a device's memory, of the part that needs most


def search(
    measure: Callable[[Choice], Trial], configured: Trial, batch: int, devices: int
) -> list[Trial]:
    """The configured choice and all other trials, in order; at most TRIES compilations.

    First it looks for a choice that fits: remat "full", then more and more micro-batches. From
    there it tries other meshes, with parameters over fewer devices or more. On the best mesh it
    tries fewer micro-batches, then less recomputation, as long as they fit.
    """
    trials = {configured.choice: configured}

    def look(choice: Choice) -> Trial:
        if choice not in trials and len(trials) < TRIES and _is_possible(choice, batch):
            trials[choice] = measure(choice)
        return trials.get(choice, Trial(choice, False, None, 0.0))

    best = configured
    while not best.fits:
        tighter = _tighter(best.choice)
        if not _is_possible(tighter, batch) or len(trials) >= TRIES:
            return list(trials.values())
        best = look(tighter)
    for mesh in _meshes(dict(best.choice.mesh), devices):
        best = _better(best, look(dataclasses.replace(best.choice, mesh=mesh)))
    while best.choice.micro_batches > 1:
        larger = look(
            dataclasses.replace(best.choice, micro_batches=best.choice.micro_batches // 2)
        )
        if _better(best, larger) is best:
            break
        best = larger
    for remat in reversed(REMATS[: REMATS.index(best.choice.remat)]):
        for factor in (1, 2, 4):
            pieces = factor * best.choice.micro_batches
            trial = look(dataclasses.replace(best.choice, remat=remat, micro_batches=pieces))
            if trial.fits:
                best = _better(best, trial)
                break
    return list(trials.values())


def _is_possible(choice: Choice, batch: int) -> bool:
    shards = 1
    for axis, size in choice.mesh:
        shards *= size if axis != "tensor" else 1
    return batch % choice.micro_batches == 0 and batch // choice.micro_batches % shards == 0


def _tighter(choice: Choice) -> Choice:
    if choice.remat != "full":
        return dataclasses.replace(choice, remat="full")
    return dataclasses.replace(choice, micro_batches=2 * choice.micro_batches)


def _better(best: Trial, other: Trial) -> Trial:
    """The quicker of two trials; on unknown chips the one with fewer micro-batches."""
    if not other.fits:
        return best
    if best.seconds is None or other.seconds is None:
        return other if other.choice.micro_batches <= best.choice.micro_batches else best
    return other if other.seconds < best.seconds else best


def _meshes(sizes: dict[str, int], devices: int) -> list[tuple[tuple[str, int], ...]]:
    """Other meshes of as many devices: fsdp a quarter as large, four times as large, or largest."""
    largest = devices // sizes["slice"] // sizes["tensor"]
    candidates = {sizes["fsdp"] // 4, 4 * sizes["fsdp"], largest} - {0, sizes["fsdp"]}
    return [
        tuple((sizes | {"fsdp": fsdp, "data": largest // fsdp}).items())
        for fsdp in sorted(candidates)
        if fsdp <= largest and largest % fsdp == 0
    ]


def trials_table(trials: list[Trial]) -> str:
    """Settings, seconds and memory of each trial, as Markdown."""
    rows = []
    for trial in trials:
        seconds = "" if trial.seconds is None else f"{trial.seconds:.3g}"
        fits = "yes" if trial.fits else "no"
        rows.append((trial.choice.label, seconds, f"{trial.needed / 2**30:.3g}", fits))
    return markdown_table(("tried", "seconds a step", "GiB a device", "fits"), rows)


def advice(trials: list[Trial]) -> str:
    """The flags of the quickest trial that fits."""
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return "Nothing that was tried fits: take more devices, a smaller model or LoRA."
    best = fitting[0]
    for trial in fitting[1:]:
        best = _better(best, trial)
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best.choice.mesh)
    remat, pieces = best.choice.remat, best.choice.micro_batches
    flags = f"{mesh} --config.model.remat={remat} --config.micro_batches={pieces}"
    return f"Quickest of what fits: {flags}"
