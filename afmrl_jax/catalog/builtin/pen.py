"""Draws a product as flat parts, seen from some viewpoint; light and cloth come later (photo.py).

Object space: x right, y down, the product fills about [-1, 1]². Two images are drawn side by side:
`albedo`, the parts' own colours, and `layers`: coverage (is there product?), fabric (is it of the
main material, with the product's pattern?), shade (creases and hollows; 128 is neutral).
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from afmrl_jax.catalog.builtin.vocabulary import COLOURS

Rgb = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

METALS: dict[str, Rgb] = {
    "gold": (206, 164, 76),
    "silver": (196, 200, 206),
    "rose gold": (216, 154, 134),
    "oak": (196, 152, 98),
    "walnut": (104, 68, 44),
}
PAINTS: dict[str, Rgb] = {**COLOURS, **METALS}

_STEPS = 4  # points a segment of a smooth outline


def _catmull_rom() -> np.ndarray:
    """float64[STEPS, 4]: weights of four neighbouring knots at each step of a segment."""
    t = np.arange(_STEPS)[:, None] / _STEPS
    powers = np.concatenate([np.ones_like(t), t, t**2, t**3], axis=1)
    basis = 0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
    return powers @ basis


_WEIGHTS = _catmull_rom()
_CIRCLE = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 25)[:-1]]


def both_sides(right: Points) -> list[tuple[float, float]]:
    """A symmetric outline from its right half, listed from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def smooth_line(points: Points, *, closed: bool = False) -> list[tuple[float, float]]:
    """A curve through all points (Catmull-Rom)."""
    p = np.asarray(points, np.float64)
    ends = (p[-1:], p, p[:2]) if closed else (p[:1], p, p[-1:])
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(ends), 4, axis=0)
    curve = np.einsum("sdk,tk->std", windows, _WEIGHTS).reshape(-1, 2)
    return [(x, y) for x, y in (curve if closed else [*curve, p[-1]])]


def darker(colour: Rgb, factor: float = 0.7) -> Rgb:
    """The same colour with less light, or with more where factor > 1.

    The darkest colours have no darker shade that shows: their seams and hollows are lighter.
    """
    lift = 110 * (1 - factor) if factor < 1 and sum(colour) < 200 else 0
    r, g, b = (min(255, int(c * (1 if lift else factor) + lift)) for c in colour)
    return r, g, b


class Pen:
    """Fills outlines given in object space; later parts hide earlier ones.

    size: pixels a side. matrix: float64[3, 3], object space -> pixels (a homography).
    main: the colour of parts drawn without a colour of their own, which are fabric.
    """

    def __init__(self, size: int, matrix: np.ndarray, main: Rgb):
        self.main = main
        self.albedo = Image.new("RGB", (size, size))
        self.layers = Image.new("RGB", (size, size), (0, 0, 128))
        self._albedo = ImageDraw.Draw(self.albedo)
        self._layers = ImageDraw.Draw(self.layers)
        self._matrix = matrix.T
        self._scale = math.sqrt(abs(float(np.linalg.det(matrix[:2, :2]))))

    def shape(
        self,
        points: Points,
        colour: Rgb | None = None,
        *,
        smooth: bool = False,
        shade: float = 0.0,
        fabric: bool | None = None,
    ) -> None:
        """A filled outline; shade in [-1, 1] darkens or lightens it."""
        pixels = self._project(smooth_line(points, closed=True) if smooth else points)
        fabric = colour is None if fabric is None else fabric
        self._albedo.polygon(pixels, fill=colour or self.main)
        self._layers.polygon(pixels, fill=(255, 255 * fabric, int(128 + 127 * shade)))

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: Rgb | None = None,
        *,
        shade: float = 0.0,
        fabric: bool | None = None,
    ) -> None:
        outline = [(x + rx * c, y + ry * s) for c, s in _CIRCLE]
        self.shape(outline, colour, shade=shade, fabric=fabric)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, colour: Rgb | None = None, **how
    ) -> None:
        self.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, **how)

    def line(
        self,
        points: Points,
        width: float,
        colour: Rgb | None = None,
        *,
        smooth: bool = False,
        fabric: bool = False,
    ) -> None:
        """A stroke of the given width (object units, at least one pixel)."""
        pixels = self._project(smooth_line(points) if smooth else points)
        thick = max(1, round(width * self._scale))
        self._albedo.line(pixels, fill=colour or self.main, width=thick, joint="curve")
        self._layers.line(pixels, fill=(255, 255 * fabric, 128), width=thick, joint="curve")

    def crease(self, points: Points, width: float = 0.03, depth: float = -0.35) -> None:
        """A fold or seam across fabric: changes the light there, not the colour."""
        thick = max(1, round(width * self._scale))
        fill = (255, 255, int(128 + 127 * depth))
        self._layers.line(self._project(points), fill=fill, width=thick)

    def _project(self, points: Points | np.ndarray) -> list[float]:
        xy = np.asarray(points, np.float64)
        uvw = xy @ self._matrix[:2] + self._matrix[2]
        return (uvw[:, :2] / uvw[:, 2:]).ravel().tolist()
