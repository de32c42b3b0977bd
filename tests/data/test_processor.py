import dataclasses
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.images import check_preprocessor, window_grid
from afmrl_jax.data.processor import Processor, Row, RowSizes
from afmrl_jax.data.prompts import PlainPrompt
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.config import from_hf
from afmrl_jax.models.presets import preset

TOKENIZER = train_tokenizer(["Find the product. navy blue dress with a v neck"] * 4, 320)
IDS = special_token_ids(TOKENIZER)
CONFIG = preset("tiny").replace(vocab_size=TOKENIZER.get_vocab_size(), **IDS)
PATCH, MERGE = CONFIG.vision.patch_size, CONFIG.vision.merge_size
FACTOR = PATCH * MERGE


def _processor(**changes) -> Processor:
    settings = {
        "max_tokens": 64,
        "max_patches": 128,
        "min_pixels": 4 * FACTOR**2,
        "max_pixels": 16 * FACTOR**2,
        "prompt": PlainPrompt("Find it."),
    } | changes
    sizes = RowSizes(**{field: settings.pop(field) for field in RowSizes.__annotations__})
    return Processor(TOKENIZER, CONFIG, sizes, **settings)


def _image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def _shared(*parts: str) -> Path:
    path = Path(__file__).resolve().parents[2].joinpath("..", "shared", *parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


ROWS = [
    Row("navy blue dress", (_image(64, 64),)),
    Row("v neck", (_image(37, 90, 1), _image(200, 60, 2), _image(5, 3, 3))),
    Row("a text without a photo " * 9),
    Row("", (_image(40, 33, 4),)),
    Row(""),
]


def _grids(batch: dict, row: int) -> list[tuple[int, int]]:
    """Patch rows and columns of each image of a row, read back from the batch."""
    segments = batch["patch_segments"][row]
    return [
        tuple(int(side) for side in batch["patch_positions"][row][segments == k].max(0) + 1)
        for k in range(1, segments.max() + 1)
    ]


def test_shapes_and_dtypes_do_not_depend_on_the_rows():
    channels = 3 * 2 * PATCH**2
    for rows in (ROWS, ROWS[2:3]):
        batch, n = _processor()(rows), len(rows)
        assert {key: (array.shape, array.dtype.name) for key, array in batch.items()} == {
            "tokens": ((n, 64), "int32"),
            "token_mask": ((n, 64), "bool"),
            "positions": ((n, 3, 64), "int32"),
            "patches": ((n, 128, channels), "float32"),
            "patch_positions": ((n, 128, 2), "int32"),
            "patch_segments": ((n, 128), "int32"),
            "patch_grids": ((n, 128, 2), "int32"),
        }


def test_a_row_is_its_images_then_instruction_and_text_then_one_end_token():
    batch = _processor()([Row("navy", (_image(32, 32), _image(48, 32)))])
    start, pad, end = (
        IDS[key] for key in ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    )
    text = TOKENIZER.encode("Find it.\nnavy").ids
    row = [start, *[pad] * 4, end, start, *[pad] * 6, end, *text, IDS["pad_token_id"]]
    assert batch["tokens"][0, : len(row)].tolist() == row
    assert batch["token_mask"][0].tolist() == [True] * len(row) + [False] * (64 - len(row))
    assert batch["patch_segments"][0].tolist() == [1] * 16 + [2] * 24 + [0] * 88


def test_a_row_without_images_has_no_patches():
    batch = _processor()([Row("navy")])
    assert not batch["patch_segments"].any() and not batch["patches"].any()
    assert (batch["tokens"] != IDS["image_token_id"]).all()


def test_a_long_text_is_cut_from_its_end_and_keeps_the_end_token():
    processor = _processor()
    text = "navy blue " * 5000
    batch = processor([Row(text, (_image(64, 64),))])
    kept = TOKENIZER.encode("Find it.\n" + text[:1000]).ids[: 64 - 16 - 2 - 1]
    assert batch["tokens"][0, 18:63].tolist() == kept
    assert batch["tokens"][0, 63] == IDS["pad_token_id"] and batch["token_mask"].all()


def test_a_row_holds_an_attribute_until_its_last_token_is_cut():
    image = _image(64, 64)
    for images in ((), (image,)):
        for words in range(1, 60):
            text = "navy " * words
            row = Row(text, images, attributes=((0, len(text)),))
            whole = _processor(max_tokens=512)([row])["token_mask"].sum()
            shown = _processor().shown(row)
            assert shown.attributes == (whole <= 64) and shown.needed == max(64, whole)


def test_rows_are_put_into_the_first_bucket_that_holds_them_and_stay_the_same():
    processor = _processor()
    whole, buckets = processor(ROWS), [(16, 0), (64, 0), (40, 64), (64, 128)]
    for chosen, expected in (([4], (16, 0)), ([2, 4], (64, 0)), ([3], (40, 64)), ([1], (64, 128))):
        batch = processor([ROWS[i] for i in chosen], buckets)
        assert (batch["tokens"].shape[1], batch["patches"].shape[1]) == expected
        for name, array in batch.items():
            same = whole[name][chosen]
            if name in ("tokens", "token_mask", "positions"):
                same = same[..., : expected[0]]
            else:
                same = same[:, : expected[1]]
            np.testing.assert_array_equal(array, same)
    assert processor.text_bucket == (64, 0)
    with pytest.raises(ValueError, match="64 tokens and 0 patches fit in none"):
        processor([ROWS[2]], [(63, 128)])


def test_a_row_does_not_depend_on_its_neighbours():
    processor = _processor()
    batch = processor(ROWS)
    for i, row in enumerate(ROWS):
        for key, array in processor([row]).items():
            np.testing.assert_array_equal(array[0], batch[key][i])


@pytest.mark.parametrize(
    ("architecture", "patch", "mean", "std"),
    [
        ("qwen2_vl", 14, None, None),  # the library's own defaults
        ("qwen2_5_vl", 14, None, None),
        ("qwen3_vl", 16, [0.5] * 3, [0.5] * 3),
    ],
)
def test_patches_are_bit_equal_to_the_library_image_processor(architecture, patch, mean, std):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    factor = patch * MERGE
    bounds = {"min_pixels": 4 * factor**2, "max_pixels": 16 * factor**2}
    statistics = {"image_mean": mean, "image_std": std} if mean else {}
    library = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=MERGE, temporal_patch_size=2, **bounds, **statistics
    )
    random = np.random.default_rng(0)
    images = [image for row in ROWS for image in row.images]
    images += [_image(50, 30, 5, "L"), _image(50, 30, 6, "RGBA"), _image(50, 30, 7, "CMYK")]
    for i, (height, width) in enumerate(np.exp(random.uniform(2, 6.5, (24, 2))).astype(int)):
        images.append(_image(int(width), int(height), 8 + i))
    vision = dataclasses.replace(CONFIG.vision, patch_size=patch)
    config = CONFIG.replace(vision=vision, architecture=architecture)
    processor = Processor(TOKENIZER, config, RowSizes(max_tokens=64, max_patches=64, **bounds))
    batch = processor([Row("", (image,)) for image in images])
    for i, image in enumerate(images):
        expected = library(images=[image], return_tensors="np")
        assert _grids(batch, i) == [tuple(expected["image_grid_thw"][0, 1:])]
        kept = batch["patches"][i][batch["patch_segments"][i] > 0]
        np.testing.assert_array_equal(kept, expected["pixel_values"])


