"""Photographs a drawn product: viewpoint and crop, cloth and pattern, light, shadow, background.

Axes: S pixels a side. Everything after the drawing is done at the final size on float32[S, S, 3].
"""

import functools
import math
import random
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from afmrl_jax.data.builtin.bags import backpack, handbag
from afmrl_jax.data.builtin.clothes import dress, hat, shirt, shoe
from afmrl_jax.data.builtin.furniture import chair, lamp, sofa
from afmrl_jax.data.builtin.pen import Pen
from afmrl_jax.data.builtin.surfaces import background, grain, pattern_mask, surface
from afmrl_jax.data.builtin.vocabulary import COLOURS
from afmrl_jax.data.builtin.wares import bottle, mug, watch

# How hard the photo is: what hides a product's attributes.
CROP_SHARE = 0.35  # of the photos are taken so near that part of the product is cut off
TILT_DEGREES = 14.0
EXPOSURE_SIGMA = 0.20  # of log brightness
COLOUR_CAST_SIGMA = 0.09  # of log brightness, a channel
STICKER_SHARE = 0.25  # of the photos carry a badge that covers something

_SUPERSAMPLING = 2
_DRAW = {
    "dress": dress,
    "shirt": shirt,
    "shoe": shoe,
    "handbag": handbag,
    "backpack": backpack,
    "hat": hat,
    "watch": watch,
    "mug": mug,
    "bottle": bottle,
    "lamp": lamp,
    "chair": chair,
    "sofa": sofa,
}


def photograph(
    rng: random.Random, category: str, attributes: Mapping[str, str], size: int
) -> np.ndarray:
    """One photo of a product under conditions drawn from rng. Returns uint8[S, S, 3]."""
    matrix = _viewpoint(rng, size)
    supersample = np.diag([_SUPERSAMPLING, _SUPERSAMPLING, 1.0])
    main = COLOURS[attributes["color"]]
    pen = Pen(size * _SUPERSAMPLING, supersample @ matrix, main)
    _DRAW[category](pen, attributes)
    if rng.random() < STICKER_SHARE:
        sticker = _sticker(rng, size)
    else:
        sticker = None

    albedo = np.asarray(pen.albedo.reduce(_SUPERSAMPLING), np.float32) / 255
    layers = pen.layers.reduce(_SUPERSAMPLING)
    coverage = layers.getchannel(0)
    planes = np.asarray(layers, np.float32)
    alpha, fabric = planes[..., :1] / 255, planes[..., 1] / 255
    crease = planes[..., 2] / 128

    u, v = _object_coordinates(matrix, size)
    mask = pattern_mask(attributes.get("pattern", "plain"), u, v)
    if mask is not None:
        ink = np.float32(_ink(main)) - np.float32(main) / 255
        albedo = albedo + (fabric * mask)[..., None] * ink
    look = surface(attributes.get("material", attributes.get("glaze", "plastic")), u, v)
    angle = rng.uniform(-0.9, 0.9) - math.pi / 2
    relief = _relief(coverage, angle, look.gloss)
    light = crease * (1 + relief) * (1 + fabric * look.texture)
    photo = albedo * light[..., None]
    photo += alpha * (look.gloss * np.maximum(relief - 0.12, 0) * fabric)[..., None]

    scene = background(rng, size)
    scene = scene * (1 - _shadow(rng, coverage, angle)[..., None])
    photo = photo + scene * (1 - alpha)
    photo = _grade(rng, photo)
    image = (np.clip(photo, 0, 1) * 255).astype(np.uint8)
    return image if sticker is None else _stick(image, sticker)


def _ink(main: tuple[int, int, int]) -> tuple[float, float, float]:
    """The pattern's second colour: cream on dark grounds, a deep shade of the ground on light."""
    bright = (0.3 * main[0] + 0.59 * main[1] + 0.11 * main[2]) / 255
    if bright < 0.55:
        return (0.95, 0.92, 0.84)
    return tuple(0.32 * c / 255 for c in main)


