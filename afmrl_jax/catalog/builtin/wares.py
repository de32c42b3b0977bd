"""Drawings of small hard goods: watch, mug, bottle."""

import itertools
import math
from collections.abc import Mapping

from afmrl_jax.catalog.builtin.pen import PAINTS, Pen, both_sides, darker, smooth_line

Attributes = Mapping[str, str]
_STEEL = (196, 200, 206)


def watch(pen: Pen, a: Attributes) -> None:
    metal, dial = PAINTS[a["case"]], PAINTS[a["dial"]]
    _strap(pen, a["strap"], metal)
    pen.box(0.5, -0.06, 0.62, 0.06, darker(metal, 0.75))
    shape = a["shape"]
    _dial_plate(pen, shape, 0.54, metal, 0.0)
    if a["bezel"] == "diver bezel":
        _dial_plate(pen, shape, 0.49, (30, 32, 40), -0.05)
        for i in range(12):
            x, y = _clock(i, 0.45, shape)
            pen.oval(x, y, 0.024, 0.024, (240, 240, 236))
        face = 0.39
    else:
        _dial_plate(pen, shape, 0.47, darker(metal, 0.72), 0.1)
        face = 0.44
    _dial_plate(pen, shape, face, dial, 0.0)
    ink = (240, 240, 236) if sum(dial) < 400 else (40, 42, 50)
    _numerals(pen, a["numerals"], face, shape, ink)
    _complication(pen, a["complication"], ink, dial)
    pen.line([(0, 0), (-0.14, -0.17)], 0.05, ink)
    pen.line([(0, 0), (0.2, -0.24)], 0.035, ink)
    pen.oval(0, 0, 0.04, 0.04, metal)


def _strap(pen: Pen, kind: str, metal) -> None:
    half = {"steel links": 0.27, "leather strap": 0.24}.get(kind, 0.26)
    for side in (-1, 1):
        ends = [
            (-half, side * 0.36),
            (half, side * 0.36),
            (half * 0.84, side),
            (-half * 0.84, side),
        ]
        if kind == "steel links":
            pen.shape(ends, darker(metal, 0.9))
            for i in range(5):
                y = side * (0.5 + 0.11 * i)
                pen.line([(-half, y), (half, y)], 0.025, darker(metal, 0.5))
            for x in (-0.09, 0.09):
                pen.line([(x, side * 0.4), (x * 0.9, side)], 0.02, darker(metal, 0.55))
            pen.box(-0.08, side * 0.42, 0.08, side * 0.98, fabric=True, shade=0.1)
            continue
        pen.shape(ends)
        if kind == "leather strap":
            for x in (-0.19, 0.19):
                pen.line([(x, side * 0.4), (x * 0.8, side * 0.97)], 0.022, (238, 226, 200))
            for y in (0.74, 0.86):
                pen.oval(0, side * y, 0.03, 0.022, darker(pen.main, 0.35))
        elif kind == "rubber strap":
            for i in range(5):
                y = side * (0.52 + 0.1 * i)
                pen.line([(-0.2, y), (0.2, y)], 0.045, darker(pen.main, 0.6))
        else:
            pen.shape(
                [(-0.08, side * 0.4), (0.08, side * 0.4), (0.07, side), (-0.07, side)],
                (236, 232, 222),
            )


def _dial_plate(pen: Pen, shape: str, r: float, colour, shade: float) -> None:
    if shape == "round":
        pen.oval(0, 0, r, r, colour, shade=shade)
    elif shape == "square":
        pen.shape(
            both_sides(
                [(r * 0.8, -r * 0.92), (r * 0.9, -r * 0.8), (r * 0.9, r * 0.8), (r * 0.8, r * 0.92)]
            ),
            colour,
            shade=shade,
        )
    else:
        pen.shape(
            both_sides(
                [
                    (r * 0.62, -r),
                    (r * 0.86, -r * 0.5),
                    (r * 0.9, 0),
                    (r * 0.86, r * 0.5),
                    (r * 0.62, r),
                ]
            ),
            colour,
            shade=shade,
        )


def _clock(hour: float, r: float, shape: str) -> tuple[float, float]:
    angle = hour * math.pi / 6
    x, y = math.sin(angle), -math.cos(angle)
    if shape == "round":
        return r * x, r * y
    stretch = 1 / max(abs(x), abs(y))
    squeeze = 0.86 if shape == "square" else 0.78
    return r * squeeze * x * stretch * 0.98, r * y * stretch * 0.86


