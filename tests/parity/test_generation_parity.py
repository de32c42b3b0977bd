"""Our greedy answers against transformers' `generate`, token for token, in float32.

64 prompts a family, of 3 to some 40 tokens, with no, one or two images. For us every other one is
padded right; transformers pads left always.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoConfig, AutoModelForImageTextToText

from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.models.sampler import Sampling, generate, sample_keys
from afmrl_jax.weights import hf_weights

COMPILED_AS_FOR_USERS = True

PROMPTS, LENGTH, PATCHES, NEW = 64, 48, 64, 16
VOCABULARY = 300
GRIDS = [(2, 2), (4, 2), (4, 6), (2, 6), (4, 4)]  # rows and columns of an image, in patches


def tiny(name):
    return preset(name).replace(vocab_size=VOCABULARY)


def model_of(config):
    """transformers' model, random, of logits far enough apart to choose by."""
    torch.manual_seed(0)
    options = AutoConfig.for_model(**config.to_hf())
    model = AutoModelForImageTextToText.from_config(options, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.normal_(mean, scale)
    return model


def patch_positions(rows, columns):
    """Row and column of each patch of an image, window after window of 2 x 2."""
    at = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    return at.reshape(rows // 2, 2, columns // 2, 2, 2).swapaxes(1, 2).reshape(-1, 2)


def make_prompts(config, random):
    """Rows as QwenVL reads them but `positions`, padded left, and all images' grids in order."""
    rows = {
        "tokens": np.full((PROMPTS, LENGTH), config.pad_token_id, np.int32),
        "token_mask": np.zeros((PROMPTS, LENGTH), bool),
        "patches": np.zeros((PROMPTS, PATCHES, config.vision.patch_dim), np.float32),
        "patch_positions": np.zeros((PROMPTS, PATCHES, 2), np.int32),
        "patch_segments": np.zeros((PROMPTS, PATCHES), np.int32),
        "patch_grids": np.ones((PROMPTS, PATCHES, 2), np.int32),
    }
    grids = []
    for i in range(PROMPTS):
        tokens, at = list(random.integers(5, VOCABULARY, random.integers(3, 12))), 0
        for number in range(1, random.integers(0, 3) + 1):
            grid = GRIDS[random.integers(len(GRIDS))]
            count = grid[0] * grid[1]
            here = i, slice(at, at + count)
            rows["patches"][here] = random.normal(size=(count, config.vision.patch_dim))
            rows["patch_positions"][here] = patch_positions(*grid)
            rows["patch_segments"][here], rows["patch_grids"][here] = number, grid
            at += count
            grids.append((1, *grid))
            tokens += [config.vision_start_token_id, *[config.image_token_id] * (count // 4)]
            tokens += [config.vision_end_token_id]
            tokens += list(random.integers(5, VOCABULARY, random.integers(1, 6)))
        rows["tokens"][i, -len(tokens) :], rows["token_mask"][i, -len(tokens) :] = tokens, True
    return rows, torch.tensor(grids)


def their_answers(model, config, rows, grids, sampling):
    """Tokens, padded, and the log-prob of each by their raw logits; and M-RoPE's positions."""
    inputs = {
        "input_ids": torch.from_numpy(rows["tokens"]).long(),
        "attention_mask": torch.from_numpy(rows["token_mask"]).long(),
        "mm_token_type_ids": torch.from_numpy(rows["tokens"] == config.image_token_id).int(),
        "image_grid_thw": grids,
    }
    positions, _ = model.model.get_rope_index(**inputs)
    out = model.generate(
        **inputs,
        pixel_values=torch.from_numpy(rows["patches"][rows["patch_segments"] > 0]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(sampling.stop),
        pad_token_id=sampling.pad,
        suppress_tokens=list(sampling.forbidden),
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = out.sequences[:, LENGTH:]
    log_probs = torch.stack(out.logits, 1).log_softmax(-1).gather(2, chosen[..., None])[..., 0]
    missing = ((0, 0), (0, NEW - chosen.shape[1]))
    tokens = np.pad(chosen.numpy(), missing, constant_values=sampling.pad)
    return tokens, np.pad(log_probs.numpy(), missing), positions.permute(1, 0, 2).int().numpy()


def every_other_padded_right(rows):
    """The same prompts, half of them from the first place on."""
    shifts = np.where(np.arange(PROMPTS) % 2, rows["token_mask"].sum(1) - LENGTH, 0)
    moved = {
        name: np.stack([np.roll(row, shift, axis=-1) for row, shift in zip(rows[name], shifts)])
        for name in ("tokens", "token_mask", "positions")
    }
    return {**rows, **moved}


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen2_5", "tiny_qwen3"])
def test_greedy_answers_and_their_log_probs_equal_transformers(name, tmp_path):
    config = tiny(name)
    sampling = Sampling(
        max_new_tokens=NEW,
        stop=tuple(range(50, 60)),  # so many that some answers end early
        forbidden=(
            config.image_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
            *range(100, 150),  # so many that some would have been chosen
        ),
        pad=config.pad_token_id,
        temperature=0,
    )
    theirs = model_of(config)
    theirs.save_pretrained(tmp_path)
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    )
    params = hf_weights.load(tmp_path, abstract, config)
    rows, grids = make_prompts(config, np.random.default_rng(1))
    tokens, log_probs, rows["positions"] = their_answers(theirs, config, rows, grids, sampling)
    keys = sample_keys(jax.random.key(0), range(PROMPTS), 1)
    ours = generate(graph, params, every_other_padded_right(rows), keys, sampling)
    mask = np.asarray(ours.mask[:, 0])
    np.testing.assert_array_equal(ours.tokens[:, 0], tokens)
    assert np.abs(np.asarray(ours.log_probs[:, 0]) - log_probs)[mask].max() <= 1e-4
    assert len(np.unique(tokens[mask])) > 100  # no answer that any model would give
    assert mask.sum(1).min() < NEW / 2 and mask.sum(1).max() == NEW
