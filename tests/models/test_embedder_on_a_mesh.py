"""Eight devices embed as one does, parameters loaded straight into their shards."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
sys.path.insert(0, sys.argv[2])
from conftest import make_rows
from afmrl_jax.core.mesh import batch_sharding, make_mesh
from afmrl_jax.models import attention
from afmrl_jax.weights import hf_weights
from afmrl_jax.models.presets import preset
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.partition import param_shardings

config = preset("tiny_qwen3").replace(vocab_size=64)
graph, state = nnx.split(Embedder(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
rows = make_rows(config, n=8, s=24, p=16)

def loss(state, rows):
    vectors = nnx.merge(graph, state)(rows)
    return jnp.mean(jnp.logaddexp(0, 10 * vectors @ vectors.T))

value, gradient = jax.jit(jax.value_and_grad(loss))(state, rows)
hf_weights.save(Path(sys.argv[1]), state, config)
mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 2, "tensor": 2})
abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    state, param_shardings(state, mesh),
)
sharded = hf_weights.load(Path(sys.argv[1]), abstract, config)
kernel = jax.tree.leaves(sharded["backbone"]["layers"][0]["gate"]["kernel"])[0]
layers, rows_in, columns = kernel.shape
assert kernel.addressable_shards[0].data.shape == (layers, rows_in // 2, columns // 2)
attention.SCORES = 1  # each device goes through its two rows one by one
with jax.set_mesh(mesh):
    other, others = jax.jit(jax.value_and_grad(loss))(
        sharded, jax.device_put(rows, batch_sharding(mesh))
    )
np.testing.assert_allclose(other, value, rtol=1e-6)
for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(others)):
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max() + 1e-8)
"""


def test_eight_devices_give_the_loss_and_gradients_of_one(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
