"""Drawings of what people wear: dress, shirt, shoe, hat. Each shows every visible attribute."""

from collections.abc import Mapping

from afmrl_jax.catalog.builtin.pen import PAINTS, Pen, both_sides, darker, smooth_line

Attributes = Mapping[str, str]
_METAL = (208, 178, 108)


def dress(pen: Pen, a: Attributes) -> None:
    foot = {"mini": 0.32, "knee length": 0.62, "maxi": 0.97}[a["length"]]
    flare = {"straight hem": 0.30, "flared hem": 0.62, "ruffled hem": 0.46}[a["hem"]]
    waist_y = -0.18
    _sleeves(pen, a["sleeves"], shoulder=(0.30, -0.78), pit=(0.27, -0.42), reach=0.0)
    halter = a["neckline"] == "halter neck" and a["sleeves"] == "sleeveless"
    bare = (0.13, -0.86) if halter else (0.24, -0.84)
    shoulder = bare if a["sleeves"] == "sleeveless" else (0.31, -0.82)
    armhole = (0.22, -0.5) if halter else (0.26, -0.62)
    side = [shoulder, armhole, (0.27, -0.42), (0.21, waist_y), (0.27, 0.05)]
    pen.shape(both_sides([(0.0, -0.84), *side, (flare, foot)]))
    if a["hem"] == "ruffled hem":
        steps = [-1 + 2 * i / 12 for i in range(13)]
        lower = [(flare * 1.12 * t, foot + (0.06 if i % 2 else 0.0)) for i, t in enumerate(steps)]
        pen.shape([(-flare, foot - 0.14), (flare, foot - 0.14), *reversed(lower)], shade=0.12)
        pen.crease([(-flare * 0.97, foot - 0.13), (flare * 0.97, foot - 0.13)], 0.03, -0.4)
        for t in steps[2:-2:2]:
            pen.crease([(t * flare, foot - 0.12), (t * flare * 1.1, foot)], 0.025, -0.3)
    folds = (-0.6, -0.2, 0.25, 0.65) if a["hem"] != "straight hem" else (-0.4, 0.4)
    for t in folds:
        pen.crease([(t * 0.2, 0.0), (t * flare, foot - 0.06)], 0.03, -0.22)
    _neckline(pen, a["neckline"])
    if a["waist"] == "belted":
        pen.box(-0.225, waist_y - 0.04, 0.225, waist_y + 0.05, (52, 38, 32))
        pen.box(-0.05, waist_y - 0.055, 0.05, waist_y + 0.065, _METAL)
        pen.box(-0.022, waist_y - 0.025, 0.022, waist_y + 0.035, (52, 38, 32))
    elif a["waist"] == "bow waist":
        ribbon = darker(pen.main, 0.55 if sum(pen.main) > 240 else 2.4)
        pen.box(-0.22, waist_y - 0.025, 0.22, waist_y + 0.035, ribbon)
        _bow(pen, 0.0, waist_y, 0.17, ribbon)
    else:
        pen.crease([(-0.2, waist_y), (0.2, waist_y)], 0.02, -0.3)


def _neckline(pen: Pen, kind: str) -> None:
    """Cuts the neck out as the dark inside of the back, with a thin seam."""
    inside = darker(pen.main, 0.42)
    openings = {
        "round neck": both_sides([(0.15, -0.86), (0.13, -0.72), (0.08, -0.64), (0.0, -0.62)]),
        "v-neck": both_sides([(0.17, -0.86), (0.0, -0.4)]),
        "square neck": both_sides([(0.16, -0.86), (0.16, -0.63)]),
        "boat neck": both_sides([(0.25, -0.86), (0.12, -0.78), (0.0, -0.765)]),
    }
    if kind in openings:
        pen.shape(openings[kind], inside, shade=-0.2)
        rim = openings[kind]
        pen.line(rim, 0.022, darker(pen.main, 0.7))
    else:
        pen.shape(both_sides([(0.13, -0.87), (0.10, -0.92), (0.0, -0.93)]), shade=-0.15)
        pen.crease(both_sides([(0.12, -0.86), (0.0, -0.85)]), 0.03, -0.5)


