"""Turns texts and photos into the model's static arrays; the model's ragged work is done here.

A row is a prompt (`prompts`) in which each <|image_pad|> is repeated for its image's features. Its
images lie one after another in the patches, each in the order of the vision tower: merge window by
merge window.

Axes: N rows · S tokens · P patches · C = 3 · temporal patch · patch²
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.fitting import fit_attributes
from afmrl_jax.data.prompts import Frame, PlainPrompt, Prompt
from afmrl_jax.data.tokenizer import encode_text, read_json, special_token_ids, text_tokenizer
from afmrl_jax.models.config import QwenVLConfig

_PLAIN = PlainPrompt()
# Mean and standard deviation of a pixel's channels, by which images are normalised.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGE_STATISTICS = {
    "qwen2_vl": _CLIP,
    "qwen2_5_vl": _CLIP,
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# Qwen2-VL's processor refuses images longer than this; a training run only squeezes them to it.
_LONGEST_ASPECT = 200
# A text is cut to so many characters a token before it is tokenised: a megabyte of description
# would cost more than the rest of its batch, and tokens this long do not occur in language.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Row:
    """A text (may be empty) and RGB images (may be none), and what to learn to answer to them.

    attributes: where in the text each of them stands, (its first character, behind its last), in
    order: too long a text is cut around them (`fit_attributes`).
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    attributes: tuple[tuple[int, int], ...] = ()


class Shown(NamedTuple):
    """What the model reads of a row's text.

    text: a plain row of it gives the same tokens (its end, behind the attributes, may be cut);
    attributes: how many of the row's it holds, each whole; needed: tokens of a row that holds all
    of them and what stands before them, whole too; max_tokens where this one does.
    """

    text: str
    attributes: int
    needed: int


class _Line(NamedTuple):
    """A row's tokens before padding."""

    tokens: np.ndarray  # int32[L], L <= S
    positions: np.ndarray  # int32[3, L]
    answer: int  # how many of the last tokens are the answer
    grids: list[tuple[int, int]]  # rows and columns of merge windows of each image


