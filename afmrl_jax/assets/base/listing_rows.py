"""Listings to rows as in training: exported folders carry this file and run it.

`ListingRows.load(FOLDER).inputs([{"text": "...", "image": image or [image, ...]}])` makes inputs of
transformers' model. The file needs torch, transformers, NumPy and Pillow, and of afmrl_jax
pixels.py, which lies beside it. It builds the rows of data/processor.py; tests compare the two.
transformers' processor differs: it lets a text forge special tokens, cuts the end of a long row or
nothing, and gives each image a separate budget where ours share the row's.

Axes: N rows · S tokens of the longest.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from .pixels import upright_rgb  # in exported folders: .pixels

END, IMAGE = "<|endoftext|>", "<|image_pad|>"
LONGEST_ASPECT = 200  # longest side over the shortest; a narrower image is widened to it
CHARACTERS_PER_TOKEN = 32  # limit to which a text is cut before it is tokenised


class ListingRows:
    """Texts and images to the inputs of a Qwen-VL model.

    frames: the tokens around a row's text, {"head": ids, "prefix": text, "joint": text, "tail":
    ids} for "text" alone and for an "image" (its <|image_pad|> once, repeated for its features).
    more_images: the ids that each further image adds to the head, and the place to add them.
    max_tokens, max_patches: bounds of a row. min_pixels, max_pixels: bounds of a resized image's
    area. pad_left: whether rows are padded on the left, for a model that generates.
    """

    rows_file = "listing_rows.json"
    rows_keys = (
        *("frames", "more_images", "max_tokens", "max_patches", "min_pixels", "max_pixels"),
        "pad_left",
    )

    def __init__(
        self, tokenizer: Tokenizer, image_processor: Qwen2VLImageProcessorPil, **config: Any
    ):
        self.image_processor = image_processor
        for key in self.rows_keys:
            setattr(self, key, config[key])
        # All added tokens count as special, so that a text can forge none of them.
        names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.end, self.image = map(tokenizer.token_to_id, (END, IMAGE))

    @classmethod
    def load(cls, folder: str, **hub: Any) -> "ListingRows":
        """folder: an exported one, or its name on the hub; hub: options of `from_pretrained`."""
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, **hub)
        tokenizer = Tokenizer.from_file(cached_file(folder, "tokenizer.json", **hub))
        config = Path(cached_file(folder, cls.rows_file, **hub)).read_text(encoding="utf-8")
        return cls(tokenizer, images, **json.loads(config))

    def inputs(self, listings: list[dict[str, Any]], prompt: str = "") -> BatchFeature:
        """The model's inputs: input_ids, attention_mask, mm_token_type_ids int64[N, S] and, where
        there are images, pixel_values float32[patches, C] and image_grid_thw int64[images, 3].

        listings: {"text": text or texts, "image": image or images}, each of the two optional.
        prompt: precedes each text. Raises ValueError for what is neither text nor image.
        """
        rows, patches, grids = [], [], []
        for text, images in map(_text_and_images, listings):
            row, sizes = self._row(prompt + text, images)
            rows.append(row)
            for image, size in zip(images, sizes):
                image = image.resize(size, Image.Resampling.BICUBIC)
                done = self.image_processor(image, do_resize=False, return_tensors="pt")
                patches.append(done["pixel_values"])
                grids.append(done["image_grid_thw"])
        tokens = torch.full((len(rows), max(map(len, rows))), self.end)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            place = slice(-len(row), None) if self.pad_left else slice(len(row))
            tokens[i, place], mask[i, place] = torch.tensor(row), 1
        types = (tokens == self.image).long()
        features = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": types}
        if patches:
            features |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}
        return BatchFeature(features)

    @property
    def least_tokens(self) -> int:
        """Tokens of a row with the prompt and images of max_patches, without text."""
        frame = self.frames["image"]
        fixed = len(frame["head"]) + len(self._encode(frame["prefix"])) + len(frame["tail"]) - 1
        return fixed + self.max_patches // self.image_processor.merge_size**2

    def _row(self, text: str, images: list[Image.Image]) -> tuple[list[int], list[tuple[int, int]]]:
        """A row's tokens, and the width and height to which each of its images is resized."""
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
        # A listing may hold "<|image_pad|>": with this set, it is tokenised as plain text.
        self.tokenizer.encode_special_tokens = True
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates
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
        # The smallest image first: the larger ones divide the rest of its even share.
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


def _text_and_images(listing: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    """Text and RGB images of a listing. Raises ValueError for other keys."""
    if extra := listing.keys() - {"text", "image"}:
        raise ValueError(f"this model reads text and images, not {', '.join(sorted(extra))}")
    texts, images = listing.get("text") or [], listing.get("image")
    images = [] if images is None else images if isinstance(images, list | tuple) else [images]
    text = texts if isinstance(texts, str) else "\n".join(texts)
    return text, [_opened(image) for image in images]


def _opened(image: Any) -> Image.Image:
    """An image, an array of pixels, a path or an address, as training saw it."""
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or image.shape[2:] in [(3,), (4,)]):
            raise ValueError(
                f"an image is an array of {image.dtype} {list(image.shape)}: expected uint8 "
                "[height, width, 3], levels from 0 to 255"
            )
        image = Image.fromarray(image)
    elif isinstance(image, str | Path):
        image = Image.open(image) if Path(image).is_file() else load_image(str(image))
    return upright_rgb(image)
