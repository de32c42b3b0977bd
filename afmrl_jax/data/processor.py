"""Turns texts and photos into the embedder's static arrays; the model's ragged work is done here.

A row is, in tokens: for each image <|vision_start|> <|image_pad|> × n <|vision_end|>, then the
instruction and the text, then <|endoftext|>, on which the embedder pools. Its images lie one after
another in the patches, each in the order of the vision tower: merge window by merge window.

Axes: N rows · S tokens (max_tokens) · P patches (max_patches) · C = 3 · temporal patch · patch²
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.tokenizer import clean_text, special_token_ids
from afmrl_jax.models.config import QwenVLConfig

# Qwen2-VL's processor refuses images longer than this; a training run only squeezes them to it.
_LONGEST_ASPECT = 200
# A text is cut to so many characters a token before it is tokenised: a megabyte of description
# would cost more than the rest of its batch, and tokens this long do not occur in language.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Row:
    """What one embedding is made of: a text (may be empty) and RGB images (may be none)."""

    text: str
    images: tuple[Image.Image, ...] = ()


class Processor:
    """Rows to arrays of fixed shapes; pure, picklable, without JAX or torch.

    max_tokens, max_patches: the size of every row. Images that do not fit are resized until all of
    a row's do, sharing the budget fairly; the text is cut from its end.
    min_pixels, max_pixels: bounds on a resized image's area, as in Qwen2-VL's processor.
    instruction: stands before every row's text, a line of its own.
    Raises UserError where these leave no room for an image or do not fit the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: QwenVLConfig,
        *,
        max_tokens: int,
        max_patches: int,
        min_pixels: int,
        max_pixels: int,
        instruction: str = "",
    ):
        # A copy, since the settings below would change every other use of the caller's tokenizer.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.max_tokens, self.max_patches = max_tokens, max_patches
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.instruction = clean_text(instruction)
        self.patch_size, self.merge_size = config.vision.patch_size, config.vision.merge_size
        self.temporal_patch_size = config.vision.temporal_patch_size
        self.ids = _checked_ids(self.tokenizer, config)
        self._levels = _normalised_levels()
        self._instruction_tokens = len(self._encode([""])[0])
        self._check()

    def _check(self) -> None:
        window = self.merge_size**2
        if self.max_patches < window or self.max_patches % window:
            raise UserError(
                f"max_patches={self.max_patches} is no multiple of the {window} patches that the "
                f"model merges into one token: choose one"
            )
        if not 0 < self.min_pixels <= self.max_pixels:
            raise UserError(
                f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels} are no range: "
                f"expected 0 < min_pixels <= max_pixels"
            )
        needed = self.max_patches // window + 2 + self._instruction_tokens + 1
        if self.max_tokens < needed:
            raise UserError(
                f"max_tokens={self.max_tokens} is below {needed}: max_patches={self.max_patches} "
                f"take {self.max_patches // window} tokens and 2 marks, the instruction "
                f"{self._instruction_tokens}, the end 1; raise max_tokens or lower max_patches"
            )

    @property
    def max_images(self) -> int:
        """How many images a row can hold, at one merge window and two marks each."""
        tokens = (self.max_tokens - self._instruction_tokens - 1) // 3
        return min(self.max_patches // self.merge_size**2, tokens)

    def __call__(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """The embedder's input.

        tokens int32[N, S], padded right with <|endoftext|>; token_mask bool[N, S]; positions
        int32[N, 3, S], M-RoPE's time, height and width, 0 on padding; patches float32[N, P, C];
        patch_positions int32[N, P, 2], the patch's row and column in its image; patch_segments
        int32[N, P], the image's number within the row from 1, 0 on padding; patch_grids
        int32[N, P, 2], rows and columns of the patch's whole image, in patches, 1 on padding.
        Raises UserError for a row with more than max_images images.
        """
        n, s, p = len(rows), self.max_tokens, self.max_patches
        channels = 3 * self.temporal_patch_size * self.patch_size**2
        batch = {
            "tokens": np.full((n, s), self.ids["pad_token_id"], np.int32),
            "token_mask": np.zeros((n, s), bool),
            "positions": np.zeros((n, 3, s), np.int32),
            "patches": np.zeros((n, p, channels), np.float32),
            "patch_positions": np.zeros((n, p, 2), np.int32),
            "patch_segments": np.zeros((n, p), np.int32),
            "patch_grids": np.ones((n, p, 2), np.int32),
        }
        for i, (row, text) in enumerate(zip(rows, self._encode([row.text for row in rows]))):
            out = {key: array[i] for key, array in batch.items()}
            grids = self._window_grids(row.images)
            self._fill_tokens(out, grids, text)
            self._fill_patches(out, grids, row.images)
        return batch

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # A listing may hold "<|image_pad|>": with this set, it is split as the text that it is.
        # Set at every call, because pickling forgets it.
        self.tokenizer.encode_special_tokens = True
        limit = _CHARACTERS_PER_TOKEN * self.max_tokens
        prompts = [
            "\n".join(part for part in (self.instruction, clean_text(text[:limit])) if part)
            for text in texts
        ]
        # One by one: a batch would start the tokenizer's own threads in every worker process.
        return [self.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]

    def _window_grids(self, images: Sequence[Image.Image]) -> list[tuple[int, int]]:
        """Rows and columns of merge windows of each image of a row, so that all fit together."""
        if len(images) > self.max_images:
            raise UserError(
                f"a row has {len(images)} images, and max_tokens={self.max_tokens} with "
                f"max_patches={self.max_patches} hold {self.max_images} of the smallest: "
                f"raise these or take fewer images a listing"
            )
        budget = min(
            self.max_patches // self.merge_size**2,
            self.max_tokens - 2 * len(images) - self._instruction_tokens - 1,
        )
        wanted = [self._window_grid(image, budget) for image in images]
        # The smallest first: what it leaves of its even share is the larger ones' to divide.
        for done, k in enumerate(sorted(range(len(images)), key=lambda k: math.prod(wanted[k]))):
            wanted[k] = self._window_grid(images[k], budget // (len(images) - done))
            budget -= math.prod(wanted[k])
        return wanted

    def _window_grid(self, image: Image.Image, limit: int) -> tuple[int, int]:
        return window_grid(
            image.height,
            image.width,
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            limit=limit,
        )

    def _fill_tokens(
        self, out: dict[str, np.ndarray], grids: list[tuple[int, int]], text: list[int]
    ) -> None:
        tokens, positions = out["tokens"], out["positions"]
        start = position = 0
        for grid in grids:
            end = start + 2 + math.prod(grid)
            tokens[start] = self.ids["vision_start_token_id"]
            tokens[start + 1 : end - 1] = self.ids["image_token_id"]
            tokens[end - 1] = self.ids["vision_end_token_id"]
            positions[:, start] = position
            positions[0, start + 1 : end - 1] = position + 1
            positions[1:, start + 1 : end - 1] = position + 1 + _image_positions(*grid)
            # After an image, text goes on from its longer side (Qwen2-VL's M-RoPE).
            position += 1 + max(grid)
            positions[:, end - 1] = position
            start, position = end, position + 1
        end = min(start + len(text), len(tokens) - 1)
        tokens[start:end] = text[: end - start]
        tokens[end] = self.ids["pad_token_id"]
        out["token_mask"][: end + 1] = True
        positions[:, start : end + 1] = np.arange(position, position + end + 1 - start)

    def _fill_patches(
        self,
        out: dict[str, np.ndarray],
        grids: list[tuple[int, int]],
        images: Sequence[Image.Image],
    ) -> None:
        start = 0
        for number, (grid, image) in enumerate(zip(grids, images), 1):
            end = start + math.prod(grid) * self.merge_size**2
            self._patchify(image, grid, out["patches"][start:end])
            out["patch_positions"][start:end] = _patch_positions(*grid, self.merge_size)
            out["patch_segments"][start:end] = number
            out["patch_grids"][start:end] = [side * self.merge_size for side in grid]
            start = end

    def _patchify(self, image: Image.Image, grid: tuple[int, int], out: np.ndarray) -> None:
        """Writes an image's normalised patches to out: float32[patches, C].

        Equal bit by bit to `Qwen2VLImageProcessorPil` at a fifth of its time: its arithmetic on a
        pixel has only 3 × 256 outcomes, which are looked up.
        """
        if image.mode != "RGB":
            from transformers.image_transforms import convert_to_rgb

            image = Image.fromarray(convert_to_rgb(image, return_numpy=True))
        (rows, columns), merge, patch = grid, self.merge_size, self.patch_size
        size = (columns * merge * patch, rows * merge * patch)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        pixels = pixels.reshape(rows, merge, patch, columns, merge, patch, 3)
        pixels = np.ascontiguousarray(pixels.transpose(6, 0, 3, 1, 4, 2, 5)).reshape(
            3, len(out), -1
        )
        out = out.reshape(len(out), 3, self.temporal_patch_size, patch**2)
        for channel in range(3):
            # A still image is the same at every moment of the temporal patch.
            out[:, channel] = self._levels[channel][pixels[channel]][:, None]


def window_grid(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, limit: int
) -> tuple[int, int]:
    """Rows and columns of merge windows (factor × factor pixels) that an image is resized to.

    Qwen2-VL's `smart_resize` where its result is within limit windows; where not, the largest that
    is. Sides more than 200:1 apart are resized as 200:1. Raises UserError for an empty image.
    """
    if min(height, width) < 1:
        raise UserError(f"an image is {width} x {height} pixels: remove it from the catalogue")
    max_pixels = min(max_pixels, limit * factor**2)
    min_pixels = min(min_pixels, max_pixels)
    height, width = (max(side, max(height, width) / _LONGEST_ASPECT) for side in (height, width))
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    # Rounding up a side, to 1 or to min_pixels, can pass the limit.
    while rows * columns > limit:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


@functools.lru_cache(maxsize=256)
def _image_positions(rows: int, columns: int) -> np.ndarray:
    """Each image token's row and column, int32[2, rows · columns]."""
    return np.indices((rows, columns), np.int32).reshape(2, -1)


@functools.lru_cache(maxsize=256)
def _patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Each patch's row and column in merge-window-major order, int32[patches, 2]."""
    indices = np.indices((rows * merge, columns * merge), np.int32)
    indices = indices.reshape(2, rows, merge, columns, merge)
    return indices.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def _normalised_levels() -> np.ndarray:
    """What Qwen2-VL's image processor makes of each of a channel's 256 levels: float32[3, 256]."""
    # Here and not above, so that worker processes, which unpickle the table, start at once.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    library = Qwen2VLImageProcessorPil()
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    levels = library.rescale(levels, library.rescale_factor)
    return library.normalize(levels, library.image_mean, library.image_std)[:, 0]


def _checked_ids(tokenizer: Tokenizer, config: QwenVLConfig) -> dict[str, int]:
    ids = special_token_ids(tokenizer)
    for field in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        if ids[field] != getattr(config, field):
            raise UserError(
                f"the tokenizer's {field} is {ids[field]} and the model's "
                f"{getattr(config, field)}: take both from one folder"
            )
    tokenizer.encode_special_tokens = True
    for name, token_id in ids.items():
        if token_id in tokenizer.encode(tokenizer.id_to_token(token_id)).ids:
            raise UserError(
                f"the tokenizer's {name} {token_id} is not marked as special, so a listing's text "
                f'could forge it: set "special": true for it in tokenizer.json'
            )
    return ids