def _bow(pen: Pen, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    for side in (-1, 1):
        tail = [(x, y), (x + side * r * 0.75, y + r * 1.5), (x + side * r * 0.3, y + r * 1.6)]
        pen.shape(tail, darker(colour, 0.85))
        loop = [(x, y), (x + side * r * 1.1, y - r * 0.65), (x + side * r * 1.1, y + r * 0.65)]
        pen.shape(loop, colour)
    pen.oval(x, y, r * 0.28, r * 0.32, darker(colour, 0.8))


def _sleeves(
    pen: Pen,
    kind: str,
    *,
    shoulder: tuple[float, float],
    pit: tuple[float, float],
    reach: float,
) -> None:
    """Both sleeves; reach widens them for shirts."""
    (sx, sy), (px, py) = shoulder, pit
    for side in (-1, 1):
        if kind == "sleeveless":
            continue
        if kind == "short sleeves":
            outline = [(sx, sy), (sx + 0.3 + reach, sy + 0.27), (px + 0.19 + reach, py), (px, py)]
            cuff = outline[1:3]
        elif kind == "long sleeves":
            outline = [(sx, sy), (sx + 0.14 + reach, sy + 0.1), (0.7 + reach, 0.22)]
            outline += [(0.55 + reach, 0.28), (px, py)]
            cuff = outline[2:4]
        elif kind == "rolled sleeves":
            outline = [(sx, sy), (sx + 0.14 + reach, sy + 0.1), (0.6 + reach, -0.14)]
            outline += [(0.42 + reach, -0.06), (px, py)]
            cuff = outline[2:4]
        else:
            x, y = sx + 0.16, sy + 0.2
            pen.oval(side * x, y, 0.2, 0.19, shade=0.05)
            for t in (-0.08, 0.03, 0.12):
                pen.crease([(side * (x + t * 0.4), y - 0.16), (side * (x + t), y + 0.14)], 0.025)
            pen.box(side * x - 0.12, y + 0.14, side * x + 0.12, y + 0.21, shade=-0.12)
            continue
        pen.shape([(side * x, y) for x, y in outline], shade=-0.08)
        (x0, y0), (x1, y1) = cuff
        width = 0.1 if kind == "rolled sleeves" else 0.03
        if kind == "rolled sleeves":
            ends = [(side * x0, y0), (side * x1, y1)]
            pen.line(ends, width, darker(pen.main, 1.25 if sum(pen.main) < 500 else 0.85))
        else:
            pen.crease([(side * x0, y0), (side * x1, y1)], width, -0.35)
        pen.crease([(side * sx, sy), (side * px, py)], 0.02, -0.35)


def shirt(pen: Pen, a: Attributes) -> None:
    _sleeves(pen, a["sleeves"], shoulder=(0.36, -0.74), pit=(0.42, -0.3), reach=0.2)
    right = [(0.0, -0.8), (0.16, -0.84), (0.4, -0.72), (0.44, -0.3), (0.43, 0.74)]
    if a["hem"] == "curved hem":
        right[-1] = (0.43, 0.6)
        right += [(0.36, 0.74), (0.24, 0.84), (0.0, 0.87)]
    pen.shape(both_sides(right))
    pen.crease([(0.28, -0.1), (0.2, 0.6)], 0.04, -0.2)
    pen.crease([(-0.3, -0.15), (-0.24, 0.55)], 0.04, -0.2)
    bottom = 0.74 if a["hem"] == "straight hem" else 0.85
    _shirt_front(pen, a["closure"], bottom)
    _collar(pen, a["collar"])
    for side in {"no pocket": (), "chest pocket": (1,), "two pockets": (1, -1)}[a["pocket"]]:
        x0, x1 = sorted((side * 0.1, side * 0.33))
        outline = [(x0, -0.36), (x1, -0.36), (x1, -0.12), ((x0 + x1) / 2, -0.06), (x0, -0.12)]
        pen.shape(outline, shade=-0.12)
        pen.line([*outline, outline[0]], 0.022, darker(pen.main, 0.5))


def _shirt_front(pen: Pen, closure: str, bottom: float) -> None:
    contrast = (248, 246, 240) if sum(pen.main) < 420 else (60, 54, 52)
    end = -0.22 if closure == "half placket" else bottom
    if closure == "full zip":
        pen.box(-0.035, -0.72, 0.035, end, (70, 72, 78))
        pen.line([(0, -0.7), (0, end)], 0.02, (214, 216, 220))
        pen.box(-0.03, -0.6, 0.03, -0.48, (214, 216, 220))
        return
    pen.box(-0.055, -0.7, 0.055, end, shade=0.1)
    pen.crease([(0.055, -0.7), (0.055, end)], 0.02, -0.4)
    y = -0.56
    while y < end - 0.04:
        pen.oval(0, y, 0.03, 0.03, contrast)
        y += 0.17 if closure == "half placket" else 0.24


def _collar(pen: Pen, kind: str) -> None:
    inside = darker(pen.main, 0.45)
    pen.oval(0, -0.81, 0.16, 0.08, inside, shade=-0.2)
    if kind == "crew neck":
        ring = [(-0.19, -0.83), (-0.12, -0.72), (0.0, -0.68), (0.12, -0.72), (0.19, -0.83)]
        pen.line(ring, 0.065, darker(pen.main, 0.75), smooth=True)
        return
    if kind == "mandarin collar":
        for side in (-1, 1):
            band = [(side * 0.2, -0.86), (side * 0.02, -0.72), (side * 0.02, -0.82)]
            pen.shape([*band, (side * 0.18, -0.96)], shade=0.14)
            pen.crease([(side * 0.2, -0.86), (side * 0.02, -0.72)], 0.02, -0.5)
        return
    for side in (-1, 1):
        leaf = [(side * 0.19, -0.92), (side * 0.01, -0.74), (side * 0.15, -0.56)]
        pen.shape([*leaf, (side * 0.29, -0.8)], shade=0.16)
        pen.crease([leaf[1], leaf[2], (side * 0.29, -0.8)], 0.022, -0.5)
        if kind == "button-down collar":
            pen.oval(side * 0.155, -0.62, 0.05, 0.05, (250, 248, 242))
            pen.line([leaf[1], leaf[2]], 0.018, darker(pen.main, 0.5))


def shoe(pen: Pen, a: Attributes) -> None:
    top = {"low top": -0.18, "mid top": -0.42, "high top": -0.72}[a["height"]]
    toe_x, toe_y = {"round toe": (0.9, 0.2), "cap toe": (0.88, 0.2), "pointed toe": (1.02, 0.34)}[
        a["toe"]
    ]
    lift = {"flat": 0.0, "wedge": -0.1, "block heel": -0.14}[a["heel"]]
    sole = PAINTS[a["sole"]]
    upper = [
        *((-0.74, 0.42 + lift), (-0.8, 0.1 + lift), (-0.74, top), (-0.2, top - 0.03)),
        *smooth_line([(-0.06, -0.06), (0.26, 0.04), (0.62, 0.08), (toe_x, toe_y), (toe_x, 0.42)]),
    ]
    pen.oval(-0.47, top, 0.27, 0.07, darker(pen.main, 0.4))
    pen.shape(upper)
    if a["heel"] == "wedge":
        pen.shape(
            [(-0.82, 0.3), (-0.2, 0.36), (0.5, 0.42), (1.0, 0.44), (0.98, 0.56), (-0.8, 0.62)], sole
        )
    elif a["heel"] == "block heel":
        pen.shape(
            [
                (-0.8, 0.26),
                (-0.3, 0.3),
                (0.3, 0.42),
                (1.0, 0.44),
                (0.98, 0.53),
                (0.2, 0.53),
                (-0.3, 0.42),
            ],
            sole,
        )
        pen.box(-0.8, 0.3, -0.42, 0.66, sole, shade=-0.1)
    else:
        pen.shape([(-0.84, 0.4), (1.0, 0.42), (0.98, 0.56), (-0.82, 0.56)], sole)
    pen.line([(-0.82, 0.4 + lift), (0.0, 0.41 + lift / 3), (1.0, 0.43)], 0.025, darker(sole, 0.65))
    if a["toe"] == "cap toe":
        pen.shape([(0.6, 0.1), (0.88, 0.2), (0.9, 0.42), (0.56, 0.42)], darker(sole, 0.92))
        pen.line([(0.6, 0.1), (0.54, 0.26), (0.56, 0.42)], 0.025, darker(pen.main, 0.5))
    pen.crease([(-0.72, top + 0.1), (-0.5, 0.3), (-0.56, 0.4)], 0.025, -0.35)
    _shoe_closure(pen, a["closure"], top)
    contrast = (246, 244, 238) if sum(pen.main) < 450 else (46, 48, 60)
    if a["detail"] == "side stripes":
        for x in (-0.5, -0.34, -0.18):
            pen.line([(x, 0.4), (x + 0.2, 0.06)], 0.06, contrast)
    elif a["detail"] == "star logo":
        star = [(0.0, -0.17), (0.05, -0.05), (0.17, -0.05), (0.08, 0.03), (0.11, 0.15), (0.0, 0.08)]
        pen.oval(
            -0.42,
            0.16,
            0.2,
            0.2,
            darker(contrast, 0.35) if sum(contrast) > 400 else (250, 250, 250),
        )
        pen.shape([(x - 0.42, y + 0.16) for x, y in both_sides(star)], contrast)


def _shoe_closure(pen: Pen, kind: str, top: float) -> None:
    white = (250, 250, 246) if sum(pen.main) < 560 else (70, 70, 76)
    dark = darker(pen.main, 0.5)
    across = [(0.24, 0.08), (0.1, 0.0), (-0.03, -0.08)]
    rows = round((-0.1 - top) / 0.14)
    across += [(-0.1 - 0.02 * i, -0.2 - 0.14 * i) for i in range(rows)]
    if kind == "laces":
        for x, y in across:
            pen.line([(x - 0.15, y + 0.13), (x + 0.07, y - 0.04)], 0.045, white)
    elif kind == "velcro":
        for x, y in across[:: max(1, len(across) // 2)][:3]:
            pen.line([(x - 0.26, y + 0.2), (x + 0.06, y - 0.01)], 0.13, dark)
            pen.line([(x - 0.26, y + 0.2), (x - 0.18, y + 0.15)], 0.11, white)
    elif kind == "buckle":
        x, y = across[1]
        pen.line([(x - 0.38, y + 0.3), (x + 0.08, y - 0.02)], 0.12, dark)
        pen.box(x - 0.22, y + 0.04, x - 0.04, y + 0.22, _METAL)
        pen.box(x - 0.17, y + 0.09, x - 0.09, y + 0.17, dark)
    else:
        pen.shape([(-0.12, -0.1), (0.02, -0.02), (-0.14, 0.22), (-0.3, 0.06)], dark)
        pen.line([(-0.7, top + 0.04), (-0.22, top + 0.03)], 0.05, dark)


def hat(pen: Pen, a: Attributes) -> None:
    rise = -0.62 if a["crown"] == "high crown" else -0.32
    wide = a["brim"] == "wide brim"
    style = a["style"]
    half = {"beanie": 0.52, "baseball cap": 0.54, "fedora": 0.48}.get(style, 0.46)
    if style == "fedora":
        half_brim = 0.98 if wide else 0.76
        pen.oval(0, 0.34, half_brim, 0.17 if wide else 0.13, shade=-0.1)
        crown = [(half, 0.32), (half - 0.06, rise + 0.12), (0.26, rise - 0.06), (0.0, rise + 0.06)]
    elif style == "sun hat":
        pen.oval(0, 0.34, 1.0 if wide else 0.8, 0.3 if wide else 0.22, shade=-0.06)
        pen.oval(0, 0.33, half + 0.06, 0.15, shade=-0.25)
        crown = [(half, 0.32), (half - 0.02, rise + 0.3), (0.3, rise + 0.03), (0.0, rise - 0.02)]
    elif style == "bucket hat":
        reach = 0.82 if wide else 0.66
        pen.shape(
            both_sides([(0.44, 0.1), (reach, 0.5), (reach * 0.55, 0.58), (0.0, 0.6)]), shade=-0.1
        )
        crown = [(0.47, 0.22), (0.38, rise + 0.06), (0.3, rise), (0.0, rise - 0.01)]
    else:
        crown = [(half, 0.34), (half, 0.0), (half * 0.75, rise + 0.12), (half * 0.3, rise - 0.03)]
    ground = 0.22 if style == "bucket hat" else 0.34
    pen.shape(both_sides(smooth_line([*crown, (0.0, crown[-1][1])])))
    if style == "baseball cap":
        reach = 1.02 if wide else 0.84
        pen.shape(
            [(-0.2, 0.3), (0.4, 0.24), (reach, 0.36), (reach, 0.48), (0.3, 0.44)], shade=-0.15
        )
        for x in (-0.2, 0.2):
            pen.crease([(x * 0.4, rise), (x * 1.4, 0.3)], 0.02, -0.3)
        pen.oval(0, rise - 0.02, 0.05, 0.03, darker(pen.main, 0.6))
    elif style == "beanie":
        depth = 0.3 if wide else 0.16
        pen.box(-0.57, 0.4 - depth, 0.57, 0.42, shade=0.14)
        pen.crease([(-0.56, 0.41 - depth), (0.56, 0.41 - depth)], 0.03, -0.5)
        ground = 0.42 - depth
    elif style == "fedora":
        pen.crease([(-0.12, rise + 0.02), (0.0, rise + 0.2), (0.12, rise + 0.02)], 0.05, -0.3)
    if a["band"] != "no band":
        pen.box(-half * 0.98, ground - 0.17, half * 0.98, ground - 0.03, PAINTS[a["band"]])
    _ornament(pen, a["ornament"], rise, ground, half)


def _ornament(pen: Pen, kind: str, rise: float, ground: float, half: float) -> None:
    if kind == "pompom":
        pen.oval(0, rise - 0.14, 0.19, 0.19, (238, 234, 226), shade=-0.05)
        pen.oval(-0.05, rise - 0.19, 0.09, 0.09, (252, 250, 244))
    elif kind == "bow":
        _bow(pen, half * 0.62, ground - 0.1, 0.2, (200, 40, 70))
    elif kind == "feather":
        quill = [
            (half * 0.7, ground - 0.06),
            (half * 0.85, ground - 0.5),
            (half * 1.25, ground - 0.78),
        ]
        pen.shape(
            [quill[0], (half * 0.66, ground - 0.45), quill[2], (half * 1.12, ground - 0.4)],
            (40, 128, 124),
        )
        pen.line(quill, 0.025, (240, 238, 230))
    elif kind == "patch":
        pen.box(-0.17, ground - 0.44, 0.17, ground - 0.2, (150, 104, 62))
        pen.line([(-0.11, ground - 0.32), (0.11, ground - 0.32)], 0.04, (240, 226, 196))
