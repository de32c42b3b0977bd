"""Random checkpoints of each family, rows that both sides read, and what is compared of them.

transformers computes in float32 with torch on the CPU. Rows are ragged: no, one, two or three
images of other sizes between texts, some larger than an attention window.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from afmrl_jax.models.config import FAMILIES, QwenVLConfig, TextConfig, VisionConfig
from afmrl_jax.models.embedder import Embedder, normalize, pool_last
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.rope import rotary_angles, vision_frequencies
from afmrl_jax.models.vision import attention_masks
from afmrl_jax.weights import hf_weights

TOKENS = {
    "image_token_id": 4,
    "vision_start_token_id": 2,
    "vision_end_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# What each family adds to a vision tower, and its M-RoPE sections: of heads of 24 and of 16.
OWN = {
    "qwen2_vl": ({}, {}, (5, 3, 4), (2, 3, 3)),
    "qwen2_5_vl": (
        {"window_size": 24, "full_attention_layers": (1,)},  # 4 patches of 6 pixels
        {"window_size": 28, "full_attention_layers": (2, 4)},  # 6 patches of 4, rounded down
        (5, 3, 4),
        (2, 3, 3),
    ),
    "qwen3_vl": (
        {"num_positions": 25, "deepstack_layers": (0, 1)},
        {"num_positions": 196, "deepstack_layers": (0, 5), "num_layers": 7},
        (6, 3, 3),
        (4, 2, 2),
    ),
}
MAX_PIXELS = 4000
# Pixels (width, height) of each row's images.
ROW_IMAGES = [[(40, 70)], [], [(90, 30), (24, 24), (60, 60)], [(50, 36), (36, 100)]]


def small_config(architecture: str) -> QwenVLConfig:
    """So few layers that they are unrolled, embeddings tied."""
    vision = {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 3,
        "mlp_size": 192,
        "patch_size": 6,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    own = OWN[architecture]
    return QwenVLConfig(
        vision=VisionConfig(**{**vision, **own[0]}, **FAMILIES[architecture][0]),
        text=TextConfig(
            # Qwen3-VL alone may have heads wider together than the model.
            hidden_size=64 if architecture == "qwen3_vl" else 96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            mlp_size=100,
            mrope_sections=own[2],
            rope_theta=1e4,
            **FAMILIES[architecture][1],
        ),
        vocab_size=300,
        tie_embeddings=True,
        architecture=architecture,
        **TOKENS,
    )


def deep_config(architecture: str) -> QwenVLConfig:
    """Another shape in every respect, deep enough for scans, with a head of its own."""
    vision = {
        "hidden_size": 32,
        "num_layers": 6,
        "num_heads": 2,
        "mlp_size": 64,
        "patch_size": 4,
        "merge_size": 3,
        "temporal_patch_size": 1,
    }
    own = OWN[architecture]
    return QwenVLConfig(
        vision=VisionConfig(**{**vision, **own[1]}, **FAMILIES[architecture][0]),
        text=TextConfig(
            hidden_size=32,
            num_layers=7,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            mlp_size=80,
            mrope_sections=own[3],
            norm_epsilon=1e-5,
            **FAMILIES[architecture][1],
        ),
        vocab_size=200,
        tie_embeddings=False,
        architecture=architecture,
        **TOKENS,
    )


# Name -> configuration and the side that is padded.
CASES: dict[str, tuple[QwenVLConfig, str]] = {
    f"{architecture}_{depth}": (make(architecture), side)
    for architecture in FAMILIES
    for depth, make, side in (("small", small_config, "right"), ("deep", deep_config, "left"))
}


@dataclass
class Case:
    """One checkpoint and batch. inputs: what transformers takes, its position_ids among it."""

    config: QwenVLConfig
    directory: Path
    theirs: transformers.PreTrainedModel
    state: nnx.State
    rows: dict[str, np.ndarray]
    inputs: dict[str, torch.Tensor]

    @property
    def mask(self) -> np.ndarray:
        return self.rows["token_mask"]

    @cached_property
    def expected(self) -> dict[str, np.ndarray | list[np.ndarray]]:
        """What transformers computes in float32."""
        return run_theirs(self.theirs, self.inputs, self.config)

    @cached_property
    def ours(self) -> dict[str, np.ndarray | list[np.ndarray]]:
        """What we compute in float32, under the same names; of all rows, padding too."""

        def call(model: QwenVL, rows) -> dict[str, Any]:
            features, tapped = model.vision(rows)
            hidden = model(rows)
            return {
                "features": [features, *tapped],
                "hidden": hidden,
                "logits": model.logits(hidden),
                "embeddings": normalize(pool_last(hidden, rows["token_mask"])),
            }

        return jax.tree.map(np.asarray, run(our_model(self), call, self.rows))


def photo(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Noise over a gradient: a wrong patch order or resize cannot go unseen."""
    width, height = size
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = random.uniform(0, 60, (height, width, 3))
    tint = random.uniform(0.4, 1, 3)
    return Image.fromarray(np.clip((ramp + noise) * tint, 0, 255).astype(np.uint8))