def _numerals(pen: Pen, kind: str, face: float, shape: str, ink) -> None:
    if kind == "no numerals":
        return
    for i in range(12):
        x, y = _clock(i, face * 0.86, shape)
        if kind == "dots":
            r = 0.035 if i % 3 else 0.055
            pen.oval(x, y, r, r, ink)
        elif kind == "bars":
            pen.line([(x * 0.8, y * 0.8), (x, y)], 0.04 if i % 3 else 0.06, ink)
        elif i % 3 == 0:
            for shift in (-0.05, 0.0, 0.05):
                pen.line(
                    [(x * 0.76 + shift, y * 0.86 - 0.06), (x * 0.76 + shift, y * 0.86 + 0.06)],
                    0.022,
                    ink,
                )
            for edge in (-0.06, 0.06):
                pen.line(
                    [(x * 0.76 - 0.08, y * 0.86 + edge), (x * 0.76 + 0.08, y * 0.86 + edge)],
                    0.018,
                    ink,
                )


def _complication(pen: Pen, kind: str, ink, dial) -> None:
    if kind == "date window":
        pen.box(0.12, -0.1, 0.35, 0.1, (250, 250, 246))
        pen.box(0.17, -0.06, 0.3, 0.06, (190, 30, 40))
    elif kind == "chronograph":
        for x, y in ((-0.19, 0.02), (0.19, 0.02), (0.0, 0.2)):
            pen.oval(x, y, 0.11, 0.11, ink)
            pen.oval(x, y, 0.085, 0.085, darker(dial, 0.8))
            pen.line([(x, y), (x + 0.04, y - 0.06)], 0.02, ink)
    elif kind == "moon phase":
        pen.oval(0, 0.2, 0.17, 0.12, (34, 44, 100))
        pen.oval(0.03, 0.19, 0.07, 0.07, (246, 220, 120))


_MUG_SIDES = {
    "straight": ((0.46, -0.62), (0.46, 0.58)),
    "tapered": ((0.54, -0.62), (0.36, 0.58)),
    "belly": smooth_line([(0.42, -0.62), (0.44, -0.3), (0.6, 0.1), (0.54, 0.42), (0.38, 0.58)]),
    "flared": smooth_line([(0.62, -0.62), (0.47, -0.3), (0.4, 0.2), (0.42, 0.58)]),
}


def mug(pen: Pen, a: Attributes) -> None:
    sides = _MUG_SIDES[a["shape"]]
    top_half, bottom_half = sides[0][0], sides[-1][0]
    _mug_handle(pen, a["handle"], sides)
    if a["base"] == "footed":
        pen.shape(
            both_sides(
                [(bottom_half * 0.6, 0.56), (bottom_half * 0.6, 0.7), (bottom_half * 0.8, 0.8)]
            ),
            shade=-0.15,
        )
        pen.oval(0, 0.8, bottom_half * 0.8, 0.05, shade=-0.15)
    pen.oval(0, 0.58, bottom_half, 0.1)
    pen.shape(both_sides(sides))
    if a["base"] == "dipped base":
        dip = darker(pen.main, 0.5) if sum(pen.main) > 330 else (236, 226, 206)
        width_at = _half_width(sides, 0.28)
        lower = [(x, y) for x, y in sides if y > 0.28]
        pen.shape(
            both_sides([(width_at, 0.28), *lower, (bottom_half * 0.7, 0.65), (0.0, 0.68)]), dip
        )
    inside = PAINTS[a["inside"]]
    rim = {"gold rim": (214, 172, 78), "dark rim": (50, 46, 50)}.get(a["rim"])
    pen.oval(0, -0.62, top_half, 0.15, rim or darker(pen.main, 1.12))
    pen.oval(0, -0.61, top_half - 0.06, 0.11, inside)
    pen.oval(0, -0.58, top_half - 0.12, 0.07, darker(inside, 0.72))
    if rim:
        width_at = _half_width(sides, -0.5)
        pen.line(
            [
                (-width_at, -0.52),
                (-width_at * 0.6, -0.43),
                (0, -0.4),
                (width_at * 0.6, -0.43),
                (width_at, -0.52),
            ],
            0.06,
            rim,
            smooth=True,
        )


