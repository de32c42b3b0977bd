"""What ends an answer and what pads a row: one truth for training, sampler, masks and exports."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.options import Computation, GeneratorOptions, GeneratorRows
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Row
from afmrl_jax.data.prompts import CHATML
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset

TOKENIZER = train_tokenizer(["system user assistant color: blue"] * 4, 300)
IDS = special_token_ids(TOKENIZER)
SIZE = TOKENIZER.get_vocab_size()
END, PAD = IDS["eos_token_id"], IDS["pad_token_id"]
OTHER, VISION = (TOKENIZER.token_to_id(name) for name in ("<|box_end|>", "<|vision_pad|>"))
SIZES = {"max_tokens": 64, "max_patches": 16, "min_pixels": 1, "max_pixels": 4096}
OPTIONS = GeneratorOptions(
    Computation("float32"), GeneratorRows(instruction="", max_answer=8, **SIZES)
)


@pytest.fixture
def folder(tmp_path):
    """A function that writes a model's folder, without weights, with these contents changed."""

    def write(template=CHATML, **files):
        config = preset("tiny").replace(vocab_size=SIZE, **IDS).to_hf()
        contents = {
            "config": config,
            "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        }
        for name in {**contents, **files}:
            content = contents.get(name, {}) | files.get(name, {})
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        TOKENIZER.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return write


def last_learned(generator):
    """The token with which training ends an answer."""
    batch = generator.processor(answers=True)([Row("blue", (), "color: blue")])
    return int(batch["tokens"][0][batch["answer_mask"][0]][-1])


@pytest.mark.parametrize(
    ("files", "others"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": OTHER, "pad_token_id": OTHER}}, (OTHER,)),
        ({"config": {"eos_token_id": [PAD, END, OTHER]}}, (OTHER,)),
        ({"config": {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}}, ()),
        ({"generation_config": {"eos_token_id": [PAD, OTHER]}}, (OTHER,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|box_end|>"}}}, (OTHER,)),
        ({"special_tokens_map": {"eos_token": "<|box_end|>"}}, (OTHER,)),
        ({"config": {"pad_token_id": VISION}, "tokenizer_config": {"pad_token": None}}, ()),
    ],
)
def test_the_sampler_stops_at_what_training_writes_and_at_all_that_a_folder_names(
    folder, files, others
):
    generator = Generator.from_folder(OPTIONS, folder(**files))
    sampling = generator.sampling(temperature=0)
    assert last_learned(generator) == generator.model_config.eos_token_id == END
    assert sampling.stop == (END, PAD, *others) and sampling.pad == PAD
    again = Generator.from_record(OPTIONS, generator.record())
    assert again.model_config == generator.model_config


def test_an_end_token_inside_text_config_counts_as_one_beside_it(folder):
    config = preset("tiny_qwen3").replace(vocab_size=SIZE, **IDS).to_hf()
    config["text_config"] |= {"eos_token_id": [END, OTHER], "pad_token_id": None}
    path = folder()
    (path / "config.json").write_text(json.dumps(config))
    assert Generator.from_folder(OPTIONS, path).sampling().stop == (END, PAD, OTHER)


def test_answers_end_as_the_chat_template_ends_a_turn(folder):
    template = CHATML.replace("<|im_end|>\\n", "<|box_end|>\\n")
    generator = Generator.from_folder(OPTIONS, folder(template))
    assert last_learned(generator) == OTHER
    assert generator.sampling().stop == (OTHER, PAD, END)


def test_a_pad_of_images_is_told_and_never_used(folder, caplog):
    caplog.set_level(logging.INFO, "afmrl_jax")
    path = folder(config={"pad_token_id": VISION})
    batch = Generator.from_folder(OPTIONS, path).processor(answers=False)([Row("blue")])
    assert (batch["tokens"][~batch["token_mask"]] == PAD).all()
    assert f"{path}: config.json pads with token {VISION}, which is not used" in caplog.text


@pytest.mark.parametrize("kind", [Encoder, Generator])
@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config": {"eos_token_id": 151645}}, "config.json: eos_token_id is 151645, no special"),
        ({"config": {"eos_token_id": 3}}, "config.json: eos_token_id is 3, no special token"),
        ({"config": {"eos_token_id": -1}}, "config.json: eos_token_id is -1, no special token"),
        (
            {"generation_config": {"eos_token_id": [END, VISION]}},
            rf"generation_config.json: eos_token_id is {VISION}, <\|vision_pad\|>",
        ),
        ({"tokenizer_config": {"eos_token": "<|stop|>"}}, r"eos_token is '<\|stop\|>', no special"),
        ({"config": {"image_token_id": OTHER}}, f"image_token_id is .* and the model's {OTHER}"),
        ({"config": {"vocab_size": SIZE - 1}}, rf"last token is {SIZE - 1}, '<\|video_pad\|>'"),
    ],
)
def test_special_tokens_that_cannot_be_right_are_refused_when_a_folder_is_opened(
    folder, files, told, kind
):
    path = folder(**files)
    with pytest.raises(UserError, match=told) as error:
        kind.from_folder(None, path)
    assert str(error.value).startswith(str(path))


def test_a_published_model_ends_answers_at_its_generation_config_s_tokens(tmp_path):
    published = Path(__file__).resolve().parents[2].joinpath("..", "shared", "qwen")
    if not published.exists():
        pytest.skip(f"{published} is not here")
    for source in (published / "tokenizer", published / "qwen2_5_vl_7b"):
        for path in source.iterdir():
            shutil.copy(path, tmp_path)
    config = Generator.from_folder(OPTIONS, tmp_path).model_config
    assert config.end_token_ids == (151645, 151643)
    assert config.to_hf()["eos_token_id"] == 151645
