"""Every parameter has a place on the mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from afmrl_jax.core.mesh import AXES
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL


def mesh(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


def abstract_params(kind: type, name: str):
    return nnx.state(nnx.eval_shape(lambda: kind(preset(name), rngs=nnx.Rngs(0))))


def specs_by_name(shardings) -> dict[str, PartitionSpec]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }


def test_pairs_of_products_are_split_by_columns_then_rows_and_layers_stay_whole():
    params = abstract_params(QwenVL, "qwen2_vl_7b")
    specs = specs_by_name(param_shardings(params, mesh(1, 2, 2, 2)))
    assert specs["layers.0.gate.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["layers.0.down.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["vision.layers.0.attention.qkv.kernel"] == PartitionSpec(
        None, "fsdp", None, "tensor"
    )
    assert specs["layers.0.attention.query.bias"] == PartitionSpec(None, "tensor")
    assert specs["embed.embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["lm_head.kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["layers.0.attention_norm.scale"] == PartitionSpec(None, None)
    assert specs["vision.merger.up.bias"] == PartitionSpec("tensor")


@pytest.mark.parametrize("name", ["tiny", "qwen2_5_vl_3b", "qwen3_vl_2b"])
def test_an_embedder_and_its_optimizer_state_have_shardings_throughout(name):
    params = abstract_params(Embedder, name)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    specs = specs_by_name(param_shardings((params, state), mesh(1, 1, 4, 2)))
    assert specs["0.backbone.layers.0.up.kernel"] == specs["1.0.mu.backbone.layers.0.up.kernel"]
    assert specs["1.0.count"] == PartitionSpec()


def test_an_axis_that_does_not_divide_is_left_out():
    params = abstract_params(Embedder, "tiny")
    specs = specs_by_name(param_shardings(params, mesh(1, 1, 5, 2)))
    assert specs["backbone.layers.0.up.kernel"] == PartitionSpec(None, None, "tensor")


def test_arrays_without_a_rule_are_all_told():
    tree = {"up": {"kernel": jnp.zeros((2, 2))}, "gain": jnp.zeros(3), "shift": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match=r"gain \(3,\), shift \(3, 3\)"):
        param_shardings(tree, mesh(1, 1, 1, 1))
