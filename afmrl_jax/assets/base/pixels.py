"""Image files with any kind of pixels as upright RGB of eight bits.

Exported folders carry this file beside listing_rows.py, so it needs NumPy and Pillow alone.
"""

import numpy as np
from PIL import ExifTags, Image

# Of 255: an alpha channel that is below this everywhere hides the whole picture.
FAINT = 16
ONE_COLOUR = 2  # of 255, the most by which the pixels of a one-coloured JPEG differ
# A PNG gives its transparent colour in the file's bits, Pillow gives the pixels in eight.
_TO_EIGHT_BITS = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unshowable(ValueError):
    """A good file that shows nothing. `kind` groups such files; the message follows their name."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB, upright by its EXIF orientation, transparent parts on white.

    They are on black where the picture would not show on white. An alpha channel that hides the
    whole picture is left out. For more than 8 bits see `_eight_bits`. Raises Unshowable, and the
    errors of Pillow's decoders.
    """
    rawmode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    # A TIFF's XMP may be a str, in which Pillow fails to look for bytes.
    if isinstance(text := image.info.get("xmp"), str):
        image.info["xmp"] = text.encode()
    image.load()
    colour, factor = image.info.get("transparency"), _TO_EIGHT_BITS.get(rawmode)
    if colour is not None and factor:
        colour = tuple(int(value * factor) for value in np.atleast_1d(colour))
        image.info["transparency"] = colour if len(colour) == 3 else colour[0]
    turn = _turn(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if turn is not None:
        image = image.transpose(turn)
    image = _opaque(image) if image.has_transparency_data else image.convert("RGB")
    image.info = {}  # an orientation left here would let the next reader turn the image again
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that sets the image upright. Pillow's exif_transpose reads all tags and writes them
    anew, and fails where any of them is odd; this reads one tag."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF can raise any error in Pillow; the photo is good
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12, 16 or 32 bits, or of floats, as "L"; as "LA" where pixels have no value.

    White is the first of 255, 65,535 and the format's highest number that no pixel exceeds, because
    many files use fewer bits than they have room for; for floats 1, 255 or 65,535. Raises
    Unshowable where the numbers fit none of them.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    pixels = np.asarray(image)
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
    if bits == 32 and image.mode == "I" and not signed:
        pixels = pixels.view(np.uint32)  # Pillow's "I" is signed
    hidden = ~np.isfinite(pixels)
    if "transparency" in image.info:
        hidden |= pixels == image.info["transparency"]
    low, high = (float(f(where=~hidden, initial=0)) for f in (pixels.min, pixels.max))
    whites = (1.0, 255.0, 65535.0)
    # Resampled floats may overshoot white; with all below a sixteenth of it all would be black.
    if image.mode == "F":
        fits = [
            white for white in whites if high <= 2 * white and (high > white / 16 or white == 1)
        ]
    else:
        fits = [white for white in (*whites[1:], 2.0 ** (bits - signed) - 1) if high <= white]
    white = min(fits, default=0.0)
    if low < -white / 4 or not white:
        raise Unshowable(
            "strange image",
            f"has numbers from {low:.6g} to {high:.6g} for black to white; save it with 8 "
            "bits a colour",
        )
    grey = pixels.astype(np.float32)
    grey[hidden] = 0
    grey = np.clip(np.divide(grey, white, out=grey), 0, 1, out=grey)
    if tags.get(262) == 0:  # black is the highest number
        np.subtract(1, grey, out=grey)
    result = Image.fromarray((grey * 255 + 0.5).astype(np.uint8))
    if hidden.any():
        result.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return result


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    colours = image.convert("RGB")
    faintest, strongest = image.getchannel("A").getextrema()
    if strongest < FAINT:
        if is_one_colour(colours):
            raise Unshowable(
                "blank image",
                "is wholly transparent and shows nothing; replace it or take it out of the listing",
            )
        return colours
    laid = _laid_on("white", image)
    return _laid_on("black", image) if faintest < strongest and is_one_colour(laid) else laid


def _laid_on(ground: str, image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def is_one_colour(image: Image.Image) -> bool:
    """Whether an RGB image shows nothing but one colour."""
    return all(high - low <= ONE_COLOUR for low, high in image.getextrema())
