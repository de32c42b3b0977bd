"""The least time that an exchange between accelerators takes.

Peaks are the vendors' data sheets'; links, torus shapes and the network's share of a chip follow
"How to Scale Your Model" (https://jax-ml.github.io/scaling-book, its tables of TPUs and GPUs).
"""

from collections.abc import Sequence

import jax
import numpy as np

from afmrl_jax.core.chips import Chip
from afmrl_jax.planning.hlo import Collective


def exchange_seconds(chip: Chip, collective: Collective, devices: Sequence[jax.Device]) -> float:
    """Seconds of one call of a collective at best, if nothing else uses its links.

    devices: the mesh's, flat. A group along one dimension of a torus sends both ways round; along
    several dimensions it uses all of their links. A dimension that is no ring sends one way.
    Latency does not count.
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
    """The pod or machine within which a device has fast links."""
    return (getattr(device, "slice_index", 0) or 0) if chip.wraps else device.process_index


def axes_of(group: Sequence[int], sizes: dict[str, int]) -> str:
    """The mesh axes along which a group of devices lies, as "data x fsdp"; "" for one device.

    group: places in the flat mesh; sizes: of the mesh's axes, in order.
    """
    places = np.unravel_index(group, tuple(sizes.values()))
    return " x ".join(name for name, along in zip(sizes, places) if len(set(along)) > 1)
