"""What an embedding must and must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import TextConfig, VisionConfig
from afmrl_jax.models.embedder import Embedder, normalize
from afmrl_jax.models.presets import preset

CONFIG = preset("tiny").replace(
    vision=VisionConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        mlp_size=64,
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
    ),
    text=TextConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=48,
        mrope_sections=(2, 1, 1),
    ),
    vocab_size=100,
    initializer_range=0.2,  # so that a leak would show
)
GRAPH, STATE = nnx.split(Embedder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))


@jax.jit
def embed(rows):
    return nnx.merge(GRAPH, STATE)(rows)


@pytest.fixture
def rows(random_rows):
    return random_rows(CONFIG, n=4, s=20, p=16)


def test_embeddings_are_float32_of_length_one(rows):
    vectors = embed(rows)
    assert vectors.dtype == jnp.float32 and vectors.shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_padding_on_either_side_and_its_content_change_nothing(rows):
    right = embed(rows)
    noisy = {**rows, "tokens": np.where(rows["token_mask"], rows["tokens"], 7)}
    np.testing.assert_array_equal(embed(noisy), right)
    left = dict(rows)
    for name in ("tokens", "token_mask", "positions"):
        left[name] = np.stack(
            [
                np.roll(row, 20 - mask.sum(), axis=-1)
                for row, mask in zip(rows[name], rows["token_mask"])
            ]
        )
    np.testing.assert_allclose(embed(left), right, atol=1e-6)


def test_padding_patches_change_nothing(rows):
    half = {**rows, "patch_segments": rows["patch_segments"].copy()}
    half["patch_segments"][:, 8:] = 0
    half["tokens"] = np.where(
        np.arange(20) == 3, 9, rows["tokens"]
    )  # three image tokens become two
    half["tokens"] = np.where(np.arange(20) == 4, 9, half["tokens"])
    noisy = {**half, "patches": rows["patches"].copy()}
    noisy["patches"][:, 8:] += 5
    np.testing.assert_allclose(embed(noisy), embed(half), atol=1e-6)


def test_images_of_a_row_do_not_see_each_other(rows):
    """The tower's features of the first image are the same beside any second one."""
    rows["patch_segments"][:, 8:] = 2
    changed = {**rows, "patches": rows["patches"].copy()}
    changed["patches"][:, 8:] += 1
    tower = nnx.merge(GRAPH, STATE).backbone.vision
    one, other = (tower(part)[0] for part in (rows, changed))
    np.testing.assert_array_equal(one[:, :2], other[:, :2])
    assert np.abs(one[:, 2:] - other[:, 2:]).max() > 1e-3


def test_image_and_later_text_move_the_embedding_but_other_rows_do_not(rows):
    before = embed(rows)
    changed = {**rows, "patches": rows["patches"].copy(), "tokens": rows["tokens"].copy()}
    changed["patches"][0] += 1
    changed["tokens"][1, 6] = 50
    after = embed(changed)
    assert np.abs(after - before).max(axis=1)[:2].min() > 1e-3
    np.testing.assert_array_equal(after[2:], before[2:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_without_image_and_empty_rows_have_finite_vectors_and_gradients(random_rows, dtype):
    rows = random_rows(CONFIG, n=4, s=20, p=16, images=False)
    rows["token_mask"][3] = False
    graph = nnx.split(nnx.eval_shape(lambda: Embedder(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)))[0]

    def loss(state):
        vectors = nnx.merge(graph, state)(rows)
        return jnp.sum(vectors**3), vectors

    (_, vectors), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(STATE)
    assert np.isfinite(vectors).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    tower = jax.tree.leaves(gradient["backbone"]["vision"])
    assert all(np.abs(leaf).max() == 0 for leaf in tower)


def test_rows_without_room_for_patches_embed_as_rows_without_images(random_rows):
    rows = random_rows(CONFIG, n=4, s=20, p=16, images=False)
    bare = {name: part[:, :0] if "patch" in name else part for name, part in rows.items()}
    np.testing.assert_allclose(embed(bare), embed(rows), atol=1e-6)


def test_a_truncated_embedding_is_the_start_of_the_whole_one_at_length_one(rows):
    graph = nnx.split(
        nnx.eval_shape(
            lambda: Embedder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, embedding_dim=8)
        )
    )[0]
    start = embed(rows)[:, :8]
    short = jax.jit(lambda rows: nnx.merge(graph, STATE)(rows))(rows)
    np.testing.assert_allclose(
        short, start / np.linalg.norm(start, axis=1, keepdims=True), atol=1e-6
    )


def test_a_dimension_or_remat_that_does_not_exist_is_told():
    with pytest.raises(UserError, match="embedding_dim 33 does not fit"):
        Embedder(CONFIG, rngs=nnx.Rngs(0), embedding_dim=33)
    with pytest.raises(UserError, match="remat 'dot' does not exist"):
        Embedder(CONFIG, rngs=nnx.Rngs(0), remat="dot")


def test_the_zero_vector_stays_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: normalize(x).sum())(jnp.zeros((1, 4)))
    assert value == 0 and np.isfinite(gradient).all()


def test_layers_of_a_stack_start_from_different_numbers():
    kernels = np.asarray(jax.tree.leaves(STATE["backbone"]["layers"][0]["up"]["kernel"])[0])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
