"""The encoder for sentence-transformers: exported folders carry this file and run it themselves.

`SentenceTransformer(FOLDER, trust_remote_code=True).encode([...])` takes a text, an image, or
{"text": "...", "image": image or [image, ...]}. It needs torch, transformers, NumPy and Pillow, and
of afmrl_jax its neighbour pixels.py: rows are built as data/processor.py builds them, which tests
compare. transformers' own processor would let a text forge special tokens, cut off a long row's
end, and give each image a budget of its own where ours share the row's.

Axes: N rows · S tokens of the longest · D width of the model · E numbers kept of it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.sentence_transformer.modules import InputModule
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModel
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .pixels import upright_rgb  # a neighbour here and in exported folders

END, IMAGE = "<|endoftext|>", "<|image_pad|>"
LONGEST_ASPECT = 200  # sides further apart are resized as this
CHARACTERS_PER_TOKEN = 32  # a text is cut to so many a token before it is tokenised


class SentenceEncoder(InputModule):
    """A Qwen-VL model whose tokens' states sentence-transformers pools.

    frames: the tokens around a row's text, {"head": ids, "prefix": text, "joint": text, "tail":
    ids} for "text" alone and for an "image" (its <|image_pad|> once, repeated for its features).
    more_images: the ids that each further image adds to the head, and the place to add them.
    max_tokens, max_patches: bounds of a row. min_pixels, max_pixels: of a resized image's area.
    embedding_dim: first numbers kept of each state, 0 = all.
    """

    config_file_name = "sentence_bert_config.json"
    config_keys = [  # noqa: RUF012 as the base class has it
        "frames", "more_images", "max_tokens", "max_patches", "min_pixels", "max_pixels",
        "embedding_dim",
    ]  # fmt: skip

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        image_processor: Qwen2VLImageProcessorPil,
        **config: Any,
    ):
        super().__init__()
        self.model, self.image_processor = model, image_processor
        for key in self.config_keys:
            setattr(self, key, config[key])
        # All added tokens count as special, so that none of them can be forged by a text.
        names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.end, self.image = map(tokenizer.token_to_id, (END, IMAGE))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> "SentenceEncoder":
        """As sentence-transformers calls it: a folder, or a name on the hub."""
        hub = {"token": token, "revision": revision, "local_files_only": local_files_only}
        model = AutoModel.from_pretrained(
            model_name_or_path, cache_dir=cache_folder, **hub, **(model_kwargs or {})
        )
        images = Qwen2VLImageProcessorPil.from_pretrained(
            model_name_or_path, cache_dir=cache_folder, **hub
        )
        hub["cache_folder"] = cache_folder
        tokenizer = cls.load_file_path(model_name_or_path, "tokenizer.json", **hub)
        config = cls.load_config(model_name_or_path, **hub)
        return cls(model, Tokenizer.from_file(tokenizer), images, **config)

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        self.model.save_pretrained(output_path)
        self.tokenizer.save(str(Path(output_path) / "tokenizer.json"))
        self.image_processor.save_pretrained(output_path)
        config = json.dumps(self.get_config_dict(), indent=2)
        (Path(output_path) / self.config_file_name).write_text(config + "\n", encoding="utf-8")

    @property
    def modalities(self) -> list:
        # "message" is also what sentence-transformers calls a batch of several kinds.
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        return self.max_tokens

    def get_embedding_dimension(self) -> int:
        return self.embedding_dim or self.model.config.get_text_config().hidden_size

    def preprocess(self, inputs: list, prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """The model's inputs: input_ids, attention_mask, mm_token_type_ids int64[N, S] and, where
        there are images, pixel_values float32[patches, C] and image_grid_thw int64[images, 3]."""
        rows, patches, grids = [], [], []
        for text, images in map(_parts, inputs):
            row, sizes = self._row((prompt or "") + text, images)
            rows.append(row)
            for image, size in zip(images, sizes):
                image = image.resize(size, Image.Resampling.BICUBIC)
                done = self.image_processor(image, do_resize=False, return_tensors="pt")
                patches.append(done["pixel_values"])
                grids.append(done["image_grid_thw"])
        tokens = torch.full((len(rows), max(map(len, rows))), self.end)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        types = (tokens == self.image).long()
        features = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": types}
        if patches:
            features |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}
        return features

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds token_embeddings [N, S, E], the model's last states."""
        states = self.model(**features, use_cache=False).last_hidden_state
        return features | {"token_embeddings": states[..., : self.embedding_dim or None].float()}

    def _row(self, text: str, images: list[Image.Image]) -> tuple[list[int], list[tuple[int, int]]]:
        """One row's tokens, and the width and height to which each of its images is resized."""
        frame = self.frames["image" if images else "text"]
        head, tail, place = frame["head"], frame["tail"], self.more_images["place"]
        head = head[:place] + self.more_images["ids"] * (len(images) - 1) + head[place:]
        fixed = len(head) + len(self._encode(frame["prefix"])) + len(tail) - len(images)
        grids = self._grids(images, self.max_tokens - fixed)
        counts = iter([rows * columns for rows, columns in grids])
        head = [i for i in head for _ in range(next(counts) if i == self.image else 1)]
        text = text[: CHARACTERS_PER_TOKEN * self.max_tokens]
        ids = self._encode(frame["prefix"] + (frame["joint"] + text if text else ""))
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        row = [*head, *ids[: self.max_tokens - len(head) - len(tail)], *tail]
        return row, [(columns * factor, rows * factor) for rows, columns in grids]

    def _encode(self, text: str) -> list[int]:
        # A listing may hold "<|image_pad|>": with this set, it is split as the text that it is.
        self.tokenizer.encode_special_tokens = True
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no lone ones
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _grids(self, images: list[Image.Image], budget: int) -> list[tuple[int, int]]:
        """Rows and columns of merge windows of each image of a row, so that all fit together."""
        merge, patch = self.image_processor.merge_size, self.image_processor.patch_size
        budget = min(self.max_patches // merge**2, budget)
        if len(images) > max(budget, 0):
            raise ValueError(
                f"a row has {len(images)} images; {self.max_tokens} tokens and {self.max_patches} "
                "patches do not hold the smallest"
            )

        def grid(image: Image.Image, limit: int) -> tuple[int, int]:
            bounds = (self.min_pixels, self.max_pixels, limit)
            return window_grid(image.height, image.width, patch * merge, *bounds)

        grids = [grid(image, budget) for image in images]
        # The smallest first: what it leaves of its even share is the larger ones' to divide.
        for done, k in enumerate(sorted(range(len(images)), key=lambda k: math.prod(grids[k]))):
            grids[k] = grid(images[k], budget // (len(images) - done))
            budget -= math.prod(grids[k])
        return grids


def window_grid(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, limit: int
) -> tuple[int, int]:
    """Rows and columns of merge windows, `limit` in all, that an image is resized to."""
    max_pixels = min(max_pixels, limit * factor**2)
    min_pixels = min(min_pixels, max_pixels)
    height, width = (max(side, max(height, width) / LONGEST_ASPECT) for side in (height, width))
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    while rows * columns > limit:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


def _parts(row: Any) -> tuple[str, list[Image.Image]]:
    """Text and RGB images of one input, whichever of sentence-transformers' forms it has."""
    if infer_modality(row) == "message":
        messages = row if isinstance(row, list) else [row]
        contents = [message["content"] for message in messages]
        parts = [part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c)]
        row = {
            "text": "\n".join(part["text"] for part in parts if part.get("text")),
            "image": [part["image"] for part in parts if part.get("image") is not None],
        }
    elif not isinstance(row, dict):
        row = {infer_modality(row): row}
    if extra := row.keys() - {"text", "image"}:
        raise ValueError(f"this model embeds text and images, not {', '.join(sorted(extra))}")
    texts, images = row.get("text") or [], row.get("image")
    images = [] if images is None else images if isinstance(images, list | tuple) else [images]
    text = texts if isinstance(texts, str) else "\n".join(texts)
    return text, [_opened(image) for image in images]


def _opened(image: Any) -> Image.Image:
    """An image, an array of pixels, a path or an address, as training saw it."""
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif isinstance(image, str | Path):
        image = Image.open(image) if Path(image).is_file() else load_image(str(image))
    return upright_rgb(image)
