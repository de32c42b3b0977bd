"""Searches settings that fit a machine: the most micro-batches first, then what runs faster."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from afmrl_jax.core.tables import markdown_table
from afmrl_jax.models.layers import REMATS

log = logging.getLogger(__name__)

TRIES = 12  # compilations of a search


@dataclass(frozen=True)
class Choice:
    """What the search may change of a run. mesh: sizes by axis."""

    mesh: tuple[tuple[str, int], ...]
    remat: str
    micro_batches: int

    @property
    def told(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh if size > 1)
        return f"{mesh or 'one device'}, remat {self.remat}, micro_batches {self.micro_batches}"


@dataclass(frozen=True)
class Tried:
    """What came of a choice: seconds of a step, None where chips are unknown or it does not fit."""

    choice: Choice
    fits: bool
    seconds: float | None
    needed: float  # bytes of the device's memory, of the part that needs most


def search(
    measure: Callable[[Choice], Tried], asked: Tried, batch: int, devices: int
) -> list[Tried]:
    """The asked choice and what was tried beside it, in order; at most TRIES compilations.

    First a choice that fits: what keeps least, then more and more micro-batches. From it other
    meshes, the parameters over fewer devices or more; on the best of them fewer micro-batches and
    what computes less again, as long as that fits.
    """
    tried = {asked.choice: asked}

    def look(choice: Choice) -> Tried:
        if choice not in tried and len(tried) < TRIES and _possible(choice, batch):
            tried[choice] = measure(choice)
        return tried.get(choice, Tried(choice, False, None, 0.0))

    best = asked
    while not best.fits:
        tighter = _tighter(best.choice)
        if not _possible(tighter, batch) or len(tried) >= TRIES:
            return list(tried.values())
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
            found = look(dataclasses.replace(best.choice, remat=remat, micro_batches=pieces))
            if found.fits:
                best = _better(best, found)
                break
    return list(tried.values())


def _possible(choice: Choice, batch: int) -> bool:
    shards = 1
    for axis, size in choice.mesh:
        shards *= size if axis != "tensor" else 1
    return batch % choice.micro_batches == 0 and batch // choice.micro_batches % shards == 0


def _tighter(choice: Choice) -> Choice:
    if choice.remat != "full":
        return dataclasses.replace(choice, remat="full")
    return dataclasses.replace(choice, micro_batches=2 * choice.micro_batches)


def _better(one: Tried, other: Tried) -> Tried:
    """The quicker of two; of unknown chips the one that computes more at once."""
    if not other.fits:
        return one
    if one.seconds is None or other.seconds is None:
        return other if other.choice.micro_batches <= one.choice.micro_batches else one
    return other if other.seconds < one.seconds else one


def _meshes(sizes: dict[str, int], devices: int) -> list[tuple[tuple[str, int], ...]]:
    """Other meshes of as many devices: parameters over a quarter, four times as many, or all."""
    around = devices // sizes["slice"] // sizes["tensor"]
    spread = {sizes["fsdp"] // 4, 4 * sizes["fsdp"], around} - {0, sizes["fsdp"]}
    return [
        tuple((sizes | {"fsdp": fsdp, "data": around // fsdp}).items())
        for fsdp in sorted(spread)
        if fsdp <= around and around % fsdp == 0
    ]


def _tried_table(tried: list[Tried]) -> str:
    rows = []
    for one in tried:
        took = "" if one.seconds is None else f"{one.seconds:.3g}"
        fits = "yes" if one.fits else "no"
        rows.append((one.choice.told, took, f"{one.needed / 2**30:.3g}", fits))
    return markdown_table(("tried", "seconds a step", "GiB a device", "fits"), rows)


def _advice(tried: list[Tried]) -> str:
    """The quickest of what fits, as flags."""
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return "Nothing that was tried fits: take more devices, a smaller model or LoRA."
    best = fitting[0]
    for one in fitting[1:]:
        best = _better(best, one)
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best.choice.mesh)
    remat, pieces = best.choice.remat, best.choice.micro_batches
    flags = f"{mesh} --config.model.remat={remat} --config.micro_batches={pieces}"
    return f"Quickest of what fits: {flags}"
