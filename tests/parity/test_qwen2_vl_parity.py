"""Our Qwen2-VL against transformers' own, in float32, on everything that a batch can hold.

Both read one checkpoint that transformers wrote. Rows are ragged: no, one, two or three images of
other sizes, padded left and right.
"""

import json
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from afmrl_jax.models import hf_weights
from afmrl_jax.models.config import QwenVLConfig, TextConfig, VisionConfig, from_hf
from afmrl_jax.models.embedder import Embedder, normalize, pool_last
from afmrl_jax.models.qwen_vl import QwenVL

IMAGE, START, END, PAD = 4, 2, 3, 0
SMALL = QwenVLConfig(
    vision=VisionConfig(
        hidden_size=48,
        num_layers=2,
        num_heads=3,
        mlp_size=192,
        patch_size=6,
        merge_size=2,
        temporal_patch_size=2,
    ),
    text=TextConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_size=96,
        mrope_sections=(2, 3, 3),
        rope_theta=1e4,
    ),
    vocab_size=300,
    image_token_id=IMAGE,
    vision_start_token_id=START,
    vision_end_token_id=END,
    eos_token_id=1,
    pad_token_id=PAD,
    tie_embeddings=True,
)
# Another shape in every respect, deeper than what is unrolled, and a head of its own.
DEEP = QwenVLConfig(
    vision=VisionConfig(
        hidden_size=32,
        num_layers=5,
        num_heads=2,
        mlp_size=64,
        patch_size=4,
        merge_size=3,
        temporal_patch_size=1,
    ),
    text=TextConfig(
        hidden_size=48,
        num_layers=6,
        num_heads=2,
        num_kv_heads=1,
        head_dim=24,
        mlp_size=80,
        mrope_sections=(5, 3, 4),
        norm_epsilon=1e-5,
    ),
    vocab_size=200,
    image_token_id=IMAGE,
    vision_start_token_id=START,
    vision_end_token_id=END,
    eos_token_id=1,
    pad_token_id=PAD,
    tie_embeddings=False,
)
# Pixels (width, height) of each row's images.
ROW_IMAGES = [[(40, 70)], [], [(90, 30), (24, 24), (60, 60)], [(50, 36), (36, 100)]]


@dataclass
class Case:
    config: QwenVLConfig
    theirs: Qwen2VLForConditionalGeneration
    state: nnx.State
    rows: dict[str, np.ndarray]
    features: np.ndarray  # of all images, in order
    hidden: np.ndarray
    logits: np.ndarray


