"""Drawings of what people carry: handbag, backpack."""

from collections.abc import Mapping

from afmrl_jax.catalog.builtin.pen import PAINTS, Pen, both_sides, darker, smooth_line

Attributes = Mapping[str, str]


def handbag(pen: Pen, a: Attributes) -> None:
    metal = PAINTS[a["hardware"]]
    outlines = {
        "tote": [(0.62, -0.3), (0.72, 0.72)],
        "saddle bag": smooth_line([(0.58, -0.3), (0.72, 0.2), (0.5, 0.62), (0.0, 0.74)]),
        "box bag": [(0.74, -0.14), (0.74, 0.62)],
        "bucket bag": [(0.46, -0.36), (0.56, 0.3), (0.48, 0.76)],
    }
    right = outlines[a["shape"]]
    top, width = right[0][1], right[0][0]
    _bag_handle(pen, a["handle"], top, width, metal)
    body = both_sides([(0.0, top), *right])
    pen.shape(body)
    low = right[-1][1]
    pen.crease([(-width * 0.98, top + 0.06), (width * 0.98, top + 0.06)], 0.025, -0.35)
    if a["shape"] == "box bag":
        pen.shape([(-0.74, -0.14), (0.74, -0.14), (0.66, -0.24), (-0.66, -0.24)], shade=0.2)
        for side in (-1, 1):
            pen.crease([(side * 0.66, -0.1), (side * 0.66, 0.6)], 0.025, -0.3)
    elif a["shape"] == "bucket bag":
        pen.oval(0, top, width, 0.07, darker(pen.main, 0.45))
        pen.crease([(-0.5, low - 0.18), (0.5, low - 0.18)], 0.03, -0.35)
    elif a["shape"] == "tote":
        for side in (-1, 1):
            pen.crease([(side * 0.52, top + 0.1), (side * 0.6, low - 0.04)], 0.025, -0.2)
    _bag_closure(pen, a["closure"], top, width, metal)
    for side in (-1, 1):
        x = {"top handle": 0.3, "two handles": 0.36}.get(a["handle"], width * 0.93)
        pen.oval(side * x, top + 0.05, 0.065, 0.065, metal)
    _charm(pen, a["charm"], top, width)


def _bag_handle(pen: Pen, kind: str, top: float, width: float, metal) -> None:
    strap = darker(pen.main, 0.62)
    if kind == "top handle":
        arc = [(-0.3, top + 0.06), (-0.26, top - 0.3), (0.0, top - 0.42), (0.26, top - 0.3)]
        pen.line([*arc, (0.3, top + 0.06)], 0.09, strap, smooth=True)
    elif kind == "two handles":
        for shift, shade in ((0.09, 0.45), (-0.06, 0.75)):
            arc = [(-0.36, top + 0.1), (-0.3, top - 0.36), (0.3, top - 0.36), (0.36, top + 0.1)]
            pen.line(
                [(x + shift, y + shift / 2) for x, y in arc],
                0.06,
                darker(pen.main, shade),
                smooth=True,
            )
    else:
        arc = [
            (-width * 0.95, top + 0.1),
            (-width * 0.6, -0.84),
            (0.0, -0.98),
            (width * 0.6, -0.84),
        ]
        arc.append((width * 0.95, top + 0.1))
        if kind == "shoulder strap":
            pen.line(arc, 0.07, strap, smooth=True)
        else:
            pen.line(arc, 0.05, metal, smooth=True)
            n = 15
            for i in range(n):
                t = -1 + 2 * (i + 0.5) / n
                y = -0.98 + (top + 1.08) * abs(t) ** 2.6
                pen.oval(t * width * 0.95, y, 0.05, 0.05, metal if i % 2 else darker(metal, 0.6))


def _bag_closure(pen: Pen, kind: str, top: float, width: float, metal) -> None:
    if kind == "zip":
        pen.line([(-width * 0.9, top + 0.13), (width * 0.9, top + 0.13)], 0.06, darker(metal, 0.75))
        pen.box(width * 0.55, top + 0.13, width * 0.55 + 0.07, top + 0.34, metal)
    elif kind == "flap":
        w = width * 0.97
        flap = both_sides([(w, top), (w, top + 0.26), (w * 0.6, top + 0.48), (0.0, top + 0.54)])
        pen.shape(flap, shade=0.1)
        pen.crease(flap[1:-1], 0.03, -0.55)
        pen.oval(0, top + 0.44, 0.05, 0.05, metal)
    elif kind == "turn lock":
        pen.shape(
            both_sides([(0.17, top), (0.17, top + 0.3), (0.0, top + 0.36)]), darker(pen.main, 0.7)
        )
        pen.box(-0.13, top + 0.14, 0.13, top + 0.3, metal)
        pen.box(-0.025, top + 0.08, 0.025, top + 0.36, darker(metal, 0.6))
    else:
        ribbon = darker(pen.main, 0.55 if sum(pen.main) > 240 else 2.4)
        for side in (-1, 1):
            pen.shape(
                [(0, top + 0.2), (side * 0.34, top + 0.04), (side * 0.34, top + 0.36)], ribbon
            )
            pen.shape(
                [(0, top + 0.2), (side * 0.24, top + 0.56), (side * 0.1, top + 0.6)],
                darker(ribbon, 0.8),
            )
        pen.oval(0, top + 0.2, 0.08, 0.08, darker(ribbon, 0.7))