def their_image_processor(config: QwenVLConfig) -> Qwen2VLImageProcessorPil:
    vision = config.vision
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2VLImageProcessorPil(
        **(half if config.architecture == "qwen3_vl" else {}),
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=(vision.patch_size * vision.merge_size) ** 2,
        max_pixels=MAX_PIXELS,
    )


def write_checkpoint(config: QwenVLConfig, directory: Path) -> transformers.PreTrainedModel:
    """A random model whose norms are not one and biases not zero, saved by transformers."""
    torch.manual_seed(0)
    settings = config.to_hf()
    settings = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForImageTextToText.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.normal_(mean, scale)
    model.save_pretrained(directory)
    return model


def make_case(name: str, directory: Path) -> Case:
    """directory: an empty folder for the checkpoint."""
    config, side = CASES[name]
    theirs = write_checkpoint(config, directory)
    rows, pixels, grids = make_rows(config, side)
    inputs = {
        "input_ids": torch.from_numpy(rows["tokens"]).long(),
        "attention_mask": torch.from_numpy(rows["token_mask"]).long(),
        "mm_token_type_ids": torch.from_numpy(rows["tokens"] == config.image_token_id).int(),
        "image_grid_thw": grids,
    }
    positions, _ = theirs.model.get_rope_index(**inputs)
    rows["positions"] = positions.permute(1, 0, 2).int().numpy()
    inputs |= {"position_ids": positions, "pixel_values": pixels}
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    state = hf_weights.load(directory, abstract, config)
    return Case(config, directory, theirs, state, rows, inputs)


def make_rows(
    config: QwenVLConfig, side: str
) -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]:
    """Our rows but for `positions`, and transformers' pixel values and grids of all images."""
    random, process = np.random.default_rng(1), their_image_processor(config)
    merge, window = config.vision.merge_size, config.vision.merge_size**2
    count, length, patches = len(ROW_IMAGES), 110, 64 * window
    rows = {
        "tokens": np.full((count, length), config.pad_token_id, np.int32),
        "token_mask": np.zeros((count, length), bool),
        "patches": np.zeros((count, patches, config.vision.patch_dim), np.float32),
        "patch_positions": np.zeros((count, patches, 2), np.int32),
        "patch_segments": np.zeros((count, patches), np.int32),
        "patch_grids": np.ones((count, patches, 2), np.int32),
    }
    pixels, grids = [], []
    for i, sizes in enumerate(ROW_IMAGES):
        tokens, at = list(random.integers(5, config.vocab_size, 3 + 4 * i)), 0
        for number, size in enumerate(sizes, start=1):
            out = process(photo(size, random), return_tensors="pt")
            grid, n = out["image_grid_thw"], len(out["pixel_values"])
            rows["patches"][i, at : at + n] = out["pixel_values"]
            rows["patch_positions"][i, at : at + n] = get_vision_position_ids(grid, merge)
            rows["patch_segments"][i, at : at + n] = number
            rows["patch_grids"][i, at : at + n] = grid[0, 1:]
            features = [config.image_token_id] * (n // window)
            ends = config.vision_start_token_id, config.vision_end_token_id
            tokens += [ends[0], *features, ends[1], *random.integers(5, 100, 2 * number)]
            at += n
            pixels.append(out["pixel_values"])
            grids.append(grid)
        span = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        rows["tokens"][i, span], rows["token_mask"][i, span] = tokens, True
    return rows, torch.cat(pixels), torch.cat(grids)


def run_theirs(
    model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], config: QwenVLConfig
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """features: [the merged, those of DeepStack]; blocks: the tower's input and each block's
    output, patches in our order; hidden, logits, embeddings of the rows."""
    blocks, grids = [], inputs["image_grid_thw"]
    hooks = [
        model.model.visual.blocks[0].register_forward_pre_hook(lambda _, x: blocks.append(x[0])),
        *(
            b.register_forward_hook(lambda *a: blocks.append(a[2]))
            for b in model.model.visual.blocks
        ),
    ]
    with torch.no_grad():
        tower = model.model.visual(inputs["pixel_values"].to(model.dtype), grid_thw=grids)
        for hook in hooks:
            hook.remove()
        hidden = model.model(**inputs).last_hidden_state
        logits = model.lm_head(hidden)
    vision = config.vision
    if vision.window_size:  # theirs are sorted by windows
        sizes = vision.merge_size, vision.window_size, vision.patch_size
        back = torch.argsort(get_vision_window_index(grids, *sizes)[0])
        blocks = [b.reshape(len(back), -1)[back].reshape(b.shape) for b in blocks]
    hidden = hidden.float().numpy()
    mask = inputs["attention_mask"].numpy()
    pooled = hidden[np.arange(len(mask)), [np.flatnonzero(row)[-1] for row in mask]]
    return {
        "features": [
            part.float().numpy()
            for part in (tower.pooler_output, *getattr(tower, "deepstack_features", []))
        ],
        "blocks": [block.float().numpy() for block in blocks],
        "hidden": hidden,
        "logits": logits.float().numpy(),
        "embeddings": pooled / np.linalg.norm(pooled, axis=1, keepdims=True),
    }


def our_model(case: Case, **options) -> QwenVL:
    options = {"dtype": jnp.float32, **options}
    graph, _ = nnx.split(nnx.eval_shape(lambda: QwenVL(case.config, rngs=nnx.Rngs(0), **options)))
    return nnx.merge(graph, case.state)


def our_embeddings(case: Case, **options) -> np.ndarray:
    """By an Embedder that reads the checkpoint itself; bf16 unless `options` say otherwise."""
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: Embedder(case.config, rngs=nnx.Rngs(1), **options))
    )
    model = nnx.merge(graph, hf_weights.load(case.directory, abstract, case.config))
    return np.asarray(run(model, lambda model, rows: model(rows), case.rows))