@pytest.mark.parametrize("folder", ["qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_embedding_8b"])
def test_published_preprocessor_settings_fit_their_models(folder, tmp_path):
    folder = _shared("qwen", folder)
    config = from_hf(json.loads((folder / "config.json").read_text()))
    check_preprocessor(folder, config)
    check_preprocessor(tmp_path, config)  # a folder may have none


def test_a_preprocessor_of_another_model_is_an_error_that_names_each_difference(tmp_path):
    settings = {"patch_size": 7, "merge_size": MERGE, "image_mean": [0.5] * 3, "min_pixels": 1}
    message = r"patch_size is 7, expected 8; image_mean is \[0.5, 0.5, 0.5\], expected"
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(UserError, match=message):
        check_preprocessor(tmp_path, CONFIG)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        check_preprocessor(tmp_path, CONFIG)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        check_preprocessor(tmp_path, CONFIG)


def test_positions_equal_transformers_rope_index_on_a_ragged_batch():
    torch = pytest.importorskip("torch")
    from transformers import Qwen2VLConfig, Qwen2VLModel

    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig(**CONFIG.to_hf()))
    batch = _processor()(ROWS)
    grids = [(1, *grid) for i in range(len(ROWS)) for grid in _grids(batch, i)]
    expected, _ = model.get_rope_index(
        input_ids=torch.tensor(batch["tokens"]).long(),
        mm_token_type_ids=torch.tensor(batch["tokens"] == IDS["image_token_id"]).int(),
        image_grid_thw=torch.tensor(grids),
        attention_mask=torch.tensor(batch["token_mask"]),
    )
    np.testing.assert_array_equal(batch["positions"], expected.numpy().transpose(1, 0, 2))


