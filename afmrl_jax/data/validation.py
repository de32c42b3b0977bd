"""What a listing and its images must be: one mistake, one sentence that names it and its cure."""

import functools
import io
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own mark of a decompression bomb, here an error
MAX_IMAGE_BYTES = 64 << 20
MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL refuse more
# Named, so that Pillow never starts Ghostscript or an obscure parser on somebody's upload.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class BadListing(Exception):
    """Why one listing can't be used. `kind` groups the report; the message says what to do."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class CheckedListing(NamedTuple):
    """A listing whose fields are right. Its images are named, but not yet looked at."""

    listing_id: str
    product_id: str
    title: str
    description: str
    category: str
    attributes: str  # JSON of {name: value}
    split: str | None
    image_names: list[str]  # relative to the catalogue; "" where the bytes are stored
    image_bytes: list[bytes | None]


def check_listing(record: Mapping[str, Any]) -> CheckedListing:
    """The fields of a record as a listing; unknown fields are ignored. Raises BadListing."""
    listing_id, product_id = (_identifier(record, field) for field in ("listing_id", "product_id"))
    title, description, category, split = (
        _text(record.get(field), field) for field in ("title", "description", "category", "split")
    )
    attributes = _attributes(record.get("attributes"))
    images = [_image(image) for image in _image_list(record.get("images"))]
    if not images and not (title + description + category).strip():
        raise BadListing(
            "neither text nor image",
            "has no title, description, category or image; give it at least one of them",
        )
    return CheckedListing(
        listing_id,
        product_id,
        title,
        description,
        category,
        attributes,
        split or None,
        [name for name, _ in images],
        [data for _, data in images],
    )


def check_annotation(record: Mapping[str, Any]) -> tuple[str, str]:
    """(listing_id, attributes as JSON) of a record that has only these. Raises BadListing."""
    listing_id = _identifier(record, "listing_id")
    if record.get("attributes") is None:
        raise BadListing("missing field", "attributes is missing; write {} where there are none")
    return listing_id, _attributes(record["attributes"])


def identify(record: Any) -> str | None:
    """The record's listing_id for a report, if it has a usable one."""
    try:
        return _identifier(record, "listing_id")
    except (BadListing, AttributeError):
        return None


