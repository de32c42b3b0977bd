"""A model as a folder that transformers, vLLM and sentence-transformers read."""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.options import DTYPES, sections
from afmrl_jax.assembly.pretrained import RECORD, Pretrained
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.types import Params
from afmrl_jax.data.images import IMAGE_STATISTICS
from afmrl_jax.data.processor import Processor
from afmrl_jax.data.prompts import CHATML
from afmrl_jax.data.tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS
from afmrl_jax.weights import hf_weights

NOT_JUDGED = "This model was not judged by the run that trained it."

CARD = """\
---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [sentence-transformers, feature-extraction, image-text, product-retrieval, {architecture}]
---

# Product embeddings

A {architecture} model trained by afmrl_jax so that listings of the identical product lie close
together: text, images or both become {size} numbers of length one, compared by their cosine.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=True)  # runs its .py files
model.encode([{{"text": "Navy dress", "image": "photo.jpg"}}, "red mug", {{"image": "photo.jpg"}}])
```

Several images a row are a list. {use}

## Evaluation

{evaluation}

## Training configuration

{fence}json
{config}
{fence}
"""


GENERATOR_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [image-text-to-text, product-attributes, {architecture}]
---

# Product attributes

A {architecture} model trained by afmrl_jax to answer a listing's photos and text with its key
attributes, as "name: value; name: value".

```python
from transformers import AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

rows = get_class_from_dynamic_module("listing_rows.ListingRows", "FOLDER").load("FOLDER")
model = AutoModelForImageTextToText.from_pretrained("FOLDER")
listing = {{"text": "Title\\nCategory\\nDescription", "image": ["front.jpg", "back.jpg"]}}
inputs = rows.inputs([listing])  # runs listing_rows.py of the folder
answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(rows.tokenizer.decode_batch(answers.tolist(), skip_special_tokens=True))
```

So asked, a listing looks as it did in training. It takes at most {max_tokens} tokens: its photos
share {windows} squares of {side} x {side} pixels, each a token, none of them over {max_pixels}
pixels; what a small one leaves the larger ones divide. The chat's turns come next, and the text has
the rest: a longer one loses its end. An answer has at most {max_answer} tokens.

transformers' own processor, and what stands on it (vLLM, pipelines), makes a row of the same sizes
of *one* photo and a text that fits. To several photos it gives {windows} squares *each*, and it
cuts no text: the model has seen no such rows.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER")  # needs torchvision, for videos
model = AutoModelForImageTextToText.from_pretrained("FOLDER")
text = "Title\\nCategory\\nDescription"
content = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": text}}]
chat = [{{"role": "user", "content": content}}]
{system}inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

afmrl_jax reads the answers (`afmrl_jax.attributes.text.parse`), or has the folder write those of a
catalogue: `--config=configs/annotate.py --config.generator=FOLDER`.

## Evaluation

{evaluation}

## Training configuration

{fence}json
{config}
{fence}
"""


SYSTEM = """\
instruction = {instruction}
chat.insert(0, {{"role": "system", "content": [{{"type": "text", "text": instruction}}]}})
"""


HEAD = "`transformers.AutoModelForImageTextToText.from_pretrained` loads the whole model."


NO_HEAD = (
    "The model has no language head, which an embedder neither trains nor uses: load it with "
    "`transformers.AutoModel.from_pretrained`."
)


def write_folder(
    folder: Path,
    model: Encoder | Generator,
    params: Params,
    source: Pretrained,
    *,
    dtype: str = "float32",
    evaluation: str = "",
) -> None:
    """Writes all files of an export.

    params: of the model. dtype: of the written weights. evaluation: for the model card, in
    Markdown; "" where the run did not judge the model.
    """
    config, answers = model.model_config, isinstance(model, Generator)
    hf_weights.save(folder, params, config, dtype=DTYPES[dtype])
    head = answers or config.tie_embeddings
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described["dtype"] = dtype
    if head:
        generation = {
            "eos_token_id": list(config.end_token_ids),
            "pad_token_id": config.pad_token_id,
        }
        if answers:
            sampling = model.sampling(temperature=0)
            generation |= {
                "do_sample": False,
                "max_new_tokens": sampling.max_new_tokens,
                "suppress_tokens": list(sampling.forbidden),
            }
        _write_json(folder / "generation_config.json", generation)
    else:
        described["architectures"] = [
            name.replace("ForConditionalGeneration", "Model") for name in described["architectures"]
        ]
    _write_json(folder / "config.json", described)
    _write_tokenizer(folder, model)
    _write_processor(folder, model)
    if answers:
        for name in ("core.pixels", "assembly.listing_rows"):
            _copy_module(folder, name)
        _write_json(folder / "listing_rows.json", _rows(model))
    else:
        _write_sentence_transformers(folder, model)
    described = configuration(model, source)
    record = {
        "kind": model.kind,
        "config": described,
        "step": source.step,
        "evaluation": source.evaluation,
    }
    _write_json(folder / RECORD, record)
    write_card = functools.partial(model_card, head=head) if not answers else generator_card
    card = write_card(model, described, evaluation)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_processor(model: Encoder | Generator) -> Processor:
    """The processor of the model's rows. Raises UserError where their sizes do not fit it."""
    return model.processor(answers=False) if isinstance(model, Generator) else model.processor()


