"""What accelerators can do at best, and how long an exchange between them takes at best.

Peaks are the vendors' data sheets'; links, torus shapes and the network's share of a chip follow
"How to Scale Your Model" (https://jax-ml.github.io/scaling-book, its tables of TPUs and GPUs).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from afmrl_jax.training.hlo import Collective


@dataclass(frozen=True)
class Chip:
    """flops: dense bf16, a second. bandwidth: bytes a second between chip and its memory. memory:
    bytes that a program may use. link: bytes a second, one way, of one link to a neighbour.
    network: bytes a second, one way, between pods (TPU) or machines (GPU). clock: Hz, 0 where no
    cycles are estimated. wraps: a dimension of the torus of this length, or a multiple of it, is a
    ring; 0: no torus.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    clock: float = 0.0
    wraps: int = 0


GIB = 2**30
# By the start of jax's device_kind.
CHIPS = {
    "NVIDIA H200": Chip(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "NVIDIA H100": Chip(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "NVIDIA A100": Chip(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "TPU v4": Chip(275e12, 1.2e12, 30.75 * GIB, 45e9, 6.25e9, 1.05e9, 4),
    "TPU v5 lite": Chip(197e12, 819e9, 15.75 * GIB, 45e9, 3.125e9, 1.5e9, 16),
    "TPU v5e": Chip(197e12, 819e9, 15.75 * GIB, 45e9, 3.125e9, 1.5e9, 16),
    "TPU v5": Chip(459e12, 2.765e12, 95.74 * GIB, 90e9, 6.25e9, 1.75e9, 4),
    "TPU v6": Chip(918e12, 1.64e12, 31.25 * GIB, 90e9, 12.5e9, 1.75e9, 16),
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device; None where it is not known (a CPU's peaks are not)."""
    kinds = sorted(CHIPS, key=len, reverse=True)
    return next((CHIPS[k] for k in kinds if device.device_kind.startswith(k)), None)


def exchange_seconds(chip: Chip, collective: Collective, devices: Sequence[jax.Device]) -> float:
    """How long one call of a collective takes at best, if nothing else uses its links.

    devices: of the mesh, flat. A group along one dimension of a torus sends both ways round, along
    several on all of their links; a dimension that is no ring has half of that. Latency does not
    count.
    """
    group = [devices[i] for i in collective.group] or list(devices)
    if len({_machine(device, chip) for device in group}) > 1:
        return collective.size / chip.network
    if not chip.wraps:
        return collective.size / chip.link
    if collective.kind == "collective-permute":
        return collective.size / chip.link
    whole = [max(d.coords[axis] for d in devices) + 1 for axis in range(3)]
    crossed = [axis for axis in range(3) if len({d.coords[axis] for d in group}) > 1]
    ways = sum(2 if whole[axis] % chip.wraps == 0 else 1 for axis in crossed)
    return collective.size / (chip.link * max(ways, 1))


def _machine(device: jax.Device, chip: Chip) -> int:
    """What a device's fast links end at: its pod, or its machine."""
    return (getattr(device, "slice_index", 0) or 0) if chip.wraps else device.process_index


def axes_of(group: Sequence[int], sizes: dict[str, int]) -> str:
    """The mesh axes along which a group of devices lies, as "data x fsdp"; "" of one device.

    group: places in the flat mesh; sizes: of the mesh's axes, in order.
    """
    places = np.unravel_index(group, tuple(sizes.values()))
    return " x ".join(name for name, along in zip(sizes, places) if len(set(along)) > 1)
