"""What export writes is judged by those who read it: transformers and sentence-transformers."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from afmrl_jax.assembly.folder import model_card, write_folder
from afmrl_jax.assembly.pretrained import RECORD, Pretrained, find_pretrained
from afmrl_jax.catalog.validation import read_image
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Row
from afmrl_jax.data.tokenizer import special_token_ids
from afmrl_jax.models.presets import preset
from afmrl_jax.models.qwen_vl import QwenVL


def load(path):
    """An encoder, its parameters, and a function from rows to embeddings."""
    source = find_pretrained(str(path))
    enc = source.model
    params = source.load(jax.eval_shape(lambda: enc.init_params(0)))
    processor, embed = enc.processor(), jax.jit(enc.embed())
    return enc, params, lambda rows: np.asarray(embed(params, processor(rows)))


def photo(width, height, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


ROWS = [
    Row("red mug with <|image_pad|> and Ünïcode \ud800", (photo(50, 34, 0),)),
    Row("two photos " * 30, (photo(64, 64, 1), photo(20, 90, 2))),
    Row("", (photo(28, 28, 3),)),
    Row("no photo at all"),
    Row("", (photo(400, 1, 4), photo(9, 9, 5), photo(300, 200, 6))),
]


def check_cosines(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    theirs = model.encode([{"text": r.text, "image": list(r.images)} for r in ROWS], batch_size=3)
    ours = load(folder)[2](ROWS)
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, rtol=1e-5)
    assert (theirs * ours).sum(axis=1).min() >= 0.9999
    assert (ours @ ours.T - np.eye(len(ROWS))).max() < 0.999  # rows differ, so this means something
    return model, theirs


def test_sentence_transformers_embeds_images_and_texts_as_we_do(exported, tmp_path):
    model, embedded = check_cosines(exported)
    assert embedded.shape == (len(ROWS), model.get_embedding_dimension())
    plain = model.encode(["no photo at all", photo(28, 28, 3)])  # its own forms of one part
    np.testing.assert_allclose(plain, embedded[[3, 2]], atol=1e-4)
    # A file is shown to it as training saw it: here turned, and of 16 bits, not black or white.
    grey, exif = np.random.default_rng(3).integers(0, 1 << 16, (30, 40), np.uint16), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "grey.png", exif=exif)
    seen = read_image(str(tmp_path / "grey.png"), "grey.png")
    by_file, by_pixels = model.encode([str(tmp_path / "grey.png"), seen])
    assert seen.size == (30, 40) and by_file @ by_pixels >= 0.9999


def test_max_seq_length_bounds_rows_with_their_images_and_is_kept(exported, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")
    enc = load(exported)[0]
    sizes = enc.options.rows
    least = sizes.max_patches // 4 + 3  # an image's marks and <|endoftext|> stand around it
    assert model.max_seq_length == sizes.max_tokens > least + 4
    model.max_seq_length = np.int64(least + 4)
    sizes = dataclasses.replace(sizes, max_tokens=least + 4)
    short = dataclasses.replace(enc, options=dataclasses.replace(enc.options, rows=sizes))
    rows = [Row("two photos " * 30, (photo(64, 64, 1), photo(20, 90, 2))), Row("no photo " * 30)]
    ours = short.processor()(rows)
    inputs = [{"text": r.text, "image": list(r.images)} if r.images else r.text for r in rows]
    theirs = model.preprocess(inputs)
    assert theirs["input_ids"].shape[1] == ours["token_mask"].sum(axis=1).max() == least + 4
    for i, mask in enumerate(ours["token_mask"]):
        kept = theirs["attention_mask"][i].bool()
        assert theirs["input_ids"][i][kept].tolist() == ours["tokens"][i][mask].tolist()

    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert again.max_seq_length == least + 4
    np.testing.assert_array_equal(again.encode(inputs), model.encode(inputs))

    for wrong in (least - 1, 0, -1, None, 64.0, "64", True):
        with pytest.raises(ValueError, match=f"expected a whole number of at least {least}"):
            model.max_seq_length = wrong
    assert model.max_seq_length == least + 4


def test_what_the_encoder_does_not_read_is_refused(exported):
    from sentence_transformers import SentenceTransformer

    def model(**options):
        return SentenceTransformer(
            str(exported), trust_remote_code=True, device="cpu", processor_kwargs=options
        )

    fewer = model(model_max_length=60, max_pixels=1024)
    assert fewer.max_seq_length == 60
    assert fewer.preprocess([photo(300, 200, 6)])["image_grid_thw"].tolist() == [[1, 2, 4]]
    with pytest.raises(ValueError, match="do_resize: this model's rows are made as in training"):
        model(do_resize=False)
    with pytest.raises(ValueError, match=r"set model\.max_seq_length"):
        fewer.encode(["mug"], processing_kwargs={"text": {"max_length": 8}})
    for pixels in (np.zeros((9, 9, 3)), np.zeros((3, 9, 9), np.uint8), np.zeros((9, 9), bool)):
        with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
            fewer.encode([{"image": pixels}])


def test_any_folder_is_exported_with_an_instruction_and_fewer_numbers(
    exported, run_export, tmp_path
):
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    (bare / RECORD).unlink()
    fields = {
        "model.dtype": "float32",
        "model.embedding_dim": 24,
        "data.prompt": "chat",
        "data.instruction": "Find ```this``` product:",
        "data.max_tokens": 64,
        "data.max_patches": 32,
        "data.max_pixels": 2048,
        "data.min_pixels": 512,
    }
    run_export(bare, tmp_path / "out", **fields)
    _, embedded = check_cosines(tmp_path / "out")
    assert embedded.shape == (len(ROWS), 24)
    a, b = (folder / "model.safetensors" for folder in (bare, tmp_path / "out"))
    assert a.read_bytes() == b.read_bytes()


def torch_inputs(enc, rows):
    """transformers' inputs of our processor's rows."""
    batch, side = enc.processor()(rows), enc.model_config.vision.merge_size
    patches, grids = [], []
    for i, row in enumerate(rows):
        for number in range(1, len(row.images) + 1):
            mine = batch["patch_segments"][i] == number
            patches.append(batch["patches"][i][mine])
            grids.append([1, *(batch["patch_positions"][i][mine].max(axis=0) + 1)])
    assert side == 2
    tokens = torch.tensor(batch["tokens"]).long()
    return batch, {
        "input_ids": tokens,
        "attention_mask": torch.tensor(batch["token_mask"]).long(),
        "mm_token_type_ids": (tokens == enc.model_config.image_token_id).long(),
        "pixel_values": torch.tensor(np.concatenate(patches)),
        "image_grid_thw": torch.tensor(np.array(grids)),
    }


NO_KEYS = {kind: set() for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def keys_told(info):
    return {kind: set(info[kind]) for kind in NO_KEYS}


def whole_model(folder):
    """transformers' model with its language head, of which nothing is missing or left over."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert keys_told(info) == NO_KEYS
    return model


