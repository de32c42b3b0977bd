"""Each family against transformers' own, in float32, on everything that a batch can hold.

What is compared, and how, stands in qwen_cases. Limits are far below what a wrong piece makes:
without windows or DeepStack, or with positions of one axis, hidden states differ by more than .01.
"""

import copy
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from qwen_cases import (
    CASES,
    CHECKS,
    MAX_PIXELS,
    ROW_IMAGES,
    Case,
    bfloat16_embeddings,
    make_case,
    our_model,
    photo,
    their_image_processor,
    worst,
)
from safetensors.numpy import load_file, save_file

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor, Row, RowSizes
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.config import QwenVLConfig, from_hf
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL
from afmrl_jax.weights import hf_weights

COMPILED_AS_FOR_USERS = True

SAVED = Path(__file__).resolve().parents[2] / ".." / "shared" / "cases"
SMALL = [name for name in CASES if name.endswith("small")]
DEEP = [name for name in CASES if name.endswith("deep")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each case is made when it is first asked for."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            cases[name] = make_case(name, tmp_path_factory.mktemp(name))
        return cases[name]

    return get


@pytest.fixture
def case(request, made) -> Case:
    return made(request.param)


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


@pytest.mark.parametrize("check", CHECKS)
@every_case
def test_differs_from_transformers_by_no_more_than_a_ten_thousandth(case, check):
    assert CHECKS[check](case) <= 1e-4


@every_case
def test_what_is_compared_is_neither_zero_nor_at_padding_infinite(case):
    assert min(np.abs(part).max() for part in case.expected["features"]) > 0.5
    assert np.abs(case.expected["logits"]).max() > 0.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(case.ours))


@pytest.mark.parametrize("case", DEEP, indirect=True)
def test_bfloat16_embeddings_are_within_two_percent_and_point_the_same_way(case):
    error, cosine = bfloat16_embeddings(case)
    assert error <= 2e-2 and cosine >= 0.999


@pytest.mark.parametrize("case", ["qwen2_5_vl_deep"], indirect=True)
def test_windows_cut_some_images_and_hold_others_whole(case):
    side = case.config.vision.window_patches
    grids = case.rows["patch_grids"].reshape(-1, 2)
    assert (grids > 2 * side).any() and ((grids > 1) & (grids <= side)).all(1).any()


@pytest.mark.parametrize(
    ("case", "remat"),
    [
        ("qwen2_vl_small", "dots"),
        ("qwen2_vl_small", "attention"),
        ("qwen2_5_vl_deep", "full"),
        ("qwen3_vl_deep", "full"),
    ],
    indirect=["case"],
)
def test_gradients_equal_transformers_whatever_is_recomputed(case, remat):
    """Of the sum of cubed final states at real tokens."""
    graph, _ = nnx.split(our_model(case, remat=remat))
    mask = case.mask

    def loss(state):
        return jnp.sum(jnp.where(mask[..., None], nnx.merge(graph, state)(case.rows), 0) ** 3)

    ours = dict(hf_weights.to_hf(jax.jit(jax.grad(loss))(case.state), case.config))
    case.theirs.zero_grad()  # torch adds to what another test left
    hidden = case.theirs.model(**case.inputs).last_hidden_state
    (hidden[torch.from_numpy(mask)] ** 3).sum().backward()
    theirs = {
        published(name, case): parameter.grad.numpy()
        for name, parameter in case.theirs.named_parameters()
        if parameter.grad is not None  # the head, which the loss does not see
    }
    assert theirs.keys() == ours.keys() - {"lm_head.weight"}
    for name, gradient in theirs.items():
        assert worst(ours[name], gradient) <= 1e-4 * max(1.0, np.abs(gradient).max()), name


