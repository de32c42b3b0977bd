"""Eight devices embed as one does, parameters loaded straight into their shards."""

import jax
import jax.numpy as jnp
import numpy as np
from devices import devices
from flax import nnx

from afmrl_jax.core.mesh import batch_sharding, make_mesh
from afmrl_jax.models import attention
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset
from afmrl_jax.weights import hf_weights


def test_eight_devices_give_the_loss_and_gradients_of_one(random_rows, tmp_path, monkeypatch):
    config = preset("tiny_qwen3").replace(vocab_size=64)
    graph, state = nnx.split(Embedder(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    rows = random_rows(config, n=8, s=24, p=16)

    def loss(state, rows):
        vectors = nnx.merge(graph, state)(rows)
        return jnp.mean(jnp.logaddexp(0, 10 * vectors @ vectors.T))

    wanted = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(state, rows))
    hf_weights.save(tmp_path, state, config)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with devices(8):
        mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 2, "tensor": 2})
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            param_shardings(state, mesh),
        )
        sharded = hf_weights.load(tmp_path, abstract, config)
        kernel = jax.tree.leaves(sharded["backbone"]["layers"][0]["gate"]["kernel"])[0]
        layers, rows_in, columns = kernel.shape
        assert kernel.addressable_shards[0].data.shape == (layers, rows_in // 2, columns // 2)
        monkeypatch.setattr(attention, "SCORES", 1)  # a device takes its two rows one by one
        with jax.set_mesh(mesh):
            rows = jax.device_put(rows, batch_sharding(mesh))
            found = jax.jit(jax.value_and_grad(loss))(sharded, rows)
        found = jax.tree.map(np.asarray, found)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for theirs, ours in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1])):
        np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max() + 1e-8)
