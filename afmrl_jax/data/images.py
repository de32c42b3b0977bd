"""Photos to the vision tower's patches: the size each is resized to, and its normalised pixels.

The patches of a row's images follow one another. Those of an image lie merge window by merge
window, the order in which the tower merges them into features.

Axes: P patches · F numbers of a flattened patch: 3 channels · temporal patch · patch².
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.tokenizer import read_json
from afmrl_jax.models.config import QwenVLConfig

# Mean and standard deviation of a pixel's channels, by which images are normalised.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGE_STATISTICS = {
    "qwen2_vl": _CLIP,
    "qwen2_5_vl": _CLIP,
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# Qwen2-VL's processor refuses images longer than this; a training run only squeezes them to it.
_LONGEST_ASPECT = 200

Grid = tuple[int, int]  # an image's rows and columns of merge windows


class Patcher:
    """Resizes images and cuts them into patches. Picklable; only making one needs transformers.

    min_pixels, max_pixels: bounds on a resized image's area, as in Qwen2-VL's processor.
    window: patches that the model merges into one feature.
    Raises UserError where the bounds are no range.
    """

    def __init__(self, config: QwenVLConfig, min_pixels: int, max_pixels: int):
        if not 0 < min_pixels <= max_pixels:
            raise UserError(
                f"min_pixels={min_pixels} and max_pixels={max_pixels} are no range: "
                f"expected 0 < min_pixels <= max_pixels"
            )
        self._pixels = min_pixels, max_pixels
        vision = config.vision
        self._patch, self._merge = vision.patch_size, vision.merge_size
        self._frames = vision.temporal_patch_size
        self._levels = _normalised_levels(config.architecture)
        self.window = vision.merge_size**2

    def grids(self, images: Sequence[Image.Image], windows: int) -> list[Grid]:
        """The grid of each image. Together they take at most `windows` merge windows.

        Images share the windows fairly: each gets an even share, and small images leave what they
        do not need to larger ones.
        """
        grids = [self._grid(image, windows) for image in images]
        # Smallest first: the windows that an image leaves of its share go to the larger ones.
        smallest_first = sorted(range(len(images)), key=lambda i: math.prod(grids[i]))
        for rank, i in enumerate(smallest_first):
            grids[i] = self._grid(images[i], windows // (len(images) - rank))
            windows -= math.prod(grids[i])
        return grids

    def _grid(self, image: Image.Image, limit: int) -> Grid:
        min_pixels, max_pixels = self._pixels
        return window_grid(
            image.height,
            image.width,
            factor=self._patch * self._merge,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            limit=limit,
        )

    def fill(
        self, row: Mapping[str, np.ndarray], images: Sequence[Image.Image], grids: Sequence[Grid]
    ) -> None:
        """Writes the images of one row into its arrays; what lies behind them stays as it is.

        row: patches float32[P, F], patch_positions int32[P, 2], patch_segments int32[P] and
        patch_grids int32[P, 2], as `Processor` describes them.
        """
        start = 0
        for number, (image, grid) in enumerate(zip(images, grids), 1):
            end = start + math.prod(grid) * self.window
            self._patchify(image, grid, row["patches"][start:end])
            row["patch_positions"][start:end] = _patch_positions(*grid, self._merge)
            row["patch_segments"][start:end] = number
            row["patch_grids"][start:end] = [side * self._merge for side in grid]
            start = end

    def _patchify(self, image: Image.Image, grid: Grid, out: np.ndarray) -> None:
        """Writes an image's normalised patches to out: float32[patches, F].

        Equal bit by bit to `Qwen2VLImageProcessorPil` at a fifth of its time: its arithmetic on a
        pixel has only 3 × 256 outcomes, which are looked up.
        """
        if image.mode != "RGB":
            from transformers.image_transforms import convert_to_rgb

            image = Image.fromarray(convert_to_rgb(image, return_numpy=True))
        (rows, columns), merge, patch = grid, self._merge, self._patch
        size = (columns * merge * patch, rows * merge * patch)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        pixels = pixels.reshape(rows, merge, patch, columns, merge, patch, 3)
        pixels = np.ascontiguousarray(pixels.transpose(6, 0, 3, 1, 4, 2, 5)).reshape(
            3, len(out), -1
        )
        out = out.reshape(len(out), 3, self._frames, patch**2)
        for channel in range(3):
            # A still image is the same at every moment of the temporal patch.
            out[:, channel] = self._levels[channel][pixels[channel]][:, None]


def window_grid(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, limit: int
) -> Grid:
    """Rows and columns of merge windows (factor × factor pixels) that an image is resized to.

    Qwen2-VL's `smart_resize` where its result has at most `limit` windows; elsewhere the largest
    grid that has. Sides more than 200:1 apart are resized as 200:1. Raises UserError for an empty
    image.
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
def _patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch, merge window by merge window: int32[patches, 2]."""
    indices = np.indices((rows * merge, columns * merge), np.int32)
    indices = indices.reshape(2, rows, merge, columns, merge)
    return indices.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def _normalised_levels(architecture: str) -> np.ndarray:
    """The normalised number of each of a channel's 256 levels, float32[3, 256]."""
    # Imported here, so that worker processes, which unpickle the table, start at once.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    mean, std = IMAGE_STATISTICS[architecture]
    library = Qwen2VLImageProcessorPil()
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    levels = library.rescale(levels, library.rescale_factor)
    return library.normalize(levels, list(mean), list(std))[:, 0]


def check_preprocessor(folder: Path, config: QwenVLConfig) -> None:
    """Raises UserError where a Hugging Face folder's images have other patches than the model's.

    The folder's pixel bounds do not count: the configuration's min_pixels and max_pixels do.
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
