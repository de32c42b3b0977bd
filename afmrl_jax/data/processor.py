"""Turns texts and photos into the model's static arrays; the model's ragged work is done here.

A row is a prompt (`prompts`) in which each <|image_pad|> is repeated once a feature of its image;
`images` makes the patches.

Axes: N rows · S tokens · P patches · F numbers of a flattened patch · L tokens of an unpadded row.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.fitting import fit_attributes
from afmrl_jax.data.images import Grid, Patcher
from afmrl_jax.data.prompts import Frame, PlainPrompt, Prompt
from afmrl_jax.data.tokenizer import encode_text, special_token_ids, text_tokenizer
from afmrl_jax.models.config import QwenVLConfig

_PLAIN = PlainPrompt()
# A text is cut to so many characters a token before it is tokenised: a megabyte of description
# would cost more than the rest of its batch, and tokens this long do not occur in language.
_CHARACTERS_PER_TOKEN = 32

TEXT_ARRAYS = ("tokens", "token_mask", "positions")
PATCH_ARRAYS = ("patches", "patch_positions", "patch_segments", "patch_grids")


@dataclass(frozen=True)
class Row:
    """A text (may be empty), RGB images (may be none), and the answer to learn, if any.

    attributes: the span of each attribute in the text, (first character, behind the last), in
    order: too long a text is cut around them (`fit_attributes`).
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    attributes: tuple[tuple[int, int], ...] = ()


class RowArray(NamedTuple):
    """One of a row's arrays."""

    shape: tuple[int, ...]
    dtype: type[np.generic]
    padding: int = 0  # the value of padded tokens or patches


def row_arrays(
    config: QwenVLConfig, tokens: int, patches: int, *, answers: bool
) -> dict[str, RowArray]:
    """The arrays of one row by name; a batch of rows has these axes behind its own.

    tokens: S; patches: P; answers: whether rows hold an answer to learn.
    """
    arrays = {
        "tokens": RowArray((tokens,), np.int32, config.pad_token_id),
        "token_mask": RowArray((tokens,), np.bool_),
        "positions": RowArray((3, tokens), np.int32),
        "patches": RowArray((patches, config.vision.patch_dim), np.float32),
        "patch_positions": RowArray((patches, 2), np.int32),
        "patch_segments": RowArray((patches,), np.int32),
        "patch_grids": RowArray((patches, 2), np.int32, 1),
    }
    return arrays | ({"answer_mask": RowArray((tokens,), np.bool_)} if answers else {})


class Shown(NamedTuple):
    """The part of a row's text that the model reads.

    text: a plain row of this text gives the same tokens (its end, behind the attributes, may be
    cut). attributes: how many of the row's attributes the text holds, each whole. needed: the
    max_tokens of a row that holds all attributes and the text before them, whole; this processor's
    max_tokens where its row does.
    """

    text: str
    attributes: int
    needed: int


class _TokenRow(NamedTuple):
    """A row's tokens before padding."""

    tokens: np.ndarray  # int32[L], L <= S
    positions: np.ndarray  # int32[3, L]
    answer: int  # length of the answer, which ends the tokens
    grids: list[Grid]  # of each image