class Processor:
    """Rows to arrays of fixed shapes; pure, picklable, without JAX or torch.

    max_tokens, max_patches: the size of every prompt. Images that do not fit are resized until all
    of a row's do, sharing the budget fairly; the text is cut from its end, and attributes in it
    only where they are too many beside the first words of what stands before them.
    min_pixels, max_pixels: bounds on a resized image's area, as in Qwen2-VL's processor.
    prompt: what stands around images and text; by default nothing but the marks of a plain row.
    max_answer: room behind each prompt for a row's answer, which ends with the config's
    eos_token_id; a longer one is refused. A prompt is the same with and without its answer.
    pad_left: whether padding stands before the rows, for a sampler that goes on from them.
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
        prompt: Prompt = _PLAIN,
        max_answer: int = 0,
        pad_left: bool = False,
    ):
        self.tokenizer = text_tokenizer(tokenizer)
        self.max_tokens, self.max_patches, self.max_answer = max_tokens, max_patches, max_answer
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.prompt, self.pad_left = prompt, pad_left
        self.patch_size, self.merge_size = config.vision.patch_size, config.vision.merge_size
        self.temporal_patch_size = config.vision.temporal_patch_size
        self.ids = checked_ids(tokenizer, config)
        self._levels = _normalised_levels(config.architecture)
        # Frames of so many images are made here: a worker would have to import what renders them.
        self._frames: dict[int, tuple[Frame, int]] = {}
        _, one, two = (self._frame(n)[1] for n in range(3))
        self._check(one)
        # Each further image takes its marks and at least one merge window.
        further = (max_tokens - one - 1) // (two - one + 1)
        self.max_images = min(max_patches // self.merge_size**2, 1 + further)

    def _check(self, fixed: int) -> None:
        """fixed: how many tokens a row of one image has without text and the image's features."""
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
        needed = self.max_patches // window + fixed
        if self.max_tokens < needed:
            raise UserError(
                f"max_tokens={self.max_tokens} is below {needed}: max_patches={self.max_patches} "
                f"take {self.max_patches // window} tokens, the prompt around them {fixed}; "
                "raise max_tokens or lower max_patches"
            )

    def __call__(
        self, rows: Sequence[Row], buckets: Sequence[tuple[int, int]] = ()
    ) -> dict[str, np.ndarray]:
        """The model's input.

        tokens int32[N, S], padded with <|endoftext|>; token_mask bool[N, S]; positions
        int32[N, 3, S], M-RoPE's time, height and width, 0 on padding; patches float32[N, P, C];
        patch_positions int32[N, P, 2], the patch's row and column in its image; patch_segments
        int32[N, P], the image's number within the row from 1, 0 on padding; patch_grids
        int32[N, P, 2], rows and columns of the patch's whole image, in patches, 1 on padding; with
        max_answer also answer_mask bool[N, S].

        buckets: the (S, P) to choose from; taken is the first that holds the rows, whose content
        does not depend on it. By default the one (max_tokens + max_answer, max_patches). Several
        processes see different rows of one batch: they must offer one bucket, for what they know of
        all rows, as `text_bucket`.
        Raises UserError for a row with more than max_images images, ValueError where no bucket
        holds the rows, or max_answer not an answer: cut, it would be learned as if it were whole.
        """
        lines = [self._line(row) for row in rows]
        n, (s, p) = len(rows), self._bucket(lines, buckets)
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
        if self.max_answer:
            batch["answer_mask"] = np.zeros((n, s), bool)
        for i, (row, line) in enumerate(zip(rows, lines)):
            end = s if self.pad_left else len(line.tokens)
            start = end - len(line.tokens)
            batch["tokens"][i, start:end] = line.tokens
            batch["token_mask"][i, start:end] = True
            batch["positions"][i, :, start:end] = line.positions
            if self.max_answer:
                batch["answer_mask"][i, end - line.answer : end] = True
            out = {key: array[i] for key, array in batch.items()}
            self._fill_patches(out, line.grids, row.images)
        return batch

    @property
    def text_bucket(self) -> tuple[int, int]:
        """The bucket of rows that have no images: the model leaves out its vision tower."""
        return self.max_tokens + self.max_answer, 0

    def _bucket(self, lines: list[_Line], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
        tokens = max((len(line.tokens) for line in lines), default=0)
        windows = max((sum(map(math.prod, line.grids)) for line in lines), default=0)
        patches = windows * self.merge_size**2
        for bucket in buckets or [(self.max_tokens + self.max_answer, self.max_patches)]:
            if tokens <= bucket[0] and patches <= bucket[1]:
                return bucket
        raise ValueError(
            f"rows of {tokens} tokens and {patches} patches fit in none of the buckets {buckets}"
        )

    def _frame(self, n_images: int) -> tuple[Frame, int]:
        """A row's frame, and how many tokens it has without text and images' features."""
        if n_images not in self._frames:
            frame = self.prompt.frame(n_images, self.tokenizer)
            prefix = encode_text(self.tokenizer, frame.prefix)
            fixed = len(frame.head) + len(prefix) + len(frame.tail) - n_images
            self._frames[n_images] = frame, fixed
        return self._frames[n_images]

    def _line(self, row: Row) -> _Line:
        grids = self._window_grids(row.images)
        frame, _ = self._frame(len(row.images))
        text, _ = self._fitted(row, self._room(grids))
        answer = self._answer(row)
        ids = np.array([*frame.head, *text, *frame.tail, *answer], np.int32)
        return _Line(*_expanded(ids, self.ids["image_token_id"], grids), len(answer), grids)

    def _answer(self, row: Row) -> list[int]:
        if row.answer is None:
            return []
        if not self.max_answer:
            raise ValueError("a row has an answer, and max_answer=0 leaves no room for it")
        answer = [*encode_text(self.tokenizer, row.answer), self.ids["eos_token_id"]]
        if len(answer) > self.max_answer:
            raise ValueError(
                f"an answer takes {len(answer)} tokens, max_answer={self.max_answer}: "
                "leave attributes out of it (`answers.learnable`)"
            )
        return answer

    def shown(self, row: Row) -> Shown:
        """What of the row's text stands in its tokens, beside its images."""
        grids = self._window_grids(row.images)
        room = self._room(grids)
        _, (text, attributes) = self._fitted(row, room)
        if text == row.text:
            return Shown(text, attributes, self.max_tokens)
        frame, _ = self._frame(len(grids))
        ahead = row.text[: row.attributes[-1][1]]
        needed = self.max_tokens - room + len(encode_text(self.tokenizer, frame.piece(ahead)))
        if grids:  # in longer rows those that are squeezed by these are larger as well
            needed += self.max_patches // self.merge_size**2 - self._most_windows(len(grids))
        return Shown(text, attributes, max(needed, -(-len(ahead) // _CHARACTERS_PER_TOKEN)))

    def _fitted(self, row: Row, room: int) -> tuple[list[int], tuple[str, int]]:
        """The tokens of the row's text, as many as there is room for; the text that they are of,
        and how many of the row's attributes it holds."""
        n_images, longest = len(row.images), self._longest_text
        text, kept = row.text, len(row.attributes)
        tokens = self._tokens(text, n_images)

        def count(text: str) -> int:
            if len(text) > longest:  # not looked at: no language has tokens that long
                return len(text)
            return len(self._tokens(text, n_images))

        end = row.attributes[-1][1] if kept else 0
        is_long = kept and (len(tokens) > room or end > longest)
        if is_long and count(text[:end]) > room:
            text, kept = fit_attributes(text, row.attributes, room, count)
            tokens = self._tokens(text, n_images)
        return tokens[:room], (text, kept)

    @property
    def _longest_text(self) -> int:
        return _CHARACTERS_PER_TOKEN * self.max_tokens

    def _tokens(self, text: str, n_images: int) -> list[int]:
        """The tokens between the frame's head and tail, uncut."""
        frame, _ = self._frame(n_images)
        return encode_text(self.tokenizer, frame.piece(text[: self._longest_text]))

    def _room(self, grids: Sequence[tuple[int, int]]) -> int:
        """For how many tokens of text its images leave room in a row."""
        return self.max_tokens - self._around(len(grids), sum(map(math.prod, grids)))

    def _around(self, n_images: int, windows: int) -> int:
        """How many tokens stand around the text with so many images, of so many windows
        together."""
        frame, _ = self._frame(n_images)
        return len(frame.head) - n_images + windows + len(frame.tail)

    def _most_windows(self, n_images: int) -> int:
        """How many merge windows a row's images may take together."""
        fixed = self._frame(n_images)[1]
        return min(self.max_patches // self.merge_size**2, self.max_tokens - fixed)

    def most_tokens(self, row: Row, n_images: int) -> int:
        """How many tokens the row, given without its images, takes at most with those.

        n_images: how many it has, of any size; of more than max_images the first are meant.
        """
        n_images = min(n_images, self.max_images)
        windows = self._most_windows(n_images) if n_images else 0
        tokens = self._around(n_images, windows) + len(self._tokens(row.text, n_images))
        return min(tokens, self.max_tokens) + len(self._answer(row))

    def _window_grids(self, images: Sequence[Image.Image]) -> list[tuple[int, int]]:
        """Rows and columns of merge windows of each image of a row, so that all fit together."""
        if len(images) > self.max_images:
            raise UserError(
                f"a row has {len(images)} images, and max_tokens={self.max_tokens} with "
                f"max_patches={self.max_patches} hold {self.max_images} of the smallest: "
                f"raise these or take fewer images a listing"
            )
        budget = self._most_windows(len(images))
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


def _expanded(
    ids: np.ndarray, image_id: int, grids: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with each image's repeated for its features, and M-RoPE's positions: int32[3, L].

    Text advances by one a token on all three axes. An image's features stand still in time and
    count rows and columns; text goes on behind the longer side (Qwen2-VL's `get_rope_index`, the
    same in all three families for still images).
    """
    images = np.flatnonzero(ids == image_id)
    counts, advance = np.ones((2, len(ids)), np.int32)
    counts[images] = [math.prod(grid) for grid in grids]
    advance[images] = [max(grid) for grid in grids]
    positions = np.tile(np.repeat(np.cumsum(advance) - advance, counts), (3, 1))
    starts = np.cumsum(counts) - counts
    for image, grid in zip(images, grids):
        positions[1:, starts[image] :][:, : counts[image]] += _image_positions(*grid)
    return np.repeat(ids, counts), positions


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


def _normalised_levels(architecture: str) -> np.ndarray:
    """What the image processor makes of each of a channel's 256 levels: float32[3, 256]."""
    # Here and not above, so that worker processes, which unpickle the table, start at once.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    mean, std = IMAGE_STATISTICS[architecture]
    library = Qwen2VLImageProcessorPil()
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    levels = library.rescale(levels, library.rescale_factor)
    return library.normalize(levels, list(mean), list(std))[:, 0]


def checked_ids(tokenizer: Tokenizer, config: QwenVLConfig) -> dict[str, int]:
    """The special tokens of rows: the tokenizer's, but for the model's end of an answer.

    Raises UserError where the tokenizer is not the model's.
    """
    ids = special_token_ids(tokenizer) | {"eos_token_id": config.eos_token_id}
    for field in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        if ids[field] != getattr(config, field):
            raise UserError(
                f"the tokenizer's {field} is {ids[field]} and the model's "
                f"{getattr(config, field)}: take both from one folder"
            )
    if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise UserError(
            f"the tokenizer's last token is {last}, {tokenizer.id_to_token(last)!r}, and the model "
            f"knows {config.vocab_size}, 0 to {config.vocab_size - 1}: take both from one folder"
        )
    return ids


def check_preprocessor(folder: Path, config: QwenVLConfig) -> None:
    """Raises UserError where a Hugging Face folder asks for other patches than the model's.

    Its pixel bounds are advice: the configuration's min_pixels and max_pixels rule.
    """
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = read_json(path)
    elif (path := folder / "processor_config.json").is_file():
        settings = read_json(path).get("image_processor") or {}
    else:
        return
    mean, std = IMAGE_STATISTICS[config.architecture]
    expected = {
        "patch_size": config.vision.patch_size,
        "merge_size": config.vision.merge_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": int(Image.Resampling.BICUBIC),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    wrong = [
        f"{name} is {settings[name]}, expected {value}"
        for name, value in expected.items()
        if settings.get(name) is not None and settings[name] != value
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit a {config.architecture} model with its config.json: "
            f"{'; '.join(wrong)}; take both files from one model"
        )
