"""Tells what a run would need and how long a step would take, on devices that need not be there.

    python -m afmrl_jax.main --config=configs/agcl.py --config.model.preset=qwen2_vl_2b \\
        --plan=v5e:16x16          # or 2xv5e:16x16, two slices; or local, the devices at hand

1. Make the mesh of the topology, and compile the run's own steps for it with XLA's TPU compiler.
2. Tell memory, work, time and exchanges of the run as it is configured.
3. Look for better: meshes, then what the backward pass keeps, then the GradCache chunk.
4. Print tables, and write WORKDIR/plan.json.

Only shapes matter: no catalogue is opened, and no weights are read.
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_ranges, flatten
from afmrl_jax.models.layers import REMATS

log = logging.getLogger(__name__)

PLANNED = ("agcl", "sft", "rar")
TOPOLOGY = re.compile(r"(?:(\d+)x)?(v\d\w*:\d+(?:x\d+)+)")
TRIES = 12  # compilations of a search


@dataclass(frozen=True)
class Choice:
    """What the search may change of a run. mesh: sizes by axis."""

    mesh: tuple[tuple[str, int], ...]
    remat: str
    chunks: int

    @property
    def told(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh if size > 1)
        return f"{mesh or 'one device'}, remat {self.remat}, chunks {self.chunks}"


@dataclass(frozen=True)
class Tried:
    """What came of a choice: seconds of a step, None where chips are unknown or it does not fit."""

    choice: Choice
    fits: bool
    seconds: float | None
    needed: float  # bytes of the device's memory, of the part that needs most


def main(config: ConfigDict, workdir: Path, topology: str) -> None:
    """Plans `config.program` for a topology. Raises UserError for what it cannot plan."""
    if config.program not in PLANNED:
        raise UserError(f"--plan knows {', '.join(PLANNED)}, not {config.program}")
    devices = devices_of(topology)
    from afmrl_jax.training import planning  # it loads JAX, which reads what devices_of has set

    def measure(choice: Choice) -> tuple[Tried, list[Any]]:
        began = time.monotonic()
        reports = reports_of(_changed(config, choice), devices)
        fits = all(report.fits for report in reports)
        known = all(report.seconds is not None for report in reports)
        tried = Tried(
            choice,
            fits,
            sum(report.seconds for report in reports) if known and fits else None,
            max(report.needed for report in reports),
        )
        told = f"{tried.seconds:.3g} s" if tried.seconds else "fits" if fits else "does not fit"
        log.info("%s: %s (compiled in %.0f s)", choice.told, told, time.monotonic() - began)
        return tried, reports

    asked = _asked(config, devices)
    first, reports = measure(asked)
    print(f"\n{config.program} on {topology}, {len(devices)} devices: {asked.told}\n")
    print(planning.memory_table(reports), planning.time_table(reports), sep="\n\n", flush=True)
    for report in reports:
        if report.exchanges:
            print(f"\n{report.name}:\n{planning.exchange_table(report)}", flush=True)
    tried = search(lambda choice: measure(choice)[0], first, _batch(config), len(devices))
    print(f"\n{_tried_table(tried)}\n{_advice(tried)}", flush=True)
    result = {
        "topology": topology,
        "asked": dataclasses.asdict(asked),
        "reports": [dataclasses.asdict(report) for report in reports],
        "tried": [dataclasses.asdict(one) for one in tried],
    }
    from afmrl_jax.core.files import write_atomically

    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "plan.json", json.dumps(result, indent=2))


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, or those at hand. Must run before JAX is loaded elsewhere."""
    if topology == "local":
        import jax

        return jax.devices()
    m = TOPOLOGY.fullmatch(topology)
    if not m:
        raise UserError(
            f"--plan={topology} is no topology: write it as v5e:16x16, v5p:4x4x4, 2xv6e:8x8 (two "
            "slices), or local for the devices at hand"
        )
    # The compiler is a library of real TPUs, which would look for them, and for others that use it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--plan needs XLA\'s TPU compiler: pip install -e ".[tpu-plan]"')
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    slices = {"num_slices": int(m[1])} if m[1] else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=m[2], **slices)
    except (JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"XLA knows no TPUs {topology}: {reason}") from None
    return list(found.devices)


