"""Drawings of what stands in a room: lamp, chair, sofa."""

from collections.abc import Mapping

from afmrl_jax.catalog.builtin.pen import PAINTS, Pen, both_sides, darker, smooth_line

Attributes = Mapping[str, str]


def lamp(pen: Pen, a: Attributes) -> None:
    finish = PAINTS[a["finish"]]
    tall = a["height"] == "tall"
    shade_top, shade_low = (-0.96, -0.26) if tall else (-0.78, 0.02)
    _lamp_base(pen, a["base"], shade_low - 0.08, finish, 0.96 if tall else 0.8)
    if a["switch"] == "pull chain":
        pen.line([(0.26, shade_low - 0.05), (0.26, shade_low + 0.34)], 0.035, (214, 184, 104))
        pen.oval(0.26, shade_low + 0.38, 0.065, 0.065, (214, 184, 104))
    elif a["switch"] == "cord switch":
        low = 0.96 if tall else 0.8
        pen.line(
            [(0.1, low - 0.06), (0.5, low - 0.02), (0.74, low - 0.1), (0.98, low)],
            0.03,
            (44, 44, 48),
            smooth=True,
        )
        pen.box(0.58, low - 0.13, 0.76, low - 0.03, (240, 240, 236))
    rights = {
        "cone shade": [(0.2, shade_top), (0.64, shade_low)],
        "drum shade": [(0.5, shade_top + 0.06), (0.5, shade_low)],
        "dome shade": smooth_line(
            [(0.1, shade_top), (0.42, shade_top + 0.14), (0.6, shade_low - 0.2), (0.62, shade_low)]
        ),
    }
    if a["shade"] == "globe shade":
        middle, radius = (shade_top + shade_low) / 2, (shade_low - shade_top) / 2
        pen.oval(0, middle, radius * 1.08, radius)
        edges = [(radius * 0.62, shade_top + 0.1), (radius * 0.62, shade_low - 0.08)]
    else:
        right = rights[a["shade"]]
        pen.shape(both_sides(right))
        pen.oval(0, shade_low, right[-1][0], 0.045, (255, 240, 200))
        edges = [right[0], right[-1]]
    if a["edge"] == "trim bands":
        for (x, y), shift in zip(edges, (0.04, -0.04)):
            pen.line([(-x, y + shift), (x, y + shift)], 0.07, finish)
    elif a["edge"] == "fringe":
        x, y = edges[1]
        n = 14
        for i in range(n + 1):
            t = x * (-1 + 2 * i / n)
            pen.line([(t, y - 0.02), (t, y + 0.15)], 0.04, darker(finish, 0.8 + 0.2 * (i % 2)))


def _lamp_base(pen: Pen, kind: str, top: float, finish, low: float) -> None:
    dark = darker(finish, 0.7)
    pen.box(-0.035, top - 0.1, 0.035, top + 0.16, dark)
    if kind == "column base":
        pen.box(-0.075, top, 0.075, low - 0.06, finish)
        pen.box(0.025, top, 0.075, low - 0.06, dark)
        pen.oval(0, low - 0.05, 0.36, 0.075, finish)
    elif kind == "tripod base":
        for x in (-0.44, 0.06, 0.44):
            pen.line([(x * 0.12, top), (x, low)], 0.07, finish if x else dark)
        pen.oval(0, top + 0.1, 0.1, 0.06, dark)
    elif kind == "gourd base":
        middle = (top + low) / 2
        pen.oval(0, middle - 0.14, 0.19, 0.2, finish)
        pen.oval(0, low - 0.28, 0.31, 0.26, finish)
        pen.oval(0.1, low - 0.26, 0.13, 0.2, dark)
        pen.box(-0.2, low - 0.06, 0.2, low, dark)
    else:
        pen.line(
            [(0, top + 0.02), (0.3, top + 0.2), (0.34, low - 0.2), (0.0, low - 0.06)],
            0.08,
            finish,
            smooth=True,
        )
        pen.oval(0, low - 0.04, 0.34, 0.07, dark)


def chair(pen: Pen, a: Attributes) -> None:
    finish = PAINTS[a["finish"]]
    _legs(pen, a["legs"], finish, half=0.42, top=0.32, low=0.97)
    backs = {
        "oval back": smooth_line(
            [(0.0, -0.9), (0.3, -0.82), (0.46, -0.5), (0.42, -0.12), (0.3, 0.14)]
        ),
        "square back": [(0.0, -0.88), (0.46, -0.88), (0.44, 0.14)],
        "wing back": smooth_line(
            [(0.0, -0.9), (0.34, -0.94), (0.6, -0.78), (0.56, -0.1), (0.46, 0.14)]
        ),
        "low back": smooth_line([(0.0, -0.42), (0.46, -0.38), (0.56, -0.1), (0.46, 0.14)]),
    }
    right = backs[a["back"]]
    pen.shape(both_sides(right))
    if a["back"] == "wing back":
        for side in (-1, 1):
            pen.crease([(side * 0.4, -0.86), (side * 0.4, 0.1)], 0.04, -0.4)
    _stitching(pen, a["stitching"], 0.34, right[0][1] + 0.1, 0.05)
    if a["arms"] != "no arms":
        height = 0.02 if a["arms"] == "low arms" else -0.22
        for side in (-1, 1):
            pen.line(
                [(side * 0.46, height + 0.04), (side * 0.66, height), (side * 0.66, 0.3)],
                0.1,
                darker(finish, 0.9),
            )
    pen.shape(
        both_sides([(0.0, 0.08), (0.46, 0.1), (0.58, 0.26), (0.54, 0.4), (0.0, 0.42)]), shade=0.12
    )
    pen.crease([(-0.56, 0.27), (0.56, 0.27)], 0.035, -0.45)
    pen.crease([(-0.44, 0.1), (0.44, 0.1)], 0.03, -0.5)
    if a["cushion"] != "no cushion":
        colour = PAINTS[a["cushion"].split()[0]]
        pen.shape([(-0.22, -0.26), (0.16, -0.32), (0.22, 0.06), (-0.18, 0.1)], colour)
        pen.line([(-0.14, -0.2), (0.14, 0.0)], 0.02, darker(colour, 0.75))