def _charm(pen: Pen, kind: str, top: float, width: float) -> None:
    x, y = -width * 0.66, top + 0.1
    if kind == "tassel":
        pen.line([(x, y), (x, y + 0.16)], 0.03, (190, 150, 70))
        pen.shape(
            [
                (x - 0.04, y + 0.16),
                (x + 0.04, y + 0.16),
                (x + 0.11, y + 0.52),
                (x - 0.11, y + 0.52),
            ],
            (196, 52, 70),
        )
        pen.box(x - 0.06, y + 0.16, x + 0.06, y + 0.24, (226, 190, 90))
    elif kind == "scarf":
        pen.shape(
            [(x - 0.1, y - 0.2), (x + 0.12, y - 0.16), (x + 0.1, y + 0.1), (x - 0.1, y + 0.08)],
            (44, 110, 190),
        )
        pen.shape(
            [(x - 0.04, y), (x + 0.08, y), (x + 0.24, y + 0.46), (x, y + 0.38)], (236, 196, 66)
        )
        pen.shape(
            [(x - 0.06, y), (x + 0.02, y), (x - 0.06, y + 0.5), (x - 0.24, y + 0.4)], (44, 110, 190)
        )


def backpack(pen: Pen, a: Attributes) -> None:
    trim = PAINTS[a["trim"]]
    width = 0.42 if a["shape"] == "slim" else 0.58
    if a["side_pocket"] == "side pockets":
        for side in (-1, 1):
            pen.shape(
                [
                    (side * width * 0.9, 0.14),
                    (side * (width + 0.16), 0.2),
                    (side * (width + 0.14), 0.66),
                    (side * width * 0.9, 0.72),
                ],
                darker(pen.main, 0.62),
                fabric=False,
            )
            pen.line([(side * width * 0.9, 0.14), (side * (width + 0.17), 0.2)], 0.05, trim)
    pen.line(
        [(-0.15, -0.74), (-0.14, -0.94), (0.14, -0.94), (0.15, -0.74)], 0.07, trim, smooth=True
    )
    for side in (-1, 1):
        strap = [(side * 0.3, -0.7), (side * (width + 0.1), -0.5), (side * (width + 0.07), 0.1)]
        pen.line(strap, 0.08, darker(trim, 0.8), smooth=True)
    if a["shape"] == "square":
        right = [(0.0, -0.78), (width, -0.78), (width + 0.03, 0.82)]
        pen.shape(both_sides(right))
    else:
        right = [
            (0.0, -0.82),
            (width * 0.7, -0.74),
            (width, -0.4),
            (width + 0.04, 0.5),
            (width * 0.92, 0.84),
        ]
        pen.shape(both_sides(right))
    _pack_pockets(pen, a["pockets"], width, trim)
    closure = a["closure"]
    if closure == "flap":
        w = width * 1.03
        flap = both_sides([(0.0, -0.84), (w * 0.75, -0.8), (w, -0.5), (w, -0.12), (w * 0.8, -0.06)])
        pen.shape(flap, shade=0.1)
        pen.crease([(-w, -0.1), (-w * 0.8, -0.05), (w * 0.8, -0.05), (w, -0.1)], 0.035, -0.55)
        for side in (-1, 1):
            pen.line([(side * 0.24, -0.34), (side * 0.24, 0.12)], 0.07, trim)
            pen.box(side * 0.24 - 0.06, -0.02, side * 0.24 + 0.06, 0.09, (200, 196, 188))
    elif closure == "roll top":
        pen.box(-width * 1.04, -0.9, width * 1.04, -0.66, shade=-0.15)
        pen.crease([(-width, -0.78), (width, -0.78)], 0.03, -0.4)
        for side in (-1, 1):
            pen.oval(side * width * 1.02, -0.78, 0.06, 0.12, darker(pen.main, 0.6))
        pen.line([(0, -0.9), (0, -0.3)], 0.07, trim)
        pen.box(-0.07, -0.52, 0.07, -0.4, (60, 60, 64))
    else:
        arc = [(-width * 0.92, -0.1), (-width * 0.8, -0.5), (0.0, -0.66), (width * 0.8, -0.5)]
        pen.line([*arc, (width * 0.92, -0.1)], 0.05, trim, smooth=True)
        pen.line([(width * 0.8, -0.48), (width * 0.88, -0.26)], 0.05, (216, 216, 214))


def _pack_pockets(pen: Pen, kind: str, width: float, trim) -> None:
    if kind == "no pocket":
        pen.line([(-width, 0.58), (width, 0.58)], 0.03, darker(pen.main, 0.6))
        return
    tops = (0.22,) if kind == "one pocket" else (0.44, -0.02)
    for y in tops:
        bottom = y + (0.5 if kind == "one pocket" else 0.34)
        w = width * 0.78
        outline = [
            (-w, y),
            (w, y),
            (w, bottom - 0.06),
            (w - 0.08, bottom),
            (-w + 0.08, bottom),
            (-w, bottom - 0.06),
        ]
        pen.shape(outline, shade=0.08)
        pen.line([*outline, outline[0]], 0.025, darker(pen.main, 0.5))
        pen.line([(-w, y + 0.06), (w, y + 0.06)], 0.045, trim)