def test_patch_positions_equal_those_of_transformers_vision_tower():
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_position_ids

    batch = _processor()(ROWS)
    for i in range(len(ROWS)):
        if grids := _grids(batch, i):
            expected = get_vision_position_ids(torch.tensor([(1, *g) for g in grids]), MERGE)
            kept = batch["patch_positions"][i][batch["patch_segments"][i] > 0]
            np.testing.assert_array_equal(kept, expected.numpy())


def test_positions_of_a_row_worked_by_hand():
    batch = _processor(prompt=PlainPrompt(), min_pixels=1)([Row("v", (_image(48, 32),))])
    # One image of 2 x 3 windows: time stands still, rows and columns count up, text goes on from 4.
    assert batch["positions"][0, :, :10].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]


def test_every_patch_knows_its_whole_image_in_patches_and_padding_is_one_by_one():
    batch = _processor()(ROWS)
    segments = batch["patch_segments"]
    for i in range(len(ROWS)):
        for number, grid in enumerate(_grids(batch, i), 1):
            assert (batch["patch_grids"][i][segments[i] == number] == grid).all()
    assert (batch["patch_grids"][segments == 0] == 1).all()


def test_image_tokens_and_merged_patches_are_equally_many_in_every_row():
    batch = _processor()(ROWS)
    tokens = (batch["tokens"] == IDS["image_token_id"]).sum(1)
    np.testing.assert_array_equal(tokens * MERGE**2, (batch["patch_segments"] > 0).sum(1))


def test_images_of_a_row_share_the_budget_and_small_ones_keep_their_size():
    # 32 windows in all; alone, the large images take 16 each and the small one 4.
    large, small = _image(64, 64), _image(32, 32)
    batch = _processor()([Row("", (large, small, large, large)), Row("", (large, small, large))])
    windows = [[h * w // MERGE**2 for h, w in _grids(batch, i)] for i in range(2)]
    assert windows == [[9, 4, 9, 9], [9, 4, 16]]


def test_images_shrink_where_tokens_are_scarcer_than_patches():
    instruction = len(TOKENIZER.encode("Find it.").ids)
    tight = 32 + 2 + instruction + 1
    batch = _processor(max_tokens=tight)([Row("v neck", (_image(64, 64), _image(64, 64)))])
    assert [h * w // MERGE**2 for h, w in _grids(batch, 0)] == [9, 16]
    assert batch["tokens"][0, -1] == IDS["pad_token_id"]


def test_more_images_than_fit_at_one_window_each_is_an_error():
    instruction = len(TOKENIZER.encode("Find it.").ids)
    for changes, most in (({"max_patches": 8}, 2), ({"max_tokens": 32 + 3 + instruction}, 11)):
        few = _processor(**changes)
        assert few.max_images == most
        few([Row("", (_image(64, 64),) * most)])
        with pytest.raises(UserError, match=f"{most + 1} images"):
            few([Row("", (_image(64, 64),) * (most + 1))])


def test_window_grid_is_smart_resize_wherever_that_fits():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    random = np.random.default_rng(0)
    bounds = {"min_pixels": 4 * 28**2, "max_pixels": 256 * 28**2}
    fitted = 0
    for height, width in np.exp(random.uniform(0, 8, (2000, 2))).astype(int).tolist():
        rows, columns = window_grid(height, width, factor=28, limit=256, **bounds)
        assert rows >= 1 and columns >= 1 and rows * columns <= 256
        if max(height, width) <= 200 * min(height, width):
            expected = smart_resize(height, width, factor=28, **bounds)
            if expected[0] * expected[1] <= 256 * 28**2:
                assert (rows * 28, columns * 28) == expected
                fitted += 1
    assert fitted > 1500


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 601), (2, 7), (1, 199)])
def test_tiny_and_extremely_long_images_are_resized_and_never_crash(size):
    for max_patches in (4, 128):
        batch = _processor(max_patches=max_patches)([Row("navy", (_image(*size),))])
        assert np.isfinite(batch["patches"]).all()
        assert 0 < (batch["patch_segments"] > 0).sum() <= max_patches


