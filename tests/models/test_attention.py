"""Attention by the TPU's kernel, interpreted, against XLA's; and that a TPU's program has it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.models.attention import attend, flash
from afmrl_jax.programs.plan import devices_of


def drawn(length, segments):
    """Queries of four heads, keys and values of two; float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, length, 4, 16), (2, length, 2, 16), (2, length, 2, 16))
    parts = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    return *parts, jnp.array(segments, jnp.int32)


@pytest.mark.parametrize(
    "causal, segments",
    [
        (False, [[1] * 10 + [2] * 9 + [0] * 5, [3] * 24]),  # two images and padding, and one
        (True, [[0] * 7 + [1] * 17, [1] * 20 + [0] * 4]),  # texts padded on either side
    ],
)
def test_the_kernel_computes_what_xla_does_with_its_gradients(causal, segments):
    *parts, segments = drawn(24, segments)
    mask = segments[:, :, None] == segments[:, None, :]
    weights = jax.random.normal(jax.random.key(1), parts[0].shape)

    def loss(function, *parts):
        mixed = function(*parts)
        return jnp.sum(mixed * weights), mixed

    def both(function):
        value = jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True)
        (_, mixed), gradients = value(function, *parts)
        return mixed, *gradients

    wanted = both(lambda *parts: attend(*parts, mask, causal))
    with pltpu.force_tpu_interpret_mode():
        found = both(lambda *parts: flash(*parts, segments, causal=causal))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="XLA's TPU compiler is not installed"
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_program_for_tpus_holds_the_kernel_and_no_square_of_scores(tensor):
    pod = devices_of("v5e:2x2")
    mesh = make_mesh({"slice": 1, "data": 1, "fsdp": -1, "tensor": tensor}, pod)

    def mixed(*parts):
        mask = parts[3][:, :, None] == parts[3][:, None, :]
        return attend(*parts[:3], mask, False, parts[3])

    length, rows = 384, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    shapes = ((8, length, 4, 64), (8, length, 2, 64), (8, length, 2, 64))
    parts = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows) for shape in shapes]
    parts.append(jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=rows))
    with jax.set_mesh(mesh):
        text = jax.jit(mixed).lower(*parts).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    assert f"{length},{length}]" not in text.replace(f"s32[{length},{length}]", "")
