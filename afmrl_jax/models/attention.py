"""The one attention of the tower and the decoder: grouped heads, any mask, softmax in float32.

Axes: N rows · S tokens or patches · H query heads · K key/value heads (H is n·K) · D head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as tpu
from jax.sharding import PartitionSpec

from afmrl_jax.core.mesh import BATCH_AXES

LANES = 128  # the TPU kernel's blocks are multiples of it
LONGEST = 1024  # tokens of a row that one of its blocks holds


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    causal: bool,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention.

    query: [N, S, H, D]; key, value: [N, S, K, D]; mask: bool[N, S, S] or bool[N, 1, S], True where
    a query (rows) may see a key (columns). segments: int32[N, S], where the mask can be told so:
    tokens of one number see each other; then padding, which nobody reads, may see other padding.
    Returns [N, S, H, D]. A query that sees nothing (padding) gets an average of values: finite.

    On a TPU segments, in bfloat16, take JAX's flash attention, which never writes [S, S] to memory;
    on a GPU half precision takes cuDNN's; else XLA's own.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if half and segments is not None and _platform() == "tpu" and (split := _split(query, key)):
        return _flash(query, key, value, segments, causal, split)
    # cuDNN's flash attention: half precision, and with a mask an even length.
    fused = (
        jax.default_backend() == "gpu"
        and half
        and query.shape[1] % 2 == 0
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 128
    )
    if mask.shape[1] == 1:
        mask = jnp.broadcast_to(mask, (mask.shape[0], query.shape[1], mask.shape[2]))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        is_causal=causal,
        implementation="cudnn" if fused else "xla",
    )


def _platform() -> str:
    """What the program is compiled for: the mesh's devices, which may be a planned topology's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _split(query: jax.Array, key: jax.Array) -> tuple[PartitionSpec, ...] | None:
    """How rows and heads lie on the mesh, of [N, S, H, D] and of [N, S]; None if it cannot split
    them evenly."""
    sizes = jax.sharding.get_abstract_mesh().shape
    if not all(axis in sizes for axis in BATCH_AXES):
        return PartitionSpec(), PartitionSpec()
    rows, heads = math.prod(sizes[axis] for axis in BATCH_AXES), sizes["tensor"]
    if query.shape[0] % rows or key.shape[2] % heads:
        return None
    return PartitionSpec(BATCH_AXES, None, "tensor"), PartitionSpec(BATCH_AXES)


def _flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    causal: bool,
    split: tuple[PartitionSpec, ...],
) -> jax.Array:
    """The TPU kernel, on each device's own rows and heads: XLA cannot split it by itself."""
    kernel = functools.partial(flash, causal=causal)
    if split[0]:
        whole, rows = split
        kernel = jax.shard_map(
            kernel, in_specs=(whole, whole, whole, rows), out_specs=whole, check_vma=False
        )
    return kernel(query, key, value, segments)


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, causal: bool
) -> jax.Array:
    """`attend` by JAX's flash attention for TPUs, which wants rows of a multiple of its block."""
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    block = -(-length // LANES) * LANES
    block = block if block <= LONGEST else LONGEST // 2
    room = -length % block

    def padded(x: jax.Array) -> jax.Array:
        """[N, S, H, D] -> [N, H, whole blocks, D]."""
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    segments = jnp.pad(segments, ((0, 0), (0, room)), constant_values=-1)
    names = tpu.BlockSizes.__dataclass_fields__
    sizes = tpu.BlockSizes(**{name: 1 if name == "block_b" else block for name in names})
    mixed = tpu.flash_attention(
        padded(query),
        padded(key),
        padded(value),
        segment_ids=tpu.SegmentIds(segments, segments),
        causal=causal,
        sm_scale=query.shape[3] ** -0.5,
        block_sizes=sizes,
    )
    return jnp.swapaxes(mixed[:, :, :length], 1, 2)
