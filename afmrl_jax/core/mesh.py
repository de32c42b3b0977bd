"""The device mesh, and how a global batch lies on it.

Axes: slice (pods joined over the data-centre network) · data (replicas) · fsdp (replicas that share
parameters) · tensor (a matrix split by columns or rows). Batches are sharded over the first three.
"""

import itertools
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from afmrl_jax.core.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")


def initialize_distributed() -> None:
    """Joins the other processes where COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID are set.

    Raises UserError where only some of the three are set. Must run before JAX touches a device.
    """
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{', '.join(found)} set without {', '.join(missing)}: set all three, or none to run "
            "as one process"
        )
    try:
        count, index = int(found["NUM_PROCESSES"]), int(found["PROCESS_ID"])
    except ValueError:
        raise UserError(
            f"NUM_PROCESSES={found['NUM_PROCESSES']} and PROCESS_ID={found['PROCESS_ID']} must be "
            "whole numbers"
        ) from None
    if not 0 <= index < count:
        raise UserError(f"PROCESS_ID={index} is not one of {count} processes: 0 to {count - 1}")
    jax.distributed.initialize(found["COORDINATOR_ADDRESS"], count, index)


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """The mesh of all devices; `sizes` maps each of AXES to its length, -1 for what is left.

    Raises UserError where the lengths do not multiply to the number of devices.
    """
    devices = jax.device_count()
    lengths = [sizes[axis] for axis in AXES]
    told = " x ".join(f"{axis} {length}" for axis, length in zip(AXES, lengths))
    if lengths.count(-1) > 1 or any(length < 1 and length != -1 for length in lengths):
        raise UserError(f"mesh {told}: each axis is a positive number, and at most one is -1")
    if -1 in lengths:
        known = -int(np.prod(lengths))
        if devices % known:
            raise UserError(f"mesh {told} does not divide {devices} devices: change mesh.*")
        lengths[lengths.index(-1)] = devices // known
    if int(np.prod(lengths)) != devices:
        raise UserError(
            f"mesh {told} needs {int(np.prod(lengths))} devices, but there are {devices}: "
            "change mesh.* or set one axis to -1"
        )
    return jax.make_mesh(tuple(lengths), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension `axis` counts the examples of the global batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, rows: int, field: str) -> slice:
    """Which of a global batch's `rows` this process must deliver (the whole batch on one process).

    Raises UserError, naming the configuration's `field`, where the mesh cannot split the rows
    evenly, or lays a process's rows apart.
    """
    if rows % batch_shards(mesh):
        raise UserError(
            f"{field} makes {rows} rows, which do not divide over {batch_shards(mesh)} shards of "
            "the mesh (slice x data x fsdp): make it a multiple, or change mesh.*"
        )
    index = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    spans = sorted({s[0].indices(rows)[:2] for s in index.values()})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise UserError(
            f"the mesh lays the rows of process {jax.process_index()} apart, {spans}: choose mesh "
            "axes whose tensor part stays within a process"
        )
    return slice(spans[0][0], spans[-1][1])


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, *, axis: int, rows: int
) -> dict[str, jax.Array]:
    """Global arrays from this process's part; dimension `axis` counts `rows` in the whole batch."""
    sharding = batch_sharding(mesh, axis)

    def put(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: put(array) for name, array in batch.items()}