def reports_of(config: ConfigDict, devices: list[Any]) -> list[Any]:
    """What each compiled part of the run needs and takes."""
    from afmrl_jax.core.mesh import make_mesh
    from afmrl_jax.training.planning import compile_part, reckon

    mesh = make_mesh(dict(config.mesh), devices)
    program = importlib.import_module(f"afmrl_jax.programs.{config.program}")
    check_ranges(flatten(config), program.RANGES)
    reports = []
    for part in program.plan(config, mesh):
        compiled, report = compile_part(part, mesh)
        reports.append(reckon(part, compiled, report, mesh) if compiled else report)
    return reports


def _asked(config: ConfigDict, devices: list[Any]) -> Choice:
    """What the configuration itself chooses, -1 worked out."""
    from afmrl_jax.core.mesh import make_mesh

    sizes = make_mesh(dict(config.mesh), devices).shape
    return Choice(tuple(sizes.items()), config.model.remat, config.chunks)


def _batch(config: ConfigDict) -> int:
    return config.queries if config.program == "rar" else config.batch


def _changed(config: ConfigDict, choice: Choice) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.mesh.update(dict(choice.mesh))
    changed.model.remat, changed.chunks = choice.remat, choice.chunks
    return changed


def search(
    measure: Callable[[Choice], Tried], asked: Tried, batch: int, devices: int
) -> list[Tried]:
    """The asked choice and what was tried beside it, in order; at most TRIES compilations.

    First a choice that fits: what keeps least, then smaller and smaller chunks. From it other
    meshes, the parameters over fewer devices or more; on the best of them larger chunks and what
    computes less again, as long as that fits.
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
    while best.choice.chunks > 1:
        larger = look(dataclasses.replace(best.choice, chunks=best.choice.chunks // 2))
        if _better(best, larger) is best:
            break
        best = larger
    for remat in reversed(REMATS[: REMATS.index(best.choice.remat)]):
        for chunks in (best.choice.chunks, 2 * best.choice.chunks, 4 * best.choice.chunks):
            found = look(dataclasses.replace(best.choice, remat=remat, chunks=chunks))
            if found.fits:
                best = _better(best, found)
                break
    return list(tried.values())


def _possible(choice: Choice, batch: int) -> bool:
    shards = 1
    for axis, size in choice.mesh:
        shards *= size if axis != "tensor" else 1
    return batch % choice.chunks == 0 and batch // choice.chunks % shards == 0


def _tighter(choice: Choice) -> Choice:
    if choice.remat != "full":
        return dataclasses.replace(choice, remat="full")
    return dataclasses.replace(choice, chunks=2 * choice.chunks)


def _better(one: Tried, other: Tried) -> Tried:
    """The quicker of two; of unknown chips the one that computes more at once."""
    if not other.fits:
        return one
    if one.seconds is None or other.seconds is None:
        return other if other.choice.chunks <= one.choice.chunks else one
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
    lines = [("tried", "seconds a step", "GiB a device", "fits"), ("---",) * 4]
    for one in tried:
        took = "" if one.seconds is None else f"{one.seconds:.3g}"
        fits = "yes" if one.fits else "no"
        lines.append((one.choice.told, took, f"{one.needed / 2**30:.3g}", fits))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _advice(tried: list[Tried]) -> str:
    """The quickest of what fits, as flags."""
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return "Nothing that was tried fits: take more devices, a smaller model or LoRA."
    best = fitting[0]
    for one in fitting[1:]:
        best = _better(best, one)
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in best.choice.mesh)
    flags = f"{mesh} --config.model.remat={best.choice.remat} --config.chunks={best.choice.chunks}"
    return f"Quickest of what fits: {flags}"