class Processor:
    """Rows to arrays of fixed shapes; pure, picklable, without JAX or torch.

    max_tokens, max_patches: the size of every prompt. A row's images share both and are resized
    until they fit. Its text is cut from the end; attributes are left out only where they do not fit
    beside the first words of the text before them.
    min_pixels, max_pixels: bounds on a resized image's area, as in Qwen2-VL's processor.
    prompt: the tokens around images and text; by default only the marks of a plain row.
    max_answer: tokens for an answer behind each prompt, the closing eos_token_id of the config
    included; a longer answer is refused. The prompt does not depend on the answer.
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
        self.prompt, self.pad_left = prompt, pad_left
        self.ids = checked_ids(tokenizer, config)
        self._config = config.replace(pad_token_id=self.ids["pad_token_id"])
        self._patcher = Patcher(config, min_pixels, max_pixels)
        # Frames up to two images are made here: a worker process would have to import jinja2.
        self._frames: dict[int, tuple[Frame, int]] = {}
        _, fixed_of_one, fixed_of_two = (self._frame(n)[1] for n in range(3))
        self._check(fixed_of_one)
        # Each further image takes its marks and at least one merge window.
        further = (max_tokens - fixed_of_one - 1) // (fixed_of_two - fixed_of_one + 1)
        self.max_images = min(max_patches // self._patcher.window, 1 + further)

    def _check(self, fixed: int) -> None:
        """fixed: tokens of a row of one image, without its text and the image's features."""
        window = self._patcher.window
        if self.max_patches < window or self.max_patches % window:
            raise UserError(
                f"max_patches={self.max_patches} is no multiple of the {window} patches that the "
                f"model merges into one token: choose one"
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
        int32[N, 3, S], M-RoPE's time, height and width, 0 on padding; patches float32[N, P, F];
        patch_positions int32[N, P, 2], the patch's row and column in its image; patch_segments
        int32[N, P], the image's number within the row from 1, 0 on padding; patch_grids
        int32[N, P, 2], rows and columns of the patch's whole image, in patches, 1 on padding; with
        max_answer also answer_mask bool[N, S].

        buckets: the (S, P) to choose from; the first that holds all rows is taken, and the rows'
        content does not depend on it. By default the only bucket is (max_tokens + max_answer,
        max_patches). Processes see different rows of one batch: each must offer the same single
        bucket, chosen by what is known of all rows, as `text_bucket`.
        Raises UserError for a row with more than max_images images; ValueError where no bucket
        holds the rows, or max_answer not an answer: cut, it would be learned as if it were whole.
        """
        lines = [self._line(row) for row in rows]
        length, patches = self._bucket(lines, buckets)
        arrays = row_arrays(self._config, length, patches, answers=self.max_answer > 0)
        batch = {
            name: np.full((len(rows), *array.shape), array.padding, array.dtype)
            for name, array in arrays.items()
        }
        for i, (row, line) in enumerate(zip(rows, lines)):
            end = length if self.pad_left else len(line.tokens)
            start = end - len(line.tokens)
            batch["tokens"][i, start:end] = line.tokens
            batch["token_mask"][i, start:end] = True
            batch["positions"][i, :, start:end] = line.positions
            if self.max_answer:
                batch["answer_mask"][i, end - line.answer : end] = True
            views = {name: batch[name][i] for name in PATCH_ARRAYS}
            self._patcher.fill(views, row.images, line.grids)
        return batch

    @property
    def text_bucket(self) -> tuple[int, int]:
        """The bucket of rows that have no images: the model leaves out its vision tower."""
        return self.max_tokens + self.max_answer, 0

    def _bucket(
        self, lines: list[_TokenRow], buckets: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        tokens = max((len(line.tokens) for line in lines), default=0)
        windows = max((sum(map(math.prod, line.grids)) for line in lines), default=0)
        patches = windows * self._patcher.window
        for bucket in buckets or [(self.max_tokens + self.max_answer, self.max_patches)]:
            if tokens <= bucket[0] and patches <= bucket[1]:
                return bucket
        raise ValueError(
            f"rows of {tokens} tokens and {patches} patches fit in none of the buckets {buckets}"
        )

    def _frame(self, n_images: int) -> tuple[Frame, int]:
        """The frame of so many images, and its number of tokens without their features."""
        if n_images not in self._frames:
            frame = self.prompt.frame(n_images, self.tokenizer)
            prefix = encode_text(self.tokenizer, frame.prefix)
            fixed = len(frame.head) + len(prefix) + len(frame.tail) - n_images
            self._frames[n_images] = frame, fixed
        return self._frames[n_images]

    def _line(self, row: Row) -> _TokenRow:
        grids = self._grids(row.images)
        frame, _ = self._frame(len(row.images))
        text, _ = self._fitted(row, self._room(grids))
        answer = self._answer(row)
        ids = np.array([*frame.head, *text, *frame.tail, *answer], np.int32)
        return _TokenRow(*_expanded(ids, self.ids["image_token_id"], grids), len(answer), grids)

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
        """The part of the row's text that fits into its tokens, beside its images."""
        grids = self._grids(row.images)
        room = self._room(grids)
        _, (text, attributes) = self._fitted(row, room)
        if text == row.text:
            return Shown(text, attributes, self.max_tokens)
        frame, _ = self._frame(len(grids))
        ahead = row.text[: row.attributes[-1][1]]
        needed = self.max_tokens - room + len(encode_text(self.tokenizer, frame.piece(ahead)))
        if grids:  # max_tokens may limit the images too: longer rows would show them larger
            needed += self.max_patches // self._patcher.window - self._most_windows(len(grids))
        return Shown(text, attributes, max(needed, -(-len(ahead) // _CHARACTERS_PER_TOKEN)))

    def _fitted(self, row: Row, room: int) -> tuple[list[int], tuple[str, int]]:
        """Tokens of the row's text, at most `room`; then the text that they are tokens of, and how
        many of the row's attributes it holds."""
        n_images, longest = len(row.images), self._longest_text
        text, kept = row.text, len(row.attributes)
        tokens = self._tokens(text, n_images)

        def count(text: str) -> int:
            if len(text) > longest:  # too long to be worth tokenising: it cannot fit
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
        """Characters of a text that are tokenised at most."""
        return _CHARACTERS_PER_TOKEN * self.max_tokens

    def _tokens(self, text: str, n_images: int) -> list[int]:
        """The tokens between the frame's head and tail, uncut."""
        frame, _ = self._frame(n_images)
        return encode_text(self.tokenizer, frame.piece(text[: self._longest_text]))

    def _room(self, grids: Sequence[Grid]) -> int:
        """Tokens that images of these grids leave for the text of a row."""
        return self.max_tokens - self._around(len(grids), sum(map(math.prod, grids)))

    def _around(self, n_images: int, windows: int) -> int:
        """Tokens around the text of a row whose images have so many merge windows together."""
        frame, _ = self._frame(n_images)
        return len(frame.head) - n_images + windows + len(frame.tail)

    def _most_windows(self, n_images: int) -> int:
        """Merge windows that a row's images may have together."""
        fixed = self._frame(n_images)[1]
        return min(self.max_patches // self._patcher.window, self.max_tokens - fixed)

    def most_tokens(self, row: Row, n_images: int) -> int:
        """The largest number of tokens that the row can take once its images are added.

        row: without images. n_images: how many to add, of any size; max_images where it is larger.
        """
        n_images = min(n_images, self.max_images)
        windows = self._most_windows(n_images) if n_images else 0
        tokens = self._around(n_images, windows) + len(self._tokens(row.text, n_images))
        return min(tokens, self.max_tokens) + len(self._answer(row))

    def _grids(self, images: Sequence[Image.Image]) -> list[Grid]:
        """The grids of a row's images, which fit the row together."""
        if len(images) > self.max_images:
            raise UserError(
                f"a row has {len(images)} images, and max_tokens={self.max_tokens} with "
                f"max_patches={self.max_patches} hold {self.max_images} of the smallest: "
                f"raise these or take fewer images a listing"
            )
        return self._patcher.grids(images, self._most_windows(len(images)))


def _expanded(
    ids: np.ndarray, image_id: int, grids: Sequence[Grid]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with each image's repeated once a feature, and M-RoPE's positions: int32[3, L].

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
    """Row and column of each of an image's tokens, int32[2, rows · columns]."""
    return np.indices((rows, columns), np.int32).reshape(2, -1)


def checked_ids(tokenizer: Tokenizer, config: QwenVLConfig) -> dict[str, int]:
    """The ids of a row's special tokens: the tokenizer's, but eos_token_id the model's.

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
