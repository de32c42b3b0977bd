"""Compiles a step and reports its memory, FLOPs, time and exchanges.

The mesh is of the devices at hand, or of TPUs that need not be there: XLA's TPU compiler runs
without one.
"""

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from afmrl_jax.core.chips import GIB, chip_of
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.tables import markdown_table
from afmrl_jax.planning.exchange import axes_of, exchange_seconds
from afmrl_jax.planning.hlo import Collective, Reader, Total

# The TPU compiler's message about a program that cannot fit.
OUT_OF_MEMORY = re.compile(r"required[^(]*\(([\d.]+)([MG])\)[^(]*\(([\d.]+)([MG])\)")


@dataclass(frozen=True)
class Part:
    """A compiled function of a run, as its program describes it.

    arguments: abstract arrays with shardings, or numbers. named_arguments: parts of the arguments,
    for the memory table, as {"parameters": tree}. intermediates: bytes a device of arrays that the
    function makes, by name. default_trip_count: assumed for `while` loops whose data ends them (the
    decode loop).
    """

    name: str
    function: Callable[..., Any]  # jitted
    arguments: tuple[Any, ...]
    named_arguments: dict[str, Any]
    intermediates: dict[str, float]
    useful: float  # FLOPs of all devices
    default_trip_count: int = 1


@dataclass(frozen=True)
class Report:
    """The costs of one part on one mesh, in bytes, FLOPs and seconds of one device.

    memory: bytes by name; `activations` are the memory that XLA reserves beyond the named arrays.
    Where a part does not fit, the TPU compiler tells only the sum. limit: bytes of the device's
    memory, None if unknown. The fields from flops on are None where the part could not be compiled,
    those of time also on unknown chips.
    """

    name: str
    memory: dict[str, float]
    needed: float
    limit: float | None
    flops: float | None = None  # executed, remat's recomputation included
    useful: float | None = None  # FLOPs
    bytes: float | None = None  # to and from the device's large memory
    seconds: float | None = None  # the compiler's cycles, and exchanges that nothing overlaps
    # Least seconds of products, memory and exchanges, each alone.
    floors: dict[str, float] = field(default_factory=dict)
    utilisation: float | None = None  # useful FLOPs a second over the chip's peak
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    unread_loops: int = 0

    @property
    def fits(self) -> bool:
        return self.limit is None or self.needed <= self.limit


def local_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of abstract arrays."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def memory_limit(device: jax.Device) -> float | None:
    """Bytes of a device's memory: its runtime's number, else its data sheet's; of a CPU device its
    share of the machine's memory."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages / len(jax.local_devices())
    chip = chip_of(device)
    try:
        stats = device.memory_stats() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # a topology without devices
        stats = {}
    return stats.get("bytes_limit", chip.memory if chip else None)


def compile_part(part: Part, mesh: Mesh) -> tuple[jax.stages.Compiled | None, Report]:
    """A part compiled for a mesh, and the memory that it needs; None for the first where the
    compiler finds that it cannot fit."""
    device = mesh.devices.flat[0]
    arguments = {name: local_bytes(tree) for name, tree in part.named_arguments.items()}
    try:
        with jax.set_mesh(mesh):
            compiled = part.function.lower(*part.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (m := OUT_OF_MEMORY.search(str(error))):
            raise
        needed, limit = (float(m[i]) * (GIB if m[i + 1] == "G" else 2**20) for i in (1, 3))
        return None, Report(part.name, arguments, needed + sum(arguments.values()), limit)
    stats = compiled.memory_analysis()
    needed = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    named = arguments | part.intermediates
    memory = named | {"activations": max(0.0, needed - sum(named.values()))}
    return compiled, Report(part.name, memory, needed, memory_limit(device))


def reckon(part: Part, compiled: jax.stages.Compiled, report: Report, mesh: Mesh) -> Report:
    """The report with the program's work added, and on TPUs its time."""
    devices, chip = list(mesh.devices.flat), chip_of(mesh.devices.flat[0])
    if chip and not chip.clock:  # a GPU's products are library calls, whose work the text lacks
        return report
    sizes = dict(mesh.shape)

    def seconds(cycles: float | None, flops: float, bytes_: float) -> float:
        if chip is None:
            return 0.0
        if cycles is not None:
            return cycles / chip.clock
        return max(flops / chip.flops, bytes_ / chip.bandwidth)

    def exchange(collective: Collective) -> float:
        return exchange_seconds(chip, collective, devices) if chip else 0.0

    total = Reader(compiled.as_text(), seconds, exchange, part.default_trip_count).total()
    useful = part.useful / mesh.size
    exchanges = _exchanges(total, sizes, exchange)
    report = dataclasses.replace(
        report,
        flops=total.flops,
        useful=useful,
        bytes=total.bytes,
        exchanges=exchanges,
        unread_loops=total.unread_loops,
    )
    if chip is None:
        return report
    floors = {
        "products": total.flops / chip.flops,
        "memory": total.bytes / chip.bandwidth,
        "exchanges": sum(row["seconds"] for row in exchanges),
    }
    utilisation = useful / total.seconds / chip.flops
    return dataclasses.replace(
        report, seconds=total.seconds, floors=floors, utilisation=utilisation
    )