def test_an_empty_image_is_an_error():
    with pytest.raises(UserError, match="0 x 5 pixels"):
        _processor()([Row("", (Image.new("RGB", (0, 5)),))])


@pytest.mark.parametrize(
    "text", ["<|image_pad|>", "<|endoftext|><|vision_start|>", "a <|im_end|> b <|video_pad|>"]
)
def test_special_tokens_in_a_listing_stay_ordinary_text_even_after_pickling(text):
    processor = pickle.loads(pickle.dumps(_processor()))
    batch = processor([Row(text, (_image(32, 32),))])
    tokens = batch["tokens"][0][batch["token_mask"][0]]
    assert (tokens == IDS["image_token_id"]).sum() == 4
    assert (tokens[:-1] != IDS["pad_token_id"]).all()
    assert TOKENIZER.decode(tokens[6:-1].tolist()) == "Find it.\n" + text


def test_the_callers_tokenizer_is_left_as_it_was():
    processor = _processor()
    processor(ROWS)
    assert TOKENIZER.encode("<|image_pad|>").ids == [IDS["image_token_id"]]


def test_surrogates_and_nuls_do_not_crash():
    batch = _processor()([Row("lone \ud800 and \0 nul")])
    tokens = batch["tokens"][0][batch["token_mask"][0]][:-1].tolist()
    assert TOKENIZER.decode(tokens) == "Find it.\nlone \ufffd and \0 nul"


def test_a_pickled_processor_gives_the_same_arrays():
    processor = _processor()
    for key, array in pickle.loads(pickle.dumps(processor))(ROWS).items():
        np.testing.assert_array_equal(array, processor(ROWS)[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_patches": 6}, "no multiple of the 4"),
        ({"max_patches": 0}, "no multiple of the 4"),
        ({"min_pixels": 9, "max_pixels": 8}, "no range"),
        ({"min_pixels": 0}, "no range"),
        ({"max_tokens": 34}, "max_tokens=34 is below"),
    ],
)
def test_settings_that_leave_no_room_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        _processor(**changes)


def test_a_tokenizer_and_a_model_that_disagree_are_an_error():
    other = CONFIG.replace(image_token_id=7)
    sizes = RowSizes(max_tokens=64, max_patches=64, min_pixels=1, max_pixels=4096)
    with pytest.raises(UserError, match=r"image_token_id is \d+ and the model's 7"):
        Processor(TOKENIZER, other, sizes)


def test_marks_that_a_tokenizer_does_not_call_special_cannot_be_forged_either():
    state = TOKENIZER.to_str().replace('"special": true', '"special": false')
    state = state.replace('"special":true', '"special":false')
    sizes = RowSizes(max_tokens=64, max_patches=64, min_pixels=1, max_pixels=4096)
    batch = Processor(type(TOKENIZER).from_str(state), CONFIG, sizes)([Row("<|image_pad|>")])
    assert (batch["tokens"] != IDS["image_token_id"]).all()


def test_it_runs_without_torch_and_workers_start_without_transformers():
    code = """
        import sys
        sys.modules["torch"] = sys.modules["torchvision"] = None
        import afmrl_jax.data.processor
        assert not {"jax", "transformers"} & set(sys.modules), "a worker would wait for these"
        from PIL import Image
        from afmrl_jax.data.processor import Processor, Row, RowSizes
        from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
        from afmrl_jax.models.presets import preset
        tokenizer = train_tokenizer(["navy"], 280)
        config = preset("tiny").replace(**special_token_ids(tokenizer))
        sizes = RowSizes(max_tokens=64, max_patches=64, min_pixels=1, max_pixels=4096)
        batch = Processor(tokenizer, config, sizes)([Row("v", (Image.new("RGB", (32, 32)),))])
        assert batch["patch_segments"].sum() == 16
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
