"""What things are made of and what they stand on: patterns, materials, backgrounds.

Axes: S pixels a side; u, v: float32[S, S], object-space x and y of each pixel.
"""

import functools
import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

PLAIN_BACKGROUND_SHARE = 0.7  # of the photos; the others are taken at some place

_TAU = 2 * math.pi


def pattern_mask(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """Where the second colour of a pattern shows: float32[S, S] in 0..1; None for plain."""
    draw = _PATTERNS.get(pattern)
    return None if draw is None else draw(u, v)


def _edge(x: np.ndarray, sharpness: float) -> np.ndarray:
    return np.clip(x * sharpness + 0.5, 0, 1)


def _cells(u: np.ndarray, v: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from the nearest point of a staggered grid, in units of its period."""
    row = np.floor(v / period)
    du = u / period + 0.5 * (row % 2)
    return du - np.floor(du) - 0.5, v / period - row - 0.5


def _striped(u, v):
    return _edge(np.sin(v * (_TAU / 0.26)), 3)


def _dotted(u, v):
    du, dv = _cells(u, v, 0.24)
    return _edge(0.075 - du * du - dv * dv, 18)


def _checked(u, v):
    across = _edge(np.sin(u * (_TAU / 0.4)), 4)
    return 0.5 * across + 0.5 * _edge(np.sin(v * (_TAU / 0.4)), 4)


def _floral(u, v):
    du, dv = _cells(u, v, 0.42)
    radius = np.sqrt(du * du + dv * dv)
    petals = _edge(0.30 + 0.10 * np.cos(5 * np.arctan2(dv, du)) - radius, 12)
    return petals * _edge(radius - 0.09, 14)


def _zigzag(u, v):
    wave = np.abs(u * 4.2 - np.round(u * 4.2))
    return _edge(np.sin((v + 0.26 * wave) * (_TAU / 0.26)), 3)


def _two_tone(u, v):
    return _edge(v - 0.12, 40)


def _quilted(u, v):
    lines = np.maximum(np.cos((u + v) * (_TAU / 0.3)), np.cos((u - v) * (_TAU / 0.3)))
    return 0.55 * _edge(lines - 0.9, 10)


def _camouflage(u, v):
    return 0.75 * _edge(_noise(u, v, 24) - 0.08, 8)


def _pleated(u, v):
    return 0.3 + 0.3 * np.sin(u * (_TAU / 0.11))


_PATTERNS = {
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "floral": _floral,
    "zigzag": _zigzag,
    "two-tone": _two_tone,
    "quilted": _quilted,
    "camouflage": _camouflage,
    "pleated": _pleated,
}


class Surface(NamedTuple):
    """texture: relative change of light, float32[S, S] or 0; gloss: strength of highlights."""

    texture: np.ndarray | float
    gloss: float


def surface(material: str, u: np.ndarray, v: np.ndarray) -> Surface:
    """How a material takes the light; materials without a texture of their own are smooth."""
    texture, gloss = _MATERIALS.get(material, (None, 0.3))
    return Surface(0.0 if texture is None else texture(u, v), gloss)


def _knit(u, v):
    wave = np.abs(u * 9 - np.round(u * 9))
    return 0.22 * np.sin((v + 0.09 * wave) * (_TAU / 0.1))


def _weave(u, v):
    return 0.16 * np.sin(u * (_TAU / 0.08)) * np.sin(v * (_TAU / 0.08)) + 0.06 * _noise(u, v, 60)


def _twill(u, v):
    return 0.12 * np.sin((u + v) * (_TAU / 0.07)) + 0.22 * _noise(u, v, 40)


def _wicker(u, v):
    odd = np.floor(u / 0.12) % 2
    return 0.3 * np.sin((v + 0.06 * odd) * (_TAU / 0.12))


def _mottled(u, v):
    return 0.22 * _noise(u, v, 36)


def _grained(u, v):
    return 0.08 * _noise(u, v, 90)


def _sheen(u, v):
    return 0.3 * np.sin(u * 7 + 1.5 * np.sin(v * 3))


def _brushed(u, v):
    return 0.25 * np.sin(u * 5.2 + 0.6) + 0.04 * _noise(u * 0.1, v, 90)


def _speckled(u, v):
    return -0.7 * _edge(_noise(u, v, 110) - 0.38, 6)


def _woolly(u, v):
    return 0.30 * _noise(u, v, 70)


_MATERIALS = {
    "cotton": (_grained, 0.05),
    "satin": (_sheen, 0.8),
    "knit": (_knit, 0.0),
    "linen": (_weave, 0.0),
    "denim": (_twill, 0.0),
    "leather": (_grained, 0.7),
    "suede": (_mottled, 0.0),
    "canvas": (_weave, 0.05),
    "wicker": (_wicker, 0.1),
    "nylon": (None, 0.4),
    "straw": (_wicker, 0.1),
    "felt": (_woolly, 0.0),
    "velvet": (_sheen, 0.1),
    "wool": (_woolly, 0.0),
    "rattan": (_wicker, 0.2),
    "steel": (_brushed, 0.6),
    "glass": (_sheen, 1.0),
    "plastic": (None, 0.5),
    "glossy": (None, 1.0),
    "matte": (_grained, 0.0),
    "speckled": (_speckled, 0.3),
}


@functools.cache
def _noise_tile() -> np.ndarray:
    """float32[256, 256], about -1..1, smooth over three or four cells, periodic enough."""
    rng = np.random.default_rng(7)
    tile = np.zeros((256, 256), np.float32)
    for cells, weight in ((64, 1.0), (128, 0.7)):
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        tile += weight * np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC))
    return tile / (2.2 * tile.std())


def _noise(u: np.ndarray, v: np.ndarray, frequency: float) -> np.ndarray:
    columns = (u * frequency).astype(np.int32) & 255
    return _noise_tile()[(v * frequency).astype(np.int32) & 255, columns]


def grain(rng: random.Random, size: int) -> np.ndarray:
    """Sensor noise: a random window of one large tile, float32[S, S, 1], deviation 1."""
    tile = _grain_tile(size)
    y, x = rng.randrange(size), rng.randrange(size)
    return tile[y : y + size, x : x + size, None]


@functools.lru_cache(maxsize=4)
def _grain_tile(size: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2 * size, 2 * size)).astype(np.float32)


def background(rng: random.Random, size: int) -> np.ndarray:
    """A random window of one of the sets that sellers photograph on: float32[S, S, 3]."""
    plain, places = _sets(size)
    scene = rng.choice(plain if rng.random() < PLAIN_BACKGROUND_SHARE else places)
    spare = scene.shape[0] - size
    y, x = rng.randrange(spare), rng.randrange(spare)
    window = scene[y : y + size, x : x + size]
    return window[:, ::-1] if rng.random() < 0.5 else window


@functools.lru_cache(maxsize=4)
def _sets(size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Papers, and tables, walls and rooms: float32[1.5 S, 1.5 S, 3] each."""
    side = size + size // 2
    v, u = (np.mgrid[:side, :side].astype(np.float32) / size * 2) - 1
    vignette = 1 - 0.10 * (u * u + v * v)
    planks = 1 + 0.09 * _clouds(side, 3, 40) + 0.07 * _clouds(side, 6, 90)
    planks = planks * np.where(np.abs((v * 2.2) % 1 - 0.5) > 0.47, 0.72, 1.0)
    veins = 1 - 0.2 * np.exp(-30 * (_clouds(side, 5, 5) + 0.6 * np.sin(u * 3 + v * 2)) ** 2)
    across, along = _cells(u, v, 0.3)
    mortar = np.where((np.abs(across) > 0.45) | (np.abs(along) > 0.4), 1.25, 0.9)

    def paint(red: float, green: float, blue: float, light: np.ndarray) -> np.ndarray:
        return np.float32([red, green, blue]) * light[..., None].astype(np.float32)

    def room(wall: np.ndarray, floor: np.ndarray, height: float) -> np.ndarray:
        return np.where((v > height)[..., None], floor, wall)

    wood = paint(0.70, 0.50, 0.32, planks)
    dark_wood = paint(0.42, 0.28, 0.19, planks)
    bricks = paint(0.66, 0.42, 0.34, mortar + 0.06 * _clouds(side, 60, 60))
    concrete = paint(0.62, 0.62, 0.61, 1 + 0.06 * _clouds(side, 12, 12))
    papers = [
        paint(0.98, 0.98, 0.98, vignette),
        paint(0.96, 0.96, 0.97, 1 - 0.05 * v),
        paint(0.88, 0.89, 0.90, 1 - 0.2 * v),
        paint(0.93, 0.84, 0.80, vignette),
        paint(0.76, 0.86, 0.90, vignette),
        paint(0.30, 0.31, 0.34, vignette),
    ]
    places = [
        wood,
        dark_wood,
        paint(0.92, 0.92, 0.93, veins),
        paint(0.80, 0.76, 0.69, 1 + _weave(u * 0.7, v * 0.7)),
        concrete,
        bricks,
        paint(0.36, 0.50, 0.26, 1 + 0.25 * _clouds(side, 70, 70)),
        room(paint(0.88, 0.86, 0.80, vignette), wood, 0.55),
        room(paint(0.68, 0.76, 0.72, vignette), dark_wood, 0.6),
        room(bricks, concrete, 0.6),
    ]
    return papers, places


def _clouds(side: int, columns: int, rows: int) -> np.ndarray:
    """Smooth noise, float32[side, side], deviation 1 at its knots."""
    knots = np.random.default_rng(columns * rows).standard_normal((rows, columns))
    image = Image.fromarray(knots.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