def _viewpoint(rng: random.Random, size: int) -> np.ndarray:
    """float64[3, 3]: object space -> pixels. Mirror, tilt, shear, perspective, distance, crop."""
    near = rng.random() < CROP_SHARE
    scale = size * (rng.uniform(0.5, 0.62) if near else rng.uniform(0.33, 0.44))
    reach = 0.16 if near else 0.06
    angle = math.radians(rng.gauss(0, TILT_DEGREES / 2))
    mirror = rng.choice((-1.0, 1.0))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    squeeze = np.array(
        [
            [mirror * rng.uniform(0.88, 1.06), rng.uniform(-0.08, 0.08), 0],
            [0, rng.uniform(0.92, 1.06), 0],
            [rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), 1],
        ]
    )
    place = np.array(
        [
            [scale, 0, size * (0.5 + rng.uniform(-reach, reach))],
            [0, scale, size * (0.5 + rng.uniform(-reach, reach))],
            [0, 0, 1],
        ]
    )
    return place @ turn @ squeeze


@functools.lru_cache(maxsize=4)
def _pixel_centres(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size].astype(np.float32) + 0.5
    return np.stack([x.ravel(), y.ravel(), np.ones(size * size, np.float32)])


def _object_coordinates(matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Object-space x and y of every pixel: float32[S, S] each."""
    u, v, w = np.linalg.inv(matrix).astype(np.float32) @ _pixel_centres(size)
    return (u / w).reshape(size, size), (v / w).reshape(size, size)


def _relief(coverage: Image.Image, angle: float, gloss: float) -> np.ndarray:
    """Light on a silhouette taken for a cushion: float32[S, S], about -.4 .. .4."""
    radius = coverage.width / 14
    height = np.asarray(coverage.filter(ImageFilter.BoxBlur(radius)), np.float32)
    height = (
        np.asarray(Image.fromarray(height).filter(ImageFilter.BoxBlur(radius / 2)), np.float32)
        if False
        else height
    )
    slope = coverage.width / 255 / 10
    dy = np.zeros_like(height)
    dx = np.zeros_like(height)
    dy[1:-1] = height[2:] - height[:-2]
    dx[:, 1:-1] = height[:, 2:] - height[:, :-2]
    light = (dx * math.cos(angle) + dy * math.sin(angle)) * (-slope * (0.35 + 0.4 * gloss))
    return np.clip(light, -0.45, 0.45)


def _shadow(rng: random.Random, coverage: Image.Image, angle: float) -> np.ndarray:
    """Soft shadow on the background, away from the light: float32[S, S] in 0..1."""
    size = coverage.width
    small = coverage.reduce(2).filter(ImageFilter.BoxBlur(size / 28))
    reach = size * rng.uniform(0.01, 0.045)
    shift = (round(-reach * math.cos(angle)), round(-reach * math.sin(angle)))
    soft = ImageChops.offset(small, *shift).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(soft, np.float32) * (rng.uniform(0.25, 0.65) / 255)


def _grade(rng: random.Random, photo: np.ndarray) -> np.ndarray:
    """Exposure, colour cast, uneven light, contrast and sensor noise."""
    size = photo.shape[0]
    gain = math.exp(rng.gauss(0, EXPOSURE_SIGMA))
    cast = [gain * math.exp(rng.gauss(0, COLOUR_CAST_SIGMA)) for _ in range(3)]
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    light = 1 + rng.uniform(-0.3, 0.3) * ramp[:, None] + rng.uniform(-0.3, 0.3) * ramp
    contrast = rng.uniform(0.85, 1.12)
    photo = photo * light[..., None] * (np.float32(cast) * np.float32(contrast))
    photo += 0.5 * (1 - contrast)
    photo += grain(rng, size) * rng.uniform(0.005, 0.035)
    return photo


def _sticker(rng: random.Random, size: int) -> tuple[int, int, int, tuple[int, int, int]]:
    radius = int(size * rng.uniform(0.07, 0.13))
    x = rng.choice((radius, size - radius)) + int(size * rng.uniform(-0.02, 0.02))
    y = rng.choice((radius, size - radius)) + int(size * rng.uniform(-0.02, 0.02))
    colour = rng.choice(((212, 30, 40), (250, 210, 40), (30, 120, 70), (20, 20, 24)))
    return x, y, radius, colour


def _stick(image: np.ndarray, sticker: tuple[int, int, int, tuple[int, int, int]]) -> np.ndarray:
    x, y, radius, colour = sticker
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    distance = (rows - y) ** 2 + (columns - x) ** 2
    image[distance < radius**2] = colour
    band = (distance < (0.8 * radius) ** 2) & (abs(rows - y) < 0.22 * radius)
    image[band] = (250, 250, 246)
    return image