def quote(value: object) -> str:
    """The value as JSON of at most 60 characters, safe to print."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def _describe(value: object) -> str:
    if isinstance(value, bool | int | float):
        return f"{'true or false' if isinstance(value, bool) else 'a number'} ({quote(value)})"
    if isinstance(value, str):
        return f"the string {quote(value)}"
    names = {dict: "an object", list: "a list", bytes: "bytes", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _text(value: object, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadListing(
                "bad UTF-8",
                f"{field} is not UTF-8 (byte 0x{value[error.start]:02x}); encode it as UTF-8",
            ) from None
    if not isinstance(value, str):
        raise BadListing("wrong type", f"{field} is {_describe(value)}; write it as a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadListing(
                "bad UTF-8",
                f"{field} holds half a character ({ascii(value[error.start])[1:-1]}, a lone "
                "surrogate); write the whole character",
            ) from None
    return value


def _identifier(record: Mapping[str, Any], field: str) -> str:
    if record.get(field) is None:
        raise BadListing("missing field", f"{field} is missing; every listing needs one")
    text = _text(record[field], field)
    if not text.strip():
        raise BadListing("missing field", f"{field} is empty; every listing needs one")
    return text


def _attributes(value: object) -> str:
    if isinstance(value, str | bytes):  # columns and features of changing keys travel as JSON
        text = _text(value, "attributes")
        try:
            value = json.loads(text) if text else None
        except (ValueError, RecursionError):
            raise BadListing(
                "wrong type", f"attributes is {_describe(text)}; write an object of strings"
            ) from None
    if isinstance(value, list) and all(isinstance(p, tuple) and len(p) == 2 for p in value):
        value = dict(value)  # Arrow's maps
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise BadListing(
            "wrong type", f"attributes is {_describe(value)}; write an object of strings"
        )
    pairs = {
        _text(name, "an attribute's name"): _text(text, f"attribute {quote(name)}")
        for name, text in value.items()
    }
    return json.dumps({name: text for name, text in pairs.items() if text})


def _image_list(value: object) -> list:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadListing(
            "wrong type", f'images is {_describe(value)}; write a list such as ["images/1.jpg"]'
        )
    return value


def _image(value: object) -> tuple[str, bytes | None]:
    if isinstance(value, dict) and "bytes" in value:  # Hugging Face datasets' struct
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise BadListing("huge image", _too_many_bytes("an image", len(value)))
        return "", value
    if not isinstance(value, str):
        raise BadListing("wrong type", f"an image is {_describe(value)}; write its relative path")
    return check_image_name(_text(value, "an image's path")), None


def check_image_name(name: str) -> str:
    """The name, if it is a relative path that stays inside the catalogue. Raises BadListing."""
    path = PurePosixPath(name)
    if "://" in name:
        raise BadListing(
            "image path", f"image {quote(name)} is a URL; download it and give its relative path"
        )
    if path.is_absolute() or "\\" in name or name[1:2] == ":":
        raise BadListing(
            "image path",
            f"image {quote(name)} is not a relative path with '/'; move it under images/ and "
            'write "images/NAME"',
        )
    if ".." in path.parts:
        raise BadListing(
            "image path",
            f"image {quote(name)} points outside the catalogue; move it under images/",
        )
    if not path.parts or "\0" in name:
        raise BadListing(
            "image path", f"image {quote(name)} is not a file's name; correct it or leave it out"
        )
    return name


class ImageFolder:
    """Finds image files beneath a catalogue's folder, and never outside it."""

    def __init__(self, root: Path):
        self.root = root
        self._real_root = os.path.realpath(root)
        self._real_parent = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def locate(self, name: str) -> tuple[str, os.stat_result]:
        """The path of a named image, and what the system knows of the file. Raises BadListing."""
        path = f"{self.root}/{name}"
        try:
            status = os.lstat(path)
            # The folder's real path is remembered; only a file that is itself a link is resolved.
            parent, leaf = os.path.split(path)
            real = f"{self._real_parent(parent)}/{leaf}"
            if stat.S_ISLNK(status.st_mode):
                real, status = os.path.realpath(path), os.stat(path)  # noqa: PTH116
        except OSError as error:
            raise BadListing(
                "missing image",
                f"image {quote(name)} can't be found ({error.strerror}); add the file or take it "
                "out of the listing",
            ) from None
        if not real.startswith(self._real_root.rstrip("/") + "/"):
            raise BadListing(
                "image path",
                f"image {quote(name)} is a link to a file outside the catalogue; copy it into "
                "images/",
            )
        if not stat.S_ISREG(status.st_mode):
            raise BadListing("missing image", f"image {quote(name)} is no file; give a file's path")
        return path, status


def _too_many_bytes(what: str, size: int) -> str:
    return f"{what} has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}; make it smaller"


def read_image(source: str | bytes, name: str, *, decode: bool = True) -> Image.Image | None:
    """An image as RGB, upright by its EXIF orientation, transparency laid on white.

    source: a path, or the encoded bytes. name: for the message. Where decode is False only the
    header is read, and None returned. Raises BadListing, whatever is wrong with the image.
    """
    what = f"image {quote(name)}" if name else "an image"
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise BadListing("huge image", _too_many_bytes(what, size))
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS
        ) as image:
            _check_size(image.size, what)
            return _upright_rgb(image) if decode else None
    except BadListing:
        raise
    except Image.DecompressionBombError:
        raise BadListing(
            "huge image", f"{what} has far more than {MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if "cannot identify" in reason:
            reason = "empty" if size == 0 else f"no {', '.join(IMAGE_FORMATS)}"
        raise BadListing(
            "damaged image", f"{what} can't be decoded ({reason[:120]}); replace it"
        ) from None


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadListing(
            "huge image",
            f"{what} has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,}; make it "
            "smaller",
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadListing(
            "huge image",
            f"{what} has {width} x {height} pixels, one side more than {MAX_ASPECT_RATIO} times "
            "the other; crop it",
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255, not scale it
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