def run(model: nnx.Module, call: Callable, rows):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, rows: call(nnx.merge(graph, state), rows))(state, rows)


def our_blocks(case: Case) -> list[np.ndarray]:
    """The tower's input and each block's output, one after another; of real patches."""

    def begin(model: QwenVL, rows):
        tower, positions = model.vision, rows["patch_positions"]
        angles = rotary_angles(positions, *vision_frequencies(tower.config))
        masks = attention_masks(tower.config, positions, rows["patch_segments"])
        return tower.embed_patches(rows), angles, masks

    @functools.partial(jax.jit, static_argnums=0)
    def step(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, angles, mask: jax.Array):
        return nnx.merge(graph, state)(x, angles, mask)

    tower = our_model(case).vision
    x, angles, (image, window) = run(our_model(case), begin, case.rows)
    outputs = [x]
    for group in tower.layers:
        graph, stacked = nnx.split(group)
        for i in range(len(jax.tree.leaves(stacked)[0])):
            full = len(outputs) - 1 in tower.config.full_attention_layers or window is None
            state = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            outputs.append(step(graph, state, outputs[-1], angles, image if full else window))
    return [np.asarray(block)[case.rows["patch_segments"] > 0] for block in outputs]


def worst(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max())


def vision_blocks(case: Case) -> float:
    pairs = zip(our_blocks(case), case.expected["blocks"], strict=True)
    return max(worst(ours, theirs) for ours, theirs in pairs)


def vision_features(case: Case) -> float:
    """The merged features and DeepStack's, from the scanned tower."""
    real = case.rows["patch_segments"][:, :: case.config.vision.merge_size**2] > 0
    pairs = zip(case.ours["features"], case.expected["features"], strict=True)
    return max(worst(ours[real], theirs) for ours, theirs in pairs)


def hidden_states(case: Case) -> float:
    return worst(case.ours["hidden"][case.mask], case.expected["hidden"][case.mask])


def logits(case: Case) -> float:
    return worst(case.ours["logits"][case.mask], case.expected["logits"][case.mask])


def embeddings(case: Case) -> float:
    return worst(case.ours["embeddings"], case.expected["embeddings"])


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def bfloat16_embeddings(case: Case) -> tuple[float, float]:
    """Relative error and lowest cosine of our bf16 against float32."""
    ours, theirs = our_embeddings(case), case.expected["embeddings"]
    return relative_error(ours, theirs), float((ours * theirs).sum(1).min())


def torch_bfloat16_embeddings(case: Case) -> tuple[float, float]:
    """The same of transformers' own bf16: what rounding alone costs so small a model."""
    half = type(case.theirs).from_pretrained(case.directory, dtype=torch.bfloat16).eval()
    ours = run_theirs(half, case.inputs, case.config)["embeddings"]
    theirs = case.expected["embeddings"]
    return relative_error(ours, theirs), float((ours * theirs).sum(1).min())


# In float32, max |difference| over everything real; each at most 1e-4.
CHECKS: dict[str, Callable[[Case], float]] = {
    "vision blocks": vision_blocks,
    "vision features": vision_features,
    "hidden states": hidden_states,
    "logits": logits,
    "embeddings": embeddings,
}
