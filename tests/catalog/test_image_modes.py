"""Every kind of pixel is shown as what it stands for, upright, and never as nothing."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from afmrl_jax.catalog.validation import BadListing, read_image
from afmrl_jax.core.pixels import is_one_colour, upright_rgb

PHOTO = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3) * 2  # [height, width, RGB]
RAMP = np.arange(32).reshape(4, 8) / 31  # grey, 0 to 1


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, bits: int, colour_type: int, transparent: tuple = ()) -> bytes:
    """A PNG of these samples; Pillow itself writes neither 2 bits nor 16 of colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = pixels.shape[:2]
    if bits == 2:
        four = pixels.reshape(height, -1, 4).astype(int)
        pixels, kind = (four * (64, 16, 4, 1)).sum(-1), "u1"
    else:
        kind = ">u2" if bits == 16 else "u1"
    lines = b"".join(b"\0" + row.astype(kind).tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    trns = (
        chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    )
    body = chunk(b"IHDR", head) + trns + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tags(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """The tags (number, type, count, value) of a TIFF, or of EXIF, which is one. Pixels, at which
    tag 273 points, follow."""
    entries = sorted(entries)
    start = 8 + 2 + 12 * len(entries) + 4
    later = b"".join(value for *_, value in entries if len(value) > 4)
    head, at = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), start
    for tag, kind, count, value in entries:
        if tag == 273:
            value = struct.pack("<I", start + len(later))
        if len(value) > 4:
            value, at = struct.pack("<I", at), at + len(value)
        head += struct.pack("<HHI4s", tag, kind, count, value)
    return head + bytes(4) + later


def tiff(pixels: np.ndarray, kind: str, *, black_is_zero: bool = True, extra=()) -> bytes:
    """A TIFF of one grey of numbers of this kind, such as "<u2"."""
    data = pixels.astype(kind).tobytes()
    sizes = {256: 8, 257: 4, 258: 8 * int(kind[2]), 259: 1, 262: int(black_is_zero), 277: 1}
    sizes |= {278: 4, 279: len(data), 339: " uif".index(kind[1])}
    entries = [(tag, 3, 1, struct.pack("<H", value)) for tag, value in sizes.items()]
    return tags([*entries, (273, 4, 1, b""), *extra]) + data


def orientation(value: bytes, kind: int = 3) -> tuple[int, int, int, bytes]:
    return (274, kind, 1, value)


def exif(*entries) -> bytes:
    return b"Exif\0\0" + tags(list(entries))


def shown(data: bytes) -> np.ndarray:
    image = read_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- upright


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_orientations_come_upright_as_pillow_turns_them(turn, kind):
    data = encode(Image.fromarray(PHOTO), kind, exif=exif(orientation(struct.pack("<H", turn))))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(shown(data), expected)
    assert expected.size == ((8, 4) if turn < 5 else (4, 8))
    again = upright_rgb(read_image(data, "x"))  # as an exported encoder does with our images
    assert np.array_equal(again, expected)


QUARTER = orientation(b"\6\0")
ODD_TAGS = {
    "text as the resolution": (282, 2, 8, b"72 dpi!\0"),
    "text as the width": (256, 2, 8, b"4000 px\0"),
    "a rational of 0/0": (283, 5, 1, bytes(8)),
    "a type that is none": (282, 99, 1, b"\1\2\3\4"),
    "a folder of tags outside the file": (0x8769, 4, 1, b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("odd", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_tag_that_is_not_the_orientation_never_costs_a_good_photo(kind, odd):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(PHOTO), kind, exif=exif(QUARTER, odd), **options)
    assert np.array_equal(shown(data), np.rot90(PHOTO, -1))


@pytest.mark.parametrize("odd", [(282, 2, 8, b"72 dpi!\0"), (700, 2, 8, b"no XMP!\0")])
def test_a_tiff_with_odd_tags_comes_upright(odd):
    grey = (RAMP * 255).astype(np.uint8)
    assert np.array_equal(
        shown(tiff(grey, "<u1", extra=[QUARTER, odd]))[..., 0], np.rot90(grey, -1)
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "data",
    [
        exif(orientation(b"\0\0")),
        exif(orientation(b"\x09\0")),
        exif(orientation(b"6\0", kind=2)),
        exif(orientation(struct.pack("<f", np.nan), kind=11)),
        exif(QUARTER)[:16],
        b"Exif\0\0no tags at all",
    ],
)
def test_an_orientation_that_is_none_leaves_the_photo_as_it_lies(data):
    assert np.array_equal(shown(encode(Image.fromarray(PHOTO), "PNG", exif=data)), PHOTO)


# ---- more than eight bits


@pytest.mark.parametrize(
    ("kind", "white"),
    [
        ("<u1", 255),
        ("<u2", 65535),
        ("<u2", 255),  # eight bits in a file that has room for sixteen
        ("<i2", 32767),
        ("<u4", 2**32 - 1),
        ("<u4", 65535),
        ("<i4", 2**31 - 1),
        ("<f4", 1),
        ("<f4", 1.2),  # as resampling overshoots
        ("<f4", 255),
        ("<f4", 65535),
    ],
)
def test_grey_of_any_depth_is_scaled_to_its_own_white(kind, white):
    grey = shown(tiff(RAMP * white, kind))[..., 0]
    expected = np.clip(RAMP * (1.2 if white == 1.2 else 1), 0, 1)
    assert np.abs(grey - 255 * expected).max() <= 1


@pytest.mark.parametrize(("kind", "black"), [("<u1", 255), ("<u2", 65535), ("<f4", 1)])
def test_grey_that_counts_from_white_to_black_is_no_negative(kind, black):
    grey = shown(tiff(RAMP * black, kind, black_is_zero=False))[..., 0]
    assert np.abs(grey - 255 * (1 - RAMP)).max() <= 1


@pytest.mark.parametrize(("kind", "pixels"), [("<f4", 2 * RAMP - 1), ("<f4", 3 * RAMP)])
def test_floats_without_a_known_black_and_white_are_refused_with_their_range(kind, pixels):
    with pytest.raises(BadListing, match=r"numbers from (-1 to 1|0 to 3) for black to white; save"):
        read_image(tiff(pixels, kind), "x")


def test_floats_that_are_no_numbers_are_as_transparent():
    pixels = RAMP.copy()
    pixels[0, :2] = np.nan, np.inf
    grey = shown(tiff(pixels, "<f4"))[..., 0]
    assert grey[0, :3].tolist() == [255, 255, round(255 * 2 / 31)]


# ---- transparency


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_the_transparent_colour_of_a_png_counts_in_the_bits_of_the_file(bits):
    grey = np.arange(8).reshape(1, 8).repeat(4, 0) % 4  # 0 1 2 3
    pixels, white = (grey, 3) if bits == 2 else (grey * 80, 255)
    pixels, white = (pixels * 257, 65535) if bits == 16 else (pixels, white)
    row = shown(png(pixels, bits, 0, transparent=(int(pixels[0, 1]),)))[0, :, 0]
    expected = [round(255 * int(p) / white) for p in pixels[0, :4]]
    expected[1] = 255
    assert row.tolist() == 2 * expected


def test_the_transparent_colour_of_sixteen_bits_a_channel_is_laid_on_white():
    colour = tuple(int(value) for value in PHOTO[2, 5].astype(int) * 257)
    pixels = shown(png(PHOTO.astype(int) * 257, 16, 2, transparent=colour))
    expected = PHOTO.copy()
    expected[2, 5] = 255
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("alpha", [0, 1])  # 1: a mask of 0 and 1 where 255 was meant
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_channel_that_hides_the_whole_photo_is_left_out(mode, alpha):
    photo = Image.fromarray(PHOTO)
    if mode == "P":
        photo = photo.quantize(32)
        data = encode(photo, "PNG", transparency=bytes([alpha] * 32))
    else:
        photo = photo if mode == "RGBA" else photo.convert("L")
        image = photo.copy()
        image.putalpha(alpha)
        data = encode(image, "PNG")
    assert np.array_equal(shown(data), photo.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_transparent_image_with_nothing_beneath_is_refused(mode):
    image = Image.new(mode, (8, 4), 0)
    data = encode(image, "PNG", **({"transparency": 0} if mode == "P" else {}))
    with pytest.raises(BadListing, match="wholly transparent and shows nothing; replace it") as bad:
        read_image(data, "x")
    assert bad.value.kind == "blank image"


def test_a_white_shape_is_laid_on_black_and_any_other_on_white():
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (2, 0, 6, 4))
    for colour, ground in (((255,) * 3, 0), ((254, 255, 255), 0), ((200, 0, 0), 255)):
        image = Image.new("RGB", (8, 4), colour)
        image.putalpha(alpha)
        row = shown(encode(image, "PNG"))[0]
        assert row[:2].tolist() == [[ground] * 3] * 2 and row[2].tolist() == list(colour)


# ---- other colours


def test_colours_of_print_video_and_one_bit_are_what_they_stand_for():
    flat = Image.new("RGB", (16, 16), (200, 40, 40))
    for data in (
        encode(flat.convert("CMYK"), "JPEG", quality=95),  # Adobe's, which count upside down
        encode(flat.convert("CMYK"), "TIFF"),
        encode(flat.convert("YCbCr"), "TIFF"),
    ):
        assert np.abs(shown(data).astype(int) - (200, 40, 40)).max() <= 3
    bits = RAMP > 0.5
    assert np.array_equal(shown(encode(Image.fromarray(bits), "PNG"))[..., 0], bits * 255)


def test_one_colour_is_what_a_jpeg_of_one_colour_decodes_to():
    flat = read_image(encode(Image.new("RGB", (40, 30), (17, 99, 203)), "JPEG", quality=60), "x")
    assert is_one_colour(flat)
    flat.putpixel((0, 0), (25, 99, 203))
    assert not is_one_colour(flat)