def _half_width(sides, y: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(sides):
        if y0 <= y <= y1:
            return x0 + (x1 - x0) * (y - y0) / (y1 - y0)
    return sides[-1][0]


def _mug_handle(pen: Pen, kind: str, sides) -> None:
    upper, lower = _half_width(sides, -0.3) - 0.03, _half_width(sides, 0.3) - 0.03
    if kind == "round handle":
        path = [(upper, -0.34), (0.8, -0.3), (0.9, 0.0), (0.78, 0.28), (lower, 0.34)]
        pen.line(path, 0.12, smooth=True, fabric=True)
    elif kind == "square handle":
        pen.line([(upper, -0.34), (0.86, -0.34), (0.86, 0.32), (lower, 0.32)], 0.13, fabric=True)
    elif kind == "ear handle":
        path = [(upper, -0.4), (0.86, -0.56), (0.92, -0.3), (0.7, 0.05), (lower, 0.2)]
        pen.line(path, 0.1, smooth=True, fabric=True)


_BOTTLE_SIDES = {
    "cylinder": ((0.32, -0.58), (0.34, -0.54), (0.34, 0.94)),
    "shoulder": smooth_line(
        [(0.17, -0.6), (0.18, -0.46), (0.35, -0.24), (0.37, 0.0), (0.37, 0.94)]
    ),
    "hourglass": smooth_line([(0.3, -0.58), (0.35, -0.4), (0.25, 0.06), (0.36, 0.5), (0.35, 0.94)]),
    "square": ((0.2, -0.6), (0.2, -0.52), (0.42, -0.5), (0.42, 0.92)),
}


def bottle(pen: Pen, a: Attributes) -> None:
    sides = _BOTTLE_SIDES[a["shape"]]
    neck, foot = sides[0], sides[-1]
    lid = PAINTS[a["lid"]]
    _bottle_cap(pen, a["cap"], neck[0], lid)
    pen.shape(both_sides([*sides, (foot[0] * 0.9, 0.98)]))
    if a["material"] == "glass":
        for x, width, depth in ((-0.55, 0.07, 0.75), (0.62, 0.04, 0.6), (0.15, 0.16, 0.25)):
            pen.crease([(x * foot[0], -0.2), (x * foot[0], 0.86)], width, depth)
    elif a["material"] == "steel":
        pen.box(-foot[0], 0.88, foot[0], 0.97, _STEEL)
        pen.box(-neck[0], neck[1], neck[0], neck[1] + 0.09, _STEEL)
    if a["sleeve"] == "rubber boot":
        pen.shape(
            both_sides([(foot[0] + 0.03, 0.66), (foot[0] + 0.03, 0.96), (foot[0] * 0.9, 1.0)]),
            darker(lid, 0.85),
        )
    elif a["sleeve"] == "grip band":
        width = _half_width(sides, 0.12) + 0.03
        pen.box(-width, 0.0, width, 0.26, darker(lid, 0.85))
        for y in (0.06, 0.13, 0.2):
            pen.line([(-width, y), (width, y)], 0.02, darker(lid, 0.55))
    contrast = (248, 246, 240) if sum(pen.main) < 440 else (52, 58, 74)
    if a["print"] == "logo print":
        pen.oval(0, 0.46, 0.15, 0.15, contrast)
        pen.shape([(-0.03, 0.36), (0.08, 0.46), (-0.03, 0.56)], pen.main)
    elif a["print"] == "mountain print":
        ridge = [(-0.27, 0.6), (-0.1, 0.32), (-0.02, 0.42), (0.1, 0.26), (0.27, 0.6)]
        pen.shape(ridge, contrast)
        pen.shape([(0.1, 0.26), (0.02, 0.4), (0.1, 0.38), (0.16, 0.42)], pen.main)


def _bottle_cap(pen: Pen, kind: str, neck: float, lid) -> None:
    half = neck + 0.03
    if kind == "screw cap":
        pen.box(-half, -0.8, half, -0.54, lid)
        for i in range(-2, 3):
            pen.line([(i * half / 2.6, -0.78), (i * half / 2.6, -0.58)], 0.022, darker(lid, 0.65))
    elif kind == "flip cap":
        pen.shape(both_sides([(half * 0.6, -0.84), (half, -0.72), (half, -0.54)]), lid)
        pen.shape(
            [(half * 0.2, -0.84), (half + 0.16, -0.9), (half + 0.14, -0.78), (half * 0.6, -0.72)],
            darker(lid, 0.7),
        )
    elif kind == "straw cap":
        pen.shape(both_sides([(half * 0.8, -0.72), (half, -0.54)]), lid)
        pen.line([(-0.02, -0.68), (0.0, -0.92), (0.17, -0.99)], 0.09, darker(lid, 0.75))
    else:
        pen.line(
            [(-half * 0.8, -0.66), (-half * 0.7, -0.94), (half * 0.7, -0.94), (half * 0.8, -0.66)],
            0.08,
            darker(lid, 0.8),
            smooth=True,
        )
        pen.box(-half, -0.72, half, -0.54, lid)