def _write_tokenizer(folder: Path, model: Encoder | Generator) -> None:
    processor, answer = check_processor(model), 0
    if isinstance(model, Generator):
        answer = model.options.rows.max_answer
    model.tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if processor.pad_left else "right",
        "model_max_length": model.options.rows.max_tokens + answer,
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    _write_json(folder / "tokenizer_config.json", described)
    template = model.chat_template or CHATML
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_processor(folder: Path, model: Encoder | Generator) -> None:
    """Writes the settings of transformers' image processor, which equals ours for one image."""
    rows, vision = model.options.rows, model.model_config.vision
    most = min(rows.max_pixels, _windows(model) * _side(model) ** 2)
    mean, std = IMAGE_STATISTICS[model.model_config.architecture]
    described = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": min(rows.min_pixels, most), "longest_edge": most},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }
    _write_json(folder / "preprocessor_config.json", described)


def _write_sentence_transformers(folder: Path, model: Encoder) -> None:
    """Writes the modules: ours, with its files, then the library's pooling and normalising."""
    for name in ("core.pixels", "assembly.listing_rows", "assembly.sentence_encoder"):
        _copy_module(folder, name)
    library = "sentence_transformers.sentence_transformer.modules"
    modules = [
        ("", "sentence_encoder.SentenceEncoder"),
        ("1_Pooling", f"{library}.Pooling"),
        ("2_Normalize", f"{library}.Normalize"),
    ]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": module}
        for i, (path, module) in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listed)
    described = {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
        "requirements": {"sentence_transformers": ">=6.0", "transformers": ">=5.17"},
    }
    _write_json(folder / "config_sentence_transformers.json", described)
    described = _rows(model) | {"embedding_dim": model.options.model.embedding_dim}
    _write_json(folder / "sentence_bert_config.json", described)
    pooling = {"embedding_dimension": _size(model), "pooling_mode": "lasttoken"}
    for name, content in (("1_Pooling", pooling), ("2_Normalize", {})):
        (folder / name).mkdir()
        _write_json(folder / name / "config.json", content)


def _frames(model: Encoder | Generator, processor: Processor) -> dict[str, Any]:
    """The prompt's tokens without and with an image, and the ids that each further image adds."""
    frames = [processor.prompt.frame(n, processor.tokenizer) for n in range(4)]
    heads = [frame.head for frame in frames]
    place = heads[1].index(model.model_config.image_token_id) + 2  # behind <|vision_end|>
    added = heads[2][place : place + len(heads[2]) - len(heads[1])]
    for n in (2, 3):
        repeated = heads[1][:place] + added * (n - 1) + heads[1][place:]
        if frames[n] != dataclasses.replace(frames[1], head=repeated):
            raise UserError(
                "the model's chat template does not write each image alike, which an exported "
                "folder cannot be told: use a template without numbers of images"
            )
    named = {name: dataclasses.asdict(frame) for name, frame in zip(("text", "image"), frames)}
    return {"frames": named, "more_images": {"ids": added, "place": place}}


def model_card(encoder: Encoder, config: Mapping[str, Any], evaluation: str, *, head: bool) -> str:
    """The README.md of an encoder.

    config: as `configuration` gives it. head: whether the folder has a language head.
    """
    return CARD.format(
        architecture=encoder.model_config.architecture,
        size=_size(encoder),
        use=HEAD if head else NO_HEAD,
        evaluation=evaluation or NOT_JUDGED,
        **_quoted(config),
    )


def generator_card(generator: Generator, config: Mapping[str, Any], evaluation: str) -> str:
    """The README.md of a generator, which shows how to prompt it as in training."""
    rows = generator.options.rows
    return GENERATOR_CARD.format(
        architecture=generator.model_config.architecture,
        system=SYSTEM.format(instruction=json.dumps(rows.instruction)) if rows.instruction else "",
        evaluation=evaluation or NOT_JUDGED,
        windows=_windows(generator),
        side=_side(generator),
        max_tokens=rows.max_tokens,
        max_pixels=rows.max_pixels,
        max_answer=rows.max_answer,
        **_quoted(config),
    )


def _quoted(config: Mapping[str, Any]) -> dict[str, str]:
    """The configuration for a card, and a fence of more backticks than it holds."""
    text = json.dumps(config, indent=2)
    ticks = max(map(len, re.findall("`+", text)), default=0)
    return {"config": text, "fence": "`" * max(3, ticks + 1)}


def configuration(model: Encoder | Generator, source: Pretrained) -> dict[str, Any]:
    """The run's configuration, or the options of a model without a run; without data.cache_dir, a
    folder of one machine."""
    config = dict(source.config or sections(model.options))
    config["data"] = {name: x for name, x in config["data"].items() if name != "cache_dir"}
    return config


def _size(model: Encoder) -> int:
    return model.options.model.embedding_dim or model.model_config.text.hidden_size


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_module(folder: Path, name: str) -> None:
    """Copies a module of ours into a folder, where the module that it imports lies beside it."""
    source = Path(importlib.util.find_spec(f"afmrl_jax.{name}").origin)
    text = source.read_text(encoding="utf-8").replace("from afmrl_jax.core.", "from .")
    (folder / source.name).write_text(text, encoding="utf-8")


def _rows(model: Encoder | Generator) -> dict[str, Any]:
    """How rows are made, as `assembly.listing_rows.ListingRows` takes it."""
    processor, rows = check_processor(model), model.options.rows
    sizes = {
        "max_tokens": rows.max_tokens,
        "max_patches": rows.max_patches,
        "min_pixels": rows.min_pixels,
        "max_pixels": rows.max_pixels,
        "pad_left": processor.pad_left,
    }
    return sizes | _frames(model, processor)


def _windows(model: Encoder | Generator) -> int:
    """Merge windows, each a token, that a row's images share."""
    return model.options.rows.max_patches // model.model_config.vision.merge_size**2


def _side(model: Encoder | Generator) -> int:
    """Pixels of a merge window's side."""
    return model.model_config.vision.patch_size * model.model_config.vision.merge_size