def published(name: str, case: Case) -> str:
    """A parameter's name in a published file."""
    if case.config.architecture == "qwen3_vl":
        return name
    return re.sub(r"^model\.(visual\.)|^model\.language_", r"\1", name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", DEEP, indirect=True)
def test_the_processors_rows_are_transformers_patches_grids_and_rope_positions(case, side):
    texts = ["a blue mug", "", "steel", "a lamp and its shade"]
    tokenizer = train_tokenizer(texts, 300)
    config = case.config.replace(
        vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
    )
    vision, random = config.vision, np.random.default_rng(2)
    processor = Processor(
        tokenizer,
        config,
        RowSizes(
            max_tokens=110,
            max_patches=80 * vision.merge_size**2,
            min_pixels=(vision.patch_size * vision.merge_size) ** 2,
            max_pixels=MAX_PIXELS,
        ),
        pad_left=side == "left",
    )
    rows = [
        Row(text, tuple(photo(size, random) for size in sizes))
        for text, sizes in zip(texts, ROW_IMAGES)
    ]
    ours = processor(rows)
    images = [image for row in rows for image in row.images]
    theirs = their_image_processor(config)(images, return_tensors="pt")
    real = ours["patch_segments"] > 0
    np.testing.assert_array_equal(ours["patches"][real], theirs["pixel_values"])
    grids = theirs["image_grid_thw"]
    expected = np.repeat(grids[:, 1:], grids.prod(1), axis=0)
    np.testing.assert_array_equal(ours["patch_grids"][real], expected)

    tokens, mask = torch.from_numpy(ours["tokens"]).long(), ours["token_mask"]
    positions, _ = case.theirs.model.get_rope_index(
        input_ids=tokens,
        mm_token_type_ids=(tokens == config.image_token_id).int(),
        image_grid_thw=grids,
        attention_mask=torch.from_numpy(mask).long(),
    )
    np.testing.assert_array_equal(ours["positions"].transpose(1, 0, 2)[:, mask], positions[:, mask])


@pytest.mark.parametrize("case", DEEP, indirect=True)
def test_our_file_is_a_checkpoint_for_transformers(case, tmp_path):
    hf_weights.save(tmp_path, case.state, case.config)
    again, report = type(case.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for (name, ours), (_, theirs) in zip(
        again.named_parameters(), case.theirs.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@every_case
def test_the_config_that_transformers_saved_is_read_back_equal(case):
    saved = json.loads((case.directory / "config.json").read_text())
    assert from_hf(saved) == case.config


def as_transformers_reads(config: dict) -> dict:
    """The same configuration with every field that transformers takes for one left out."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict()


def reading(config: dict) -> QwenVLConfig | str:
    try:
        return from_hf(config)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", ["qwen2_vl_2b", "qwen2_5_vl_3b"])
def test_a_config_that_transformers_4_saved_is_the_published_model(name):
    if not SAVED.exists():
        pytest.skip("the saved configs are not beside this checkout")
    config = json.loads((SAVED / f"{name}_saved_by_transformers_4.49.json").read_text())
    assert from_hf(config) == preset(name)
    assert from_hf(as_transformers_reads(config)) == preset(name)


@pytest.mark.parametrize("name", ["qwen2_vl_2b", "qwen2_5_vl_3b", "qwen3_vl_2b"])
def test_a_field_that_is_left_out_is_what_transformers_takes(name):
    whole = preset(name).to_hf() | {"eos_token_id": 151645, "pad_token_id": 151643}
    nested = name.startswith("qwen3")
    tokens = ("eos_token_id", "pad_token_id", "bos_token_id", "model_type", "architectures")
    parts = ("text_config", "vision_config") if nested else ("vision_config",)
    left_out = [(part, field) for part in parts for field in whole[part]]
    left_out += [("", field) for field in whole if field not in ("text_config", *tokens)]
    left_out = [place for place in left_out if place[1] not in tokens]
    read = 0
    for part, field in left_out:
        config = copy.deepcopy(whole)
        del (config[part] if part else config)[field]
        ours = reading(config)
        assert ours == reading(as_transformers_reads(config)), field
        read += isinstance(ours, QwenVLConfig)
    assert read > 20  # and the others are refused in one sentence


@pytest.mark.parametrize(
    ("ties", "head"), [((True, None), "other"), ((False, True), "other"), ((False, True), "none")]
)
@pytest.mark.parametrize("case", SMALL, indirect=True)
def test_the_file_decides_with_its_config_whether_there_is_a_head(case, ties, head, tmp_path):
    """ties: tie_word_embeddings of the whole and within text_config. Where transformers would draw
    a head at random we refuse."""
    described = json.loads((case.directory / "config.json").read_text())
    described["tie_word_embeddings"], described["text_config"]["tie_word_embeddings"] = ties
    (tmp_path / "config.json").write_text(json.dumps(described))
    tensors = load_file(case.directory / "model.safetensors")
    if head == "other":
        table = next(x for name, x in tensors.items() if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = np.random.default_rng(0).permutation(table)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = type(case.theirs).from_pretrained(tmp_path, output_loading_info=True)
    config = hf_weights.with_head_of(tmp_path, from_hf(described))
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    )
    if report["missing_keys"]:
        assert (case.config.architecture, head) == ("qwen3_vl", "none")
        with pytest.raises(UserError, match="embedder has no language head"):
            hf_weights.load(tmp_path, abstract, config)
        return
    model = nnx.merge(graph, hf_weights.load(tmp_path, abstract, config))
    hidden = case.expected["hidden"][case.mask]
    with torch.no_grad():
        expected = theirs.lm_head(torch.from_numpy(hidden)).numpy()
    assert worst(model.logits(jnp.asarray(hidden)), expected) <= 1e-4
    changed = worst(expected, case.expected["logits"][case.mask])
    assert (changed > 1) == (head == "other")
