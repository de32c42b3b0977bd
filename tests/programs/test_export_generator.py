"""A generator's folder, judged by transformers' own greedy answers."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.loaded import load_generator
from afmrl_jax.assembly.pretrained import find_pretrained, model_class_of
from afmrl_jax.catalog.opening import ListingOptions, open_listings
from afmrl_jax.core.mesh import make_mesh
from afmrl_jax.data.processor import Row
from afmrl_jax.data.views import evaluation_row


@pytest.fixture(scope="module")
def folder(taught, run_export, tmp_path_factory):
    """The folder of its export."""
    run_export(taught, out := tmp_path_factory.mktemp("export") / "out")
    return out


def test_the_folder_gives_the_run_s_settings_back_and_holds_nothing_of_an_encoder(folder, taught):
    trained, found = (find_pretrained(str(path), Generator) for path in (taught, folder))
    assert model_class_of(str(folder)) is model_class_of(str(taught)) is Generator
    before = {**trained.config, "data": dict(trained.config["data"])}
    before["data"].pop("cache_dir")
    assert found.config == before and found.step == trained.step == 40
    assert found.model.options == trained.model.options
    assert found.model.model_config == trained.model.model_config
    assert found.model.chat_template == trained.model.chat_template
    assert found.model.tokenizer.to_str() == trained.model.tokenizer.to_str()
    assert find_pretrained(str(folder), Encoder).model.options is None  # as any other folder
    names = {path.name for path in folder.iterdir()}
    assert not names & {"sentence_encoder.py", "modules.json", "1_Pooling"}
    card = (folder / "README.md").read_text()
    assert "was not judged" in card and 'instruction = "color type"' in card


def torch_inputs(generator, catalog, listings):
    """Our rows of listings that have one photo each, and what transformers wants of them."""
    questions = [evaluation_row(catalog, int(i), 1) for i in listings]
    rows = generator.processor(answers=False)(questions)
    return rows, {
        "input_ids": torch.tensor(rows["tokens"]).long(),
        "attention_mask": torch.tensor(rows["token_mask"]).long(),
        "mm_token_type_ids": torch.tensor(
            rows["tokens"] == generator.model_config.image_token_id
        ).int(),
        "pixel_values": torch.tensor(rows["patches"][rows["patch_segments"] > 0]),
        "image_grid_thw": torch.tensor([(1, *grids[0]) for grids in rows["patch_grids"]]),
    }


def their_model(folder):
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_transformers_answers_greedily_as_we_do(folder, taught, agcl_config):
    from transformers import AutoTokenizer

    config = agcl_config
    catalog = open_listings(ListingOptions.of(config), folder)
    listings = np.arange(40)
    mesh = make_mesh(dict(config.mesh))
    ours, again = (
        load_generator(str(path), mesh, 40).describe(catalog, listings) for path in (taught, folder)
    )
    assert [one.answer.text for one in again] == [one.answer.text for one in ours]

    _, inputs = torch_inputs(find_pretrained(str(folder), Generator).model, catalog, listings)
    # How answers end, and that they are greedy, stands in the folder.
    answers = their_model(folder).generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert theirs == [one.answer.text for one in ours] and len(set(theirs)) > 4


def test_what_the_card_says_to_do_gives_the_prompt_that_the_generator_was_taught_with(folder):
    from transformers import AutoTokenizer

    tokenizer, generator = (
        AutoTokenizer.from_pretrained(folder),
        find_pretrained(str(folder), Generator).model,
    )
    content = [{"type": "image"}, {"type": "text", "text": "red mug"}]
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "color type"}]},
        {"role": "user", "content": content},
    ]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    frame = generator.processor(answers=False).prompt.frame(1, tokenizer.backend_tokenizer)
    text = tokenizer(frame.piece("red mug")).input_ids
    assert asked == [*frame.head, *text, *frame.tail]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The files of two photos, of which the larger has to make room for the other."""
    place, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    files = [place / "front.png", place / "back.png"]
    for file, (width, height) in zip(files, [(64, 64), (40, 20)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(file)
    return files


def test_the_card_asks_about_several_photos_and_a_long_text_as_training_did(folder, photos):
    card = (folder / "README.md").read_text()
    recipe = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    title, long = "<|im_end|>red mug", "new blue lamp " * 40
    text = repr(f"{title}\nhome\n{long}")
    recipe = recipe.replace('"Title\\nCategory\\nDescription"', text).replace("FOLDER", str(folder))
    for name, file in zip(("front.jpg", "back.jpg"), photos):
        recipe = recipe.replace(name, str(file))
    done = {}
    exec(recipe, done)

    processor = find_pretrained(str(folder), Generator).model.processor(answers=False)
    shown = tuple(Image.open(file) for file in photos)
    batch = processor([Row(f"{title}\nhome\n{long}", shown)])
    mask, theirs = batch["token_mask"][0], done["inputs"]
    assert mask.sum() == 64  # the text is cut
    assert theirs["input_ids"].tolist() == [batch["tokens"][0][mask].tolist()]
    used = batch["patch_segments"][0] > 0
    np.testing.assert_array_equal(theirs["pixel_values"], batch["patches"][0][used])
    # Of 4 windows the wide photo takes 2; no square but that of one window fits into the others.
    assert theirs["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert done["answers"].shape[1] <= 16


def test_transformers_own_processor_sees_one_photo_at_the_size_of_training(folder, photos):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    one = Image.open(photos[0]).resize((900, 1200))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(one, return_tensors="np")
    processor = find_pretrained(str(folder), Generator).model.processor(answers=False)
    batch = processor([Row("red mug", (one,))])
    used = batch["patch_segments"][0] > 0
    np.testing.assert_array_equal(theirs["pixel_values"], batch["patches"][0][used])


def test_rows_of_a_batch_end_together(folder, photos):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = get_class_from_dynamic_module("listing_rows.ListingRows", str(folder))
    listings = [{"text": "red mug", "image": str(photos[1])}, {"text": "shirt"}]
    theirs = kind.load(str(folder)).inputs(listings)
    processor = find_pretrained(str(folder), Generator).model.processor(answers=False)
    batch = processor([Row("red mug", (Image.open(photos[1]),)), Row("shirt")])
    longest = theirs["input_ids"].shape[1]
    np.testing.assert_array_equal(theirs["input_ids"], batch["tokens"][:, -longest:])
    np.testing.assert_array_equal(theirs["attention_mask"], batch["token_mask"][:, -longest:])


def test_transformers_computes_our_logits_and_knows_how_answers_end(folder, agcl_config):
    source = find_pretrained(str(folder), Generator)
    generator, graph = source.model, source.model.graph()
    catalog = open_listings(ListingOptions.of(agcl_config), folder)
    rows, inputs = torch_inputs(generator, catalog, np.arange(4))
    with torch.no_grad():
        theirs = their_model(folder)(**inputs).logits.numpy()

    @jax.jit
    def logits(params, rows):
        model = nnx.merge(graph, params)
        return model.logits(model(rows))

    params = source.load(jax.eval_shape(lambda: generator.init_params(0)))
    mask = rows["token_mask"]
    np.testing.assert_allclose(np.asarray(logits(params, rows))[mask], theirs[mask], atol=2e-4)
    described = json.loads((folder / "generation_config.json").read_text())
    assert described["max_new_tokens"] == 16 and len(described["suppress_tokens"]) == 5
    assert described["eos_token_id"] == list(generator.sampling(temperature=0).stop)
