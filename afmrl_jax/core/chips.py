"""The chips that programs run on: their peak rates and memory."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """A chip's peak rates and memory.

    flops: dense bf16 operations a second. bandwidth: bytes a second between the chip and its
    memory. memory: bytes that a program may use. link: bytes a second, one way, of one link to a
    neighbour. network: bytes a second, one way, between pods (TPU) or machines (GPU). clock: Hz; 0
    where no cycles are estimated. wraps: a dimension of the torus is a ring where its length is a
    multiple of this; 0 where there is no torus.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    clock: float = 0.0
    wraps: int = 0


GIB = 2**30


# Chips by the first characters of JAX's device_kind.
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
    """The chip of a device; None for an unknown one, such as any CPU."""
    prefixes = sorted(CHIPS, key=len, reverse=True)
    return next((CHIPS[p] for p in prefixes if device.device_kind.startswith(p)), None)
