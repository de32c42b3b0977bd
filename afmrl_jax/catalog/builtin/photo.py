"""Photographs a drawn product: viewpoint and crop, cloth and pattern, light, shadow, background.

Axes: S pixels a side. Everything after the drawing is done at the final size on float32[S, S, 3].
"""

import functools
import math
import random
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageFilter

from afmrl_jax.catalog.builtin.bags import backpack, handbag
from afmrl_jax.catalog.builtin.clothes import dress, hat, shirt, shoe
from afmrl_jax.catalog.builtin.furniture import chair, lamp, sofa
from afmrl_jax.catalog.builtin.pen import Pen
from afmrl_jax.catalog.builtin.surfaces import background, grain, pattern_mask, surface
from afmrl_jax.catalog.builtin.vocabulary import COLOURS
from afmrl_jax.catalog.builtin.wares import bottle, mug, watch

# How hard the photo is: what hides a product's attributes.
CROP_SHARE = 0.15  # of the photos are taken so near that part of the product is cut off
TILT_DEGREES = 10.0
EXPOSURE_SIGMA = 0.12  # of log brightness
COLOUR_CAST_SIGMA = 0.04  # of log brightness, a channel
GRAIN_MAX = 0.03
BADGE_SHARE = 0.15  # of the photos carry a badge that covers a corner

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
    sheen = 0.08 * look.texture + look.gloss * np.maximum(relief - 0.12, 0)  # shows on black too
    photo += (fabric * sheen)[..., None]

    scene = background(rng, size)
    scene = scene * (1 - _shadow(rng, coverage, angle)[..., None])
    photo = photo + scene * (1 - alpha)
    photo = _grade(rng, photo)
    image = (np.clip(photo, 0, 1) * 255).astype(np.uint8)
    if rng.random() < BADGE_SHARE:
        _stick_badge(rng, image)
    return image


def _ink(main: tuple[int, int, int]) -> tuple[float, float, float]:
    """The pattern's second colour: cream on dark grounds, a deep shade of the ground on light."""
    bright = (0.3 * main[0] + 0.59 * main[1] + 0.11 * main[2]) / 255
    if bright < 0.55:
        return (0.95, 0.92, 0.84)
    return tuple(0.32 * c / 255 for c in main)


def _viewpoint(rng: random.Random, size: int) -> np.ndarray:
    """float64[3, 3]: object space -> pixels. Mirror, tilt, shear, perspective, distance, crop."""
    near = rng.random() < CROP_SHARE
    scale = size * (rng.uniform(0.48, 0.6) if near else rng.uniform(0.36, 0.45))
    reach = 0.14 if near else 0.04
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
    size = coverage.width
    blur = ImageFilter.BoxBlur(size / 36)
    soft = coverage.reduce(2).filter(blur).filter(blur)
    height = np.asarray(soft.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    dy, dx = np.zeros_like(height), np.zeros_like(height)
    dy[2:-2] = height[4:] - height[:-4]
    dx[:, 2:-2] = height[:, 4:] - height[:, :-4]
    steepness = size / 5100 * (0.35 + 0.4 * gloss)
    light = (dx * math.cos(angle) + dy * math.sin(angle)) * -steepness
    return np.clip(light, -0.45, 0.45)


def _shadow(rng: random.Random, coverage: Image.Image, angle: float) -> np.ndarray:
    """Soft shadow on the background, away from the light: float32[S, S] in 0..1."""
    size = coverage.width
    reach = size * rng.uniform(0.01, 0.045)
    fallen = Image.new("L", (size // 2, size // 2))
    shift = (round(-reach * math.cos(angle)), round(-reach * math.sin(angle)))
    fallen.paste(coverage.reduce(2), shift)
    blurred = fallen.filter(ImageFilter.BoxBlur(size / 28))
    soft = blurred.resize((size, size), Image.Resampling.BILINEAR)
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
    photo += grain(rng, size) * rng.uniform(0.005, GRAIN_MAX)
    return photo - 0.6 * np.maximum(photo - 0.8, 0)  # highlights roll off, as film's do


def _stick_badge(rng: random.Random, image: np.ndarray) -> None:
    """Puts a round badge with a percent sign near one of the corners."""
    size = image.shape[0]
    radius = size * rng.uniform(0.07, 0.13)
    x, y = (rng.choice((radius, size - radius)) + size * rng.uniform(-0.02, 0.02) for _ in "xy")
    colour = rng.choice(((212, 30, 40), (232, 150, 20), (30, 120, 70), (20, 20, 24)))
    rows, columns = np.ogrid[:size, :size]
    dy, dx = (rows + 0.5 - y) / radius, (columns + 0.5 - x) / radius
    slash = (abs(dx + 0.7 * dy) < 0.13) & (abs(dy) < 0.55)
    dots = np.hypot(abs(dx + dy) - 0.62, dx - dy) < 0.34
    image[dx * dx + dy * dy < 1] = colour
    image[slash | dots] = (250, 250, 246)
