"""The device mesh, and how a global batch lies on it.

Axes: slice (pods joined over the data-centre network) · data (replicas) · fsdp (replicas that share
parameters) · tensor (a matrix split by columns or rows). Batches are sharded over the first three.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from afmrl_jax.core.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")


def make_mesh(sizes: dict[str, int], among: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices.

    sizes: the length of each of AXES; -1 for the number of devices that the others leave. among:
    devices of a topology to plan for, instead of this machine's.
    Raises UserError where the lengths do not multiply to the number of devices, or `slice` is not
    the number of slices of Cloud TPUs.
    """
    devices = list(among or jax.devices())
    count = len(devices)
    lengths = [sizes[axis] for axis in AXES]
    shape = " x ".join(f"{axis} {length}" for axis, length in zip(AXES, lengths))
    if lengths.count(-1) > 1 or any(length < 1 and length != -1 for length in lengths):
        raise UserError(f"mesh {shape}: each axis is a positive number, and at most one is -1")
    if -1 in lengths:
        known = -int(np.prod(lengths))
        if count % known:
            raise UserError(f"mesh {shape} does not divide {count} devices: change mesh.*")
        lengths[lengths.index(-1)] = count // known
    if int(np.prod(lengths)) != count:
        raise UserError(
            f"mesh {shape} needs {int(np.prod(lengths))} devices, but there are {count}: "
            "change mesh.* or set one axis to -1"
        )
    auto = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":  # a GPU has a slice_index too, its machine's
        return jax.make_mesh(tuple(lengths), AXES, axis_types=auto, devices=among)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if lengths[0] != slices:
        raise UserError(
            f"there are {slices} slices, and mesh.slice is {lengths[0]}: set it to {slices}, so "
            "that only gradients cross the network between them"
        )
    # An axis may take a part of the torus's sides: of 8 x 8 chips, 16.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        placed = mesh_utils.create_device_mesh(lengths, devices, **split)
    else:
        within, between = (1, *lengths[1:]), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, between, devices, **split)
    return Mesh(placed, AXES, axis_types=auto)


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension `axis` counts the examples of the global batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, rows: int, field: str) -> np.ndarray:
    """The rows, of the `rows` of a global batch, that this process must deliver, in this order.

    Returns int64[n], ascending; all rows where the process is alone. On a torus a process's chips
    need not be neighbours along an axis of the mesh, so its rows need not be either. Raises
    UserError, naming the configuration's `field`, where the mesh cannot split the rows evenly.
    """
    if rows % batch_shards(mesh):
        raise UserError(
            f"{field} makes {rows} rows, which do not divide over {batch_shards(mesh)} shards of "
            "the mesh (slice x data x fsdp): make it a multiple, or change mesh.*"
        )
    index = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    spans = sorted({s[0].indices(rows)[:2] for s in index.values()})
    return np.concatenate([np.arange(*span) for span in spans])


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, *, axis: int, rows: int
) -> dict[str, jax.Array]:
    """Global arrays from this process's rows, those of `local_rows`.

    axis: the dimension that counts rows; rows: its length in the global batch.
    """
    sharding = batch_sharding(mesh, axis)

    def put(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: put(array) for name, array in batch.items()}