def test_transformers_computes_equal_logits_from_the_folder(exported):
    enc, params, _ = load(exported)
    model = whole_model(exported)
    batch, inputs = torch_inputs(enc, ROWS[:2])
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()

    @jax.jit
    def logits(params, batch):
        backbone = nnx.merge(graphdef, params)
        return backbone.logits(backbone(batch))

    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: QwenVL(enc.model_config, rngs=nnx.Rngs(0), dtype="float32"))
    )
    ours = np.asarray(logits(params["backbone"], batch))
    real = batch["token_mask"]
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_qwen2_5", "tiny_qwen3"])
def test_the_other_families_are_read_alike(exported, tmp_path, name):
    enc, _, _ = load(exported)
    vocabulary = special_token_ids(enc.tokenizer) | {"vocab_size": enc.model_config.vocab_size}
    enc = dataclasses.replace(enc, model_config=preset(name).replace(**vocabulary))
    source = Pretrained(enc, load=None, label="", path="")
    write_folder(tmp_path / "out", enc, jax.jit(lambda: enc.init_params(1))(), source)
    check_cosines(tmp_path / "out")
    whole_model(tmp_path / "out")


def test_a_model_without_a_head_loads_as_the_bare_model(exported, tmp_path):
    from transformers import AutoConfig, AutoModel

    enc, params, _ = load(exported)
    config = enc.model_config.replace(tie_embeddings=False)
    enc = dataclasses.replace(enc, model_config=config)
    source = Pretrained(enc, load=None, label="", path="")
    write_folder(tmp_path / "out", enc, params, source)
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures[0].endswith("Model")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert keys_told(info) == NO_KEYS
    assert "no language head" in (tmp_path / "out" / "README.md").read_text()
    _, inputs = torch_inputs(enc, ROWS[:1])
    whole = AutoModel.from_pretrained(exported)
    with torch.no_grad():
        states = [m(**inputs).last_hidden_state for m in (model, whole)]
    assert torch.equal(*states)


def test_transformers_reads_the_tokenizer_and_the_chat_template(exported):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(exported), load(exported)[0].tokenizer
    for text in ("Navy dress, size 38!", "  Ünïcode\n\n 12345 don't ", "<|im_end|> 猫"):
        assert theirs(text).input_ids == ours.encode(text, add_special_tokens=False).ids
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    told = theirs.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert told == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_only_an_export_is_ever_replaced(exported, whole, run_export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"mine exists and is no folder that export wrote"):
        run_export(whole, tmp_path / "mine")
    with pytest.raises(UserError, match=r"thesis.txt exists"):
        run_export(whole, tmp_path / "mine" / "thesis.txt")
    shutil.copytree(exported, tmp_path / "again")
    (tmp_path / "again" / "left_over.json").write_text("{}")
    run_export(whole, tmp_path / "again")
    assert not (tmp_path / "again" / "left_over.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "mine"]


def test_the_model_card_quotes_without_breaking(exported, whole):
    card = (exported / "README.md").read_text()
    results = json.loads((whole / "evaluation.json").read_text())
    assert "cache_dir" not in card
    enc, _, _ = load(exported)
    for task, scores in results.items():
        assert f"| {task}" in card and f"{scores['mrr']:.3f}" in card
    config = {"data": {}, "note": "````\n# Not a heading"}
    card = model_card(enc, config, "", head=True)
    assert card.endswith("\n`````\n") and "\n# Not a heading" not in card
    assert "was not judged" in card
