import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    clean_text,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
)
from afmrl_jax.models.presets import preset

TEXTS = [
    "navy blue dress, v-neck, size 38",
    "Robe bleu marine à col en V",
    "navy blue shirt 38",
] * 4


def _shared(*parts: str) -> Path:
    path = Path(__file__).resolve().parents[2].joinpath("..", "shared", *parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    for source in (
        _shared("qwen", "tokenizer", "vocab.json"),
        _shared("qwen", "tokenizer", "merges.txt"),
        _shared("qwen", "qwen2_vl_7b", "tokenizer_config.json"),
    ):
        shutil.copy(source, folder)
    return folder


def test_a_trained_tokenizer_is_equal_for_equal_texts():
    first, second = train_tokenizer(TEXTS, 300), train_tokenizer(iter(TEXTS), 300)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 300


def test_a_trained_tokenizer_gives_back_any_text_in_its_normal_form():
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in ("navy blue", "e\u0301te\u0301 · 連衣裙 👗\n\ttab  spaces", "a\0b", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == tokenizer.normalizer.normalize_str(
            text
        )
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_a_trained_tokenizer_has_every_special_token_as_one_token_and_learns_none_from_text():
    tokenizer = train_tokenizer(["<|image_pad|><|endoftext|>"] * 50, 400)
    for name in SPECIAL_TOKENS:
        assert tokenizer.encode(name).ids == [tokenizer.token_to_id(name)]
    tokenizer.encode_special_tokens = True
    special = {tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    assert not special & set(tokenizer.encode("".join(SPECIAL_TOKENS)).ids)


def test_hostile_texts_do_not_stop_training():
    tokenizer = train_tokenizer(["lone \ud800 surrogate", "nul \0", "\udc00\ud800", ""], 280)
    assert tokenizer.decode(tokenizer.encode("nul \0").ids) == "nul \0"


def test_surrogate_pairs_are_joined_and_lone_ones_replaced():
    assert clean_text("a\ud83d\udc57b\ud83dc") == "a👗b\ufffdc"
    assert clean_text("\ufeffbom\0") == "\ufeffbom\0"


def test_a_vocabulary_too_small_for_the_bytes_is_an_error():
    with pytest.raises(UserError, match="vocab_size=269 is below 270"):
        train_tokenizer(TEXTS, 269)
    assert train_tokenizer(TEXTS, 270).get_vocab_size() == 270


def test_a_tokenizer_survives_saving_and_loading(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(path).to_str() == tokenizer.to_str()


def test_special_ids_are_the_fields_of_a_model_configuration():
    tokenizer = train_tokenizer(TEXTS, 300)
    config = preset("tiny").replace(
        vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
    )
    assert tokenizer.id_to_token(config.image_token_id) == "<|image_pad|>"
    assert tokenizer.id_to_token(config.eos_token_id) == "<|im_end|>"
    assert tokenizer.id_to_token(config.pad_token_id) == "<|endoftext|>"


def test_a_tokenizer_of_another_family_is_named_as_the_mistake():
    with pytest.raises(UserError, match=r"has no <\|image_pad\|>, <\|vision_start\|>"):
        special_token_ids(Tokenizer(BPE()))


def test_a_folder_without_a_tokenizer_and_a_broken_one_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_the_real_tokenizer_loads_from_its_folder_with_the_published_ids(qwen_folder):
    tokenizer = load_tokenizer(qwen_folder)
    config = preset("qwen2_vl_7b")
    assert config == config.replace(**special_token_ids(tokenizer))


def test_a_prompt_tokenises_as_transformers_does(qwen_folder):
    from transformers import AutoTokenizer

    real, ours = AutoTokenizer.from_pretrained(qwen_folder), load_tokenizer(qwen_folder)
    # The published ids of Qwen's own example prompt: the reference itself must be right.
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe this image."
    published = [151644, 872, 198, 151652, 151655, 151653, 74785, 419, 2168, 13]
    assert real(prompt)["input_ids"] == published
    for text in (prompt, "Robe bleu marine à col en V, 38€ 連衣裙 👗", "x" * 300, "a\r\n\n  b\t"):
        assert ours.encode(text, add_special_tokens=False).ids == real(text)["input_ids"]


def test_a_small_tokenizer_splits_words_where_the_real_one_does(qwen_folder):
    real, small = load_tokenizer(qwen_folder), train_tokenizer(TEXTS, 300)
    text = "We'LL ship 38 navy-blue dresses\r\n\n  now!! 連衣裙, été"
    assert small.normalizer.normalize_str(text) == real.normalizer.normalize_str(text)
    assert small.pre_tokenizer.pre_tokenize_str(text) == real.pre_tokenizer.pre_tokenize_str(text)