def _exchanges(
    total: Total, sizes: dict[str, int], exchange: Callable[[Collective], float]
) -> list[dict[str, Any]]:
    """Exchanges by kind, mesh axes and whether computation overlaps them, the largest first."""
    sums: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for collective, calls in total.collectives.items():
        axes = axes_of(collective.group or range(math.prod(sizes.values())), sizes)
        costs = np.array([1.0, collective.size, exchange(collective)])
        sums[collective.kind, axes, collective.overlapped] += calls * costs
    names = ("kind", "axes", "overlapped", "calls", "bytes", "seconds")
    rows = [dict(zip(names, (*key, *row.tolist()))) for key, row in sums.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def check_fits(part: Part, mesh: Mesh) -> jax.stages.Compiled:
    """The part, compiled for the devices at hand.

    Raises UserError with the table of its memory where that exceeds the devices'.
    """
    compiled, report = compile_part(part, mesh)
    if compiled is None or not report.fits:
        raise UserError(
            f"the {part.name} does not fit the memory of {mesh.devices.flat[0].device_kind}:\n"
            f"{memory_table([report])}\nRaise micro_batches, set model.remat=full, or spread "
            "parameters over more devices with mesh.fsdp; --plan=local tries what fits"
        )
    return compiled


def memory_table(reports: list[Report]) -> str:
    """GiB a device by name, as Markdown."""
    names = list(dict.fromkeys(name for report in reports for name in report.memory))
    rows = []
    for report in reports:
        # Of a part that could not be compiled only arguments and the sum are known.
        cells = [_gib(report.memory.get(name)) for name in names]
        limit = "unknown" if report.limit is None else _gib(report.limit)
        fits = "yes" if report.fits else "no"
        rows.append([f"{report.name}, GiB a device", *cells, _gib(report.needed), limit, fits])
    return markdown_table(["", *names, "together", "there is", "fits"], rows)


def time_table(reports: list[Report]) -> str:
    """Work and seconds of one call, as Markdown; "" where no chip is known."""
    known = [report for report in reports if report.seconds is not None]
    if not known:
        return ""
    head = ["", "seconds", "products", "memory", "exchanges", "TFLOP", "of them useful"]
    rows = []
    for report in known:
        floors = [f"{report.floors[name]:.3g}" for name in ("products", "memory", "exchanges")]
        work = [f"{report.flops / 1e12:.3g}", f"{report.useful / report.flops:.0%}"]
        share = f"{report.utilisation:.0%}"
        rows.append([f"{report.name}", f"{report.seconds:.3g}", *floors, *work, share])
    return markdown_table([*head, "utilisation"], rows)


def exchange_table(report: Report) -> str:
    """A part's exchanges by kind and axes, as Markdown."""
    rows = []
    for row in report.exchanges:
        size, seconds = f"{row['bytes'] / GIB:.3g}", f"{row['seconds']:.2g}"
        overlapped = "yes" if row["overlapped"] else "no"
        rows.append([row["kind"], row["axes"], f"{row['calls']:.0f}", size, seconds, overlapped])
    head = ["exchange", "along", "calls", "GiB a device", "seconds", "overlapped"]
    return markdown_table(head, rows)


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.3g}"