def photo(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Noise over a gradient: a wrong patch order or resize cannot go unseen."""
    width, height = size
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = random.uniform(0, 60, (height, width, 3))
    tint = random.uniform(0.4, 1, 3)
    return Image.fromarray(np.clip((ramp + noise) * tint, 0, 255).astype(np.uint8))


def write_checkpoint(config: QwenVLConfig, directory) -> Qwen2VLForConditionalGeneration:
    """A random model whose norms are not one and biases not zero, saved by transformers."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config.to_hf())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.normal_(mean, scale)
    model.save_pretrained(directory)
    return model


def make_case(config: QwenVLConfig, side: str, directory) -> Case:
    random = np.random.default_rng(1)
    theirs = write_checkpoint(config, directory)
    vision, window = config.vision, config.vision.merge_size**2
    process = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=(vision.patch_size * vision.merge_size) ** 2,
        max_pixels=4000,
    )
    count, length, patches = len(ROW_IMAGES), 110, 64 * window
    rows = {
        "tokens": np.full((count, length), PAD, np.int32),
        "token_mask": np.zeros((count, length), bool),
        "patches": np.zeros((count, patches, vision.patch_dim), np.float32),
        "patch_positions": np.zeros((count, patches, 2), np.int32),
        "patch_segments": np.zeros((count, patches), np.int32),
    }
    pixels, grids = [], []
    for i, sizes in enumerate(ROW_IMAGES):
        tokens, at = list(random.integers(5, config.vocab_size, 3 + 4 * i)), 0
        for number, size in enumerate(sizes, start=1):
            out = process(photo(size, random), return_tensors="pt")
            grid, n = out["image_grid_thw"], len(out["pixel_values"])
            rows["patches"][i, at : at + n] = out["pixel_values"]
            rows["patch_positions"][i, at : at + n] = get_vision_position_ids(
                grid, vision.merge_size
            )
            rows["patch_segments"][i, at : at + n] = number
            tokens += [START, *[IMAGE] * (n // window), END, *random.integers(5, 100, 2 * number)]
            at += n
            pixels.append(out["pixel_values"])
            grids.append(grid)
        span = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        rows["tokens"][i, span], rows["token_mask"][i, span] = tokens, True
    inputs = {
        "input_ids": torch.from_numpy(rows["tokens"]).long(),
        "attention_mask": torch.from_numpy(rows["token_mask"]).long(),
        "mm_token_type_ids": torch.from_numpy(rows["tokens"] == IMAGE).int(),
        "image_grid_thw": torch.cat(grids),
    }
    positions, _ = theirs.model.get_rope_index(**inputs)
    rows["positions"] = positions.permute(1, 0, 2).int().numpy()
    pixels = torch.cat(pixels)
    with torch.no_grad():
        features = theirs.model.visual(pixels, grid_thw=inputs["image_grid_thw"]).pooler_output
        hidden = theirs.model(**inputs, position_ids=positions, pixel_values=pixels)
        logits = theirs.lm_head(hidden.last_hidden_state)
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    return Case(
        config=config,
        theirs=theirs,
        state=hf_weights.load(directory, abstract, config),
        rows=rows,
        features=features.numpy(),
        hidden=hidden.last_hidden_state.numpy(),
        logits=logits.numpy(),
    )


@pytest.fixture(
    scope="module",
    params=[(SMALL, "right"), (DEEP, "left")],
    ids=["small_padded_right", "deep_padded_left"],
)
def case(request, tmp_path_factory) -> Case:
    config, side = request.param
    return make_case(config, side, tmp_path_factory.mktemp("checkpoint"))


def our_model(case: Case, **options) -> QwenVL:
    options = {"dtype": jnp.float32, **options}
    graph, _ = nnx.split(nnx.eval_shape(lambda: QwenVL(case.config, rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graph, case.state)


def run(model: nnx.Module, call, rows):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, rows: call(nnx.merge(graph, state), rows))(state, rows)


def worst(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max())


def test_vision_features_equal_transformers(case):
    features = run(
        our_model(case),
        lambda model, rows: model.vision(rows)[0],
        case.rows,
    )
    real = case.rows["patch_segments"][:, :: case.config.vision.merge_size**2] > 0
    assert np.isfinite(features).all()
    assert np.abs(case.features).max() > 0.5
    assert worst(np.asarray(features)[real], case.features) <= 1e-4


def test_hidden_states_logits_and_embeddings_equal_transformers(case):
    mask = case.rows["token_mask"]
    model = our_model(case)
    hidden = run(model, lambda model, rows: model(rows), case.rows)
    assert np.isfinite(hidden).all()
    assert worst(hidden[mask], case.hidden[mask]) <= 1e-4
    assert worst(run(model, QwenVL.logits, hidden)[mask], case.logits[mask]) <= 2e-4

    last = [np.flatnonzero(row)[-1] for row in mask]
    pooled = case.hidden[np.arange(len(last)), last]
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert worst(normalize(pool_last(hidden, mask)), pooled) <= 1e-4


def test_an_embedder_loads_the_same_checkpoint_and_gives_unit_vectors(case, tmp_path):
    case.theirs.save_pretrained(tmp_path)
    config = case.config
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: Embedder(config, rngs=nnx.Rngs(1), dtype=jnp.float32, embedding_dim=16)
        )
    )
    model = nnx.merge(graph, hf_weights.load(tmp_path, abstract, config))
    last = [np.flatnonzero(row)[-1] for row in case.rows["token_mask"]]
    pooled = case.hidden[np.arange(len(last)), last, :16]
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert worst(run(model, lambda model, rows: model(rows), case.rows), pooled) <= 1e-4


def test_bfloat16_points_the_same_way(case):
    hidden = run(our_model(case, dtype=jnp.bfloat16), lambda model, rows: model(rows), case.rows)
    ours = np.asarray(normalize(pool_last(hidden, case.rows["token_mask"])))
    theirs = np.asarray(normalize(pool_last(jnp.asarray(case.hidden), case.rows["token_mask"])))
    assert (ours * theirs).sum(1).min() >= 0.999


def gradients(case: Case, remat: str) -> dict[str, np.ndarray]:
    """Of the sum of cubed final states at real tokens; by transformers' names."""
    graph, _ = nnx.split(our_model(case, remat=remat))
    mask = case.rows["token_mask"]

    def loss(state):
        return jnp.sum(jnp.where(mask[..., None], nnx.merge(graph, state)(case.rows), 0) ** 3)

    return dict(hf_weights.to_hf(jax.jit(jax.grad(loss))(case.state), case.config))


@pytest.fixture(scope="module")
def our_gradients(case) -> dict[str, np.ndarray]:
    return gradients(case, "none")


def test_gradients_equal_transformers(case, our_gradients):
    mask, segments = case.rows["token_mask"], case.rows["patch_segments"]
    grids = [
        [1, *(positions[segment == number].max(0) + 1)]
        for positions, segment in zip(case.rows["patch_positions"], segments)
        for number in range(1, segment.max() + 1)
    ]
    tokens = torch.from_numpy(case.rows["tokens"]).long()
    hidden = case.theirs.model(
        input_ids=tokens,
        attention_mask=torch.from_numpy(mask).long(),
        mm_token_type_ids=(tokens == IMAGE).int(),
        image_grid_thw=torch.tensor(grids),
        pixel_values=torch.from_numpy(case.rows["patches"][segments > 0]),
        position_ids=torch.from_numpy(case.rows["positions"]).permute(1, 0, 2).long(),
    ).last_hidden_state
    (hidden[torch.from_numpy(mask)] ** 3).sum().backward()
    theirs = {
        re.sub(r"^model\.(visual\.)|^model\.language_", r"\1", name): parameter.grad.numpy()
        for name, parameter in case.theirs.named_parameters()
        if parameter.grad is not None  # the head, which the loss does not see
    }
    assert theirs.keys() == our_gradients.keys() - {"lm_head.weight"}
    for name, gradient in theirs.items():
        limit = 1e-4 * max(1.0, np.abs(gradient).max())
        assert worst(our_gradients[name], gradient) <= limit, name


def test_recomputing_activations_changes_no_gradient(case, our_gradients):
    other = gradients(case, "full" if case.config is DEEP else "dots")
    for name, gradient in our_gradients.items():
        limit = 1e-6 * max(1.0, np.abs(gradient).max())
        assert worst(other[name], gradient) <= limit, name


def test_our_file_is_a_checkpoint_for_transformers(case, tmp_path):
    hf_weights.save(tmp_path, case.state, case.config)
    again, report = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, ours), (_, theirs) in zip(
        again.named_parameters(), case.theirs.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_config_that_transformers_saved_is_read_back_equal(case, tmp_path):
    case.theirs.config.save_pretrained(tmp_path)
    assert from_hf(json.loads((tmp_path / "config.json").read_text())) == case.config