def _stitching(pen: Pen, kind: str, half: float, top: float, low: float) -> None:
    if kind == "buttoned":
        for i, y in enumerate((top + 0.08, (top + low) / 2, low - 0.06)):
            for x in (-0.6, 0.0, 0.6) if i % 2 == 0 else (-0.3, 0.3):
                pen.oval(x * half, y, 0.045, 0.04, darker(pen.main, 0.55))
    elif kind == "channelled":
        for i in range(-2, 3):
            pen.crease([(i * half * 0.42, top), (i * half * 0.42, low)], 0.035, -0.5)
    elif kind == "cross stitch":
        contrast = (246, 242, 230) if sum(pen.main) < 460 else (70, 62, 60)
        pen.line([(-half * 0.8, top), (half * 0.8, low)], 0.03, contrast)
        pen.line([(half * 0.8, top), (-half * 0.8, low)], 0.03, contrast)


def _legs(pen: Pen, kind: str, finish, *, half: float, top: float, low: float) -> None:
    dark = darker(finish, 0.65)
    if kind == "pedestal":
        pen.box(-0.06, top, 0.06, low - 0.06, finish)
        pen.oval(0, low - 0.05, half, 0.08, finish)
        pen.oval(0, low - 0.06, half * 0.7, 0.04, dark)
        return
    for side in (-1, 1):
        x = side * half
        inner = side * half * 0.62
        if kind == "tapered legs":
            pen.line([(inner, top), (inner * 1.08, low - 0.1)], 0.07, dark)
            pen.shape(
                [(x - 0.07, top), (x + 0.07, top), (x * 1.16 + 0.03, low), (x * 1.16 - 0.03, low)],
                finish,
            )
        elif kind == "hairpin legs":
            pen.line([(x - 0.1, top), (x * 1.1, low), (x + 0.1, top)], 0.04, finish)
            pen.line([(inner - 0.08, top), (inner, low - 0.1), (inner + 0.08, top)], 0.03, dark)
        elif kind == "block legs":
            pen.box(x - 0.12, top, x + 0.12, low, finish)
        else:
            pen.line([(x, top), (x, low)], 0.07, finish)
            pen.line([(inner, top), (inner, low - 0.08)], 0.05, dark)
            pen.line([(x * 1.2, low), (inner * 0.8, low - 0.08)], 0.06, finish)


def sofa(pen: Pen, a: Attributes) -> None:
    seats = {"two seats": 2, "three seats": 3, "four seats": 4}[a["seats"]]
    half = 0.62 + 0.09 * seats
    kind = a["arms"]
    _legs(pen, a["legs"], PAINTS[a["finish"]], half=half * 0.86, top=0.4, low=0.62)
    pen.shape(
        both_sides([(half * 0.5, -0.5), (half * 0.94, -0.46), (half, -0.3), (half, 0.3)]),
        shade=-0.06,
    )
    _stitching(pen, a["back"], half * 0.8, -0.4, -0.02)
    seat_half = half - {"rolled arms": 0.16, "square arms": 0.14, "slim arms": 0.04}[kind]
    pen.shape([(-half, 0.26), (half, 0.26), (half, 0.46), (-half, 0.46)], shade=-0.2)
    width = 2 * seat_half / seats
    for i in range(seats):
        x = -seat_half + i * width
        pen.shape(
            [
                (x + 0.015, 0.06),
                (x + width - 0.015, 0.06),
                (x + width - 0.005, 0.3),
                (x + 0.005, 0.3),
            ],
            shade=0.14,
        )
        pen.crease([(x, -0.02), (x, 0.3)], 0.035, -0.5)
    pen.crease([(-seat_half, 0.3), (seat_half, 0.3)], 0.04, -0.45)
    pen.crease([(-seat_half, 0.05), (seat_half, 0.05)], 0.03, -0.5)
    for side in (-1, 1):
        x = side * half
        if kind == "rolled arms":
            pen.box(min(x, x - side * 0.16), -0.06, max(x, x - side * 0.16), 0.46, shade=0.02)
            pen.oval(x - side * 0.06, -0.08, 0.15, 0.14, shade=0.1)
            pen.oval(x - side * 0.06, -0.08, 0.07, 0.065, shade=-0.3)
        elif kind == "square arms":
            pen.box(min(x, x - side * 0.2), -0.16, max(x, x - side * 0.2), 0.47, shade=0.1)
            pen.crease([(x - side * 0.2, -0.16), (x - side * 0.2, 0.46)], 0.03, -0.5)
        else:
            pen.box(min(x, x - side * 0.07), 0.0, max(x, x - side * 0.07), 0.46, shade=-0.1)
    if a["pillows"] != "no pillows":
        colour = PAINTS[a["pillows"].split()[0]]
        for side in (-1, 1):
            x = side * seat_half * 0.74
            pen.shape(
                [(x - 0.15, -0.24), (x + 0.13, -0.28), (x + 0.16, 0.06), (x - 0.13, 0.1)], colour
            )
            pen.line([(x - 0.08, -0.16), (x + 0.08, 0.0)], 0.02, darker(colour, 0.75))
