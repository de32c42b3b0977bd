"""Adapters on a tiny embedder: what they change, what they leave, and that they can be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.mesh import AXES
from afmrl_jax.models import lora
from afmrl_jax.models.embedder import Embedder
from afmrl_jax.models.partition import param_shardings
from afmrl_jax.models.presets import preset

CONFIG = preset("tiny").replace(vocab_size=64)
DECODER = r"^layers\."
EVERYWHERE = ""
LORA = lora.LoRA(rank=4, alpha=8, targets=EVERYWHERE)


def build(options):
    rngs = nnx.Rngs(0)
    model = Embedder(CONFIG, rngs=rngs, dtype=jnp.float32)
    if options:
        lora.adapt(model, options, rngs)
    return model


def embedder(options):
    """A compiled function (params, rows) -> embeddings."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(options)))
    return jax.jit(lambda params, rows: nnx.merge(graph, params)(rows))


def abstract(options):
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(build(options))))


def trained(params, seed=0):
    """As after some training: every B away from zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map_with_path(
        lambda path, x: x + 0.05 * random.normal(size=x.shape) if path[-1].key == "lora_b" else x,
        params,
    )


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removeprefix("backbone.")
        for path, _ in jax.tree.leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(LORA))))()


def test_fresh_adapters_change_nothing_and_merged_ones_as_much_as_apart(params, random_rows):
    rows = random_rows(CONFIG, n=2, s=12, p=16)
    adapted, plain = embedder(LORA), embedder(None)
    base = plain(lora.without_adapters(params), rows)
    np.testing.assert_allclose(adapted(params, rows), base, atol=1e-6)
    params = trained(params)
    merged = lora.merge(params, LORA.scale, jnp.float32)
    assert names(merged) == names(abstract(None))
    ours = adapted(params, rows)
    assert np.abs(ours - base).max() > 0.01  # the adapters do something
    np.testing.assert_allclose(plain(merged, rows), ours, atol=1e-5)


@pytest.mark.parametrize("outputs", [(12,), (3, 8)])
def test_a_merged_kernel_is_the_float32_sum_rounded_once(outputs):
    random = np.random.default_rng(0)
    layer = {
        "kernel": jnp.asarray(random.normal(size=(2, 16, *outputs)), jnp.bfloat16),
        "bias": jnp.ones((2, *outputs), jnp.bfloat16),
        "lora_a": jnp.asarray(random.normal(size=(2, 16, 4)), jnp.float32),
        "lora_b": jnp.asarray(random.normal(size=(2, 4, *outputs)), jnp.float32),
    }
    merged = lora.merge({"layers": {0: layer}}, 2.0, jnp.bfloat16)["layers"][0]
    assert merged.keys() == {"kernel", "bias"}
    kernel, a, b = (np.asarray(layer[k], np.float64) for k in ("kernel", "lora_a", "lora_b"))
    exact = kernel + 2.0 * np.einsum("lir,lr...->li...", a, b)
    wanted = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["kernel"], wanted)


@pytest.mark.parametrize("outputs", [(12,), (3, 8)])
def test_adapters_held_apart_are_the_same_change(outputs):
    random = np.random.default_rng(0)

    def pair(rank):
        a, b = random.normal(size=(2, 16, rank)), random.normal(size=(2, rank, *outputs))
        return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    kernel = jnp.asarray(random.normal(size=(2, 16, *outputs)), jnp.bfloat16)
    (base_a, base_b), (lora_a, lora_b) = pair(3), pair(2)
    layer = {"kernel": kernel, "lora_a": lora_a, "lora_b": lora_b}
    both = {"layer": {**layer, "base_a": base_a, "base_b": base_b}}
    assert lora.has_base_adapters(both) and not lora.has_base_adapters({"layer": layer})
    assert lora.split(both)[0] == {"layer": {"lora_a": lora_a, "lora_b": lora_b}}
    held = lora.as_base_adapters(both, 0.7, jnp.bfloat16)["layer"]
    assert held.keys() == {"kernel", "base_a", "base_b"} and held["base_a"].shape == (2, 16, 5)
    np.testing.assert_array_equal(held["kernel"], kernel)
    exact = np.asarray(kernel, np.float64)
    for a, b, scale in ((base_a, base_b, 1.0), (lora_a, lora_b, 0.7)):
        exact = exact + scale * np.einsum("lir,lr...->li...", *(np.asarray(x) for x in (a, b)))
    for params, scale in ((both["layer"], 0.7), (held, 1.0)):
        merged = lora.merge(params, scale, jnp.float32)
        assert merged.keys() == {"kernel"}
        np.testing.assert_allclose(merged["kernel"], exact, rtol=1e-5, atol=1e-5)


def test_targets_choose_the_decoder_the_tower_or_single_projections():
    chosen = names(lora.split(abstract(lora.LoRA(4, 8, DECODER)))[0])
    projections = ("attention.query", "attention.key", "attention.value", "attention.out")
    projections += ("gate", "up", "down")
    assert chosen == {f"layers.0.{p}.lora_{side}" for p in projections for side in "ab"}
    single = abstract(lora.LoRA(4, 8, r"layers\..*\.(qkv|query)"))
    assert names(lora.split(single)[0]) == {
        f"{place}.lora_{side}"
        for place in ("layers.0.attention.query", "vision.layers.0.attention.qkv")
        for side in "ab"
    }


def test_what_is_taken_apart_is_joined_again_without_a_copy(params):
    adapters, frozen = lora.split(params)
    assert names(adapters) | names(frozen) == names(params)
    assert not names(adapters) & names(frozen)
    joined = lora.join(adapters, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params)))
    assert lora.split(frozen) == (frozen, {})  # without adapters all are trained
    assert lora.join(frozen, {}) == frozen


def test_a_pattern_that_fits_nothing_and_numbers_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"'\^q_proj' fits no kernel; the model has layers\.0\."):
        abstract(lora.LoRA(4, 8, "^q_proj"))
    with pytest.raises(UserError, match=r"'\(' is no pattern"):
        lora.LoRA(4, 8, "(")
    with pytest.raises(UserError, match="both must be above 0"):
        lora.LoRA(4, 0.0, "")


def test_a_fingerprint_sees_one_bit_a_swap_and_a_name():
    base = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    own = lora.fingerprint(base)
    assert own == lora.fingerprint(jax.tree.map(jnp.copy, base))
    others = [
        base | {"a": base["a"].at[1, 2].set(np.nextafter(np.float32(5), np.float32(6)))},
        base | {"a": base["a"][::-1]},
        base | {"a": base["a"].reshape(3, 2)},
        {"a": base["a"], "c": base["b"]},
        base | {"b": base["b"].astype(jnp.float32)},
    ]
    assert len({own, *map(lora.fingerprint, others)}) == 6


def test_adapters_are_cut_along_their_kernels_outer_sides():
    params = abstract(LORA)
    mesh = AbstractMesh((1, 1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    specs = param_shardings(params, mesh)["backbone"]
    layer, tower = specs["layers"][0], specs["vision"]["layers"][0]
    assert layer["gate"]["lora_a"].spec == PartitionSpec(None, "fsdp", None)
    assert layer["gate"]["lora_b"].spec == PartitionSpec(None, None, "tensor")
    assert layer["attention"]["out"]["lora_a"].spec == PartitionSpec(None, "tensor", None)
    assert layer["attention"]["out"]["lora_b"].spec == PartitionSpec(None, None, "fsdp")
    assert tower["attention"]["qkv"]["lora_b"].spec == PartitionSpec(None, None, None, "tensor")
