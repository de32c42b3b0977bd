"""Checks a listing and its images. Each mistake gets one sentence that names it and its cure."""

import functools
import io
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from afmrl_jax.attributes.comparison import fold
from afmrl_jax.catalog.names import (
    FIELD_NAMES,
    LONGEST,
    clean_identifier,
    similar_field,
    similar_splits,
    split_name,
)
from afmrl_jax.core.pixels import Unshowable, upright_rgb

MAX_IMAGE_PIXELS = 89_478_485  # Pillow warns of a decompression bomb above it; here it is an error
MAX_IMAGE_BYTES = 64 << 20
MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL refuse more
# Listed, so that Pillow never starts Ghostscript or an obscure parser on an unknown file.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
NOTHING: tuple = (None, "", b"", [], {})


class BadListing(Exception):
    """Why one listing can't be used. `kind` groups the report; the message says what to do."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class CheckedListing(NamedTuple):
    """A listing whose fields are right. Its images are named, but not yet checked."""

    listing_id: str
    product_id: str
    title: str
    description: str
    category: str
    attributes: str  # JSON of {name: value}
    split: str | None
    image_names: list[str]  # paths relative to the catalogue; "" if the bytes are stored
    image_bytes: list[bytes | None]


def check_listing(record: Mapping[str, Any]) -> CheckedListing:
    """The fields of a record as a listing; unknown fields are ignored. Raises BadListing if a field
    is wrong, or if an unknown field's name resembles a field that the record lacks."""
    listing_id, product_id = (_identifier(record, field) for field in ("listing_id", "product_id"))
    _refuse_similar_fields(record, FIELD_NAMES)
    title, description, category = (
        _text(record.get(field), field) for field in ("title", "description", "category")
    )
    split = _split(record)
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
        split,
        [name for name, _ in images],
        [data for _, data in images],
    )


def check_annotation(record: Mapping[str, Any]) -> tuple[str, str]:
    """(listing_id, attributes as JSON) of a record that has only these two. Raises BadListing."""
    listing_id = _identifier(record, "listing_id")
    _refuse_similar_fields(record, ("attributes",))
    if record.get("attributes") is None:
        raise BadListing("missing field", "attributes is missing; write {} where there are none")
    return listing_id, _attributes(record["attributes"])


def identify(record: Any) -> str | None:
    """The record's listing_id for a report; None if it is missing or unusable."""
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
        near = [quote(name) for name in record if similar_field(name) == field and name != field]
        hint = f" (it has {near[0]}: is that it? Rename it)" if near else ""
        raise BadListing("missing field", f"{field} is missing; every listing needs one{hint}")
    text = clean_identifier(_text(record[field], field))
    if not text:
        raise BadListing("missing field", f"{field} is empty; every listing needs one")
    return text


def _refuse_similar_fields(record: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raises BadListing if an unknown field seems to hold the value of an empty one of `fields`."""
    for name in sorted(record.keys() - FIELD_NAMES):
        field = similar_field(name)
        if field in fields and record[name] not in NOTHING and record.get(field) in NOTHING:
            raise BadListing(
                "unknown field",
                f"has a field {quote(name)} and no {field}; did you mean {quote(field)}? Rename "
                "it, or take it out",
            )


def _split(record: Mapping[str, Any]) -> str | None:
    text = _text(record.get("split"), "split")
    split = split_name(text)
    if near := similar_splits(split):
        near = " or ".join(map(quote, near))
        raise BadListing("unknown split", f"split is {quote(text)}; did you mean {near}?")
    return split or None


def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`' object_pairs_hook. Raises BadListing if a name occurs twice:
    JSON readers would silently keep the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadListing("duplicate name", f"names {quote(twice)} twice; keep one of the two")
    return value


_fold_short = functools.lru_cache(maxsize=4096)(fold)  # names recur in every listing


def _folded(name: str) -> str:
    return _fold_short(name) if len(name) <= LONGEST else fold(name)


def _attributes(value: object) -> str:
    if isinstance(value, str | bytes):  # Parquet and TFDS store objects of changing keys as JSON
        text = _text(value, "attributes")
        try:
            value = json.loads(text, object_pairs_hook=read_object) if text else None
        except (ValueError, RecursionError):
            raise BadListing(
                "wrong type", f"attributes is {_describe(text)}; write an object of strings"
            ) from None
    if isinstance(value, list) and all(isinstance(p, tuple) and len(p) == 2 for p in value):
        value = read_object(value)  # Arrow's maps
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
    pairs = {name: text for name, text in pairs.items() if text}
    first_of: dict[str, str] = {}
    for name, text in pairs.items():
        if not (plain := _folded(name)):
            raise BadListing("missing name", f"attribute {quote(name)} has no name; give it one")
        first = first_of.setdefault(plain, name)
        if first != name and fold(pairs[first]) != fold(text):
            raise BadListing(
                "duplicate name",
                f"has attributes {quote(first)} and {quote(name)}, which are one name with two "
                "values; keep one of the two",
            )
    return json.dumps(pairs)


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
        """The path of a named image, and the status of its file. Raises BadListing."""
        path = f"{self.root}/{name}"
        try:
            status = os.lstat(path)
            # The folder's real path is cached; the file is resolved only if it is itself a link.
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


def _too_many_bytes(image: str, size: int) -> str:
    return f"{image} has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}; make it smaller"


def read_image(source: str | bytes, name: str, *, decode: bool = True) -> Image.Image | None:
    """An image as RGB, upright by its EXIF orientation, transparency laid on white: see
    `core/pixels.upright_rgb`.

    source: a path, or the encoded bytes. name: the image's name for messages. decode=False reads
    only the header and returns None. Raises BadListing, whatever is wrong with the image.
    """
    label = f"image {quote(name)}" if name else "an image"
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise BadListing("huge image", _too_many_bytes(label, size))
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS
        ) as image:
            _check_size(image.size, label)
            return upright_rgb(image) if decode else None
    except BadListing:
        raise
    except Unshowable as error:
        raise BadListing(error.kind, f"{label} {error}") from None
    except Image.DecompressionBombError:
        raise BadListing(
            "huge image", f"{label} has far more than {MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        ) from None
    except Exception as error:  # Pillow's decoders raise many types for a broken file
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if "cannot identify" in reason:
            reason = "empty" if size == 0 else f"no {', '.join(IMAGE_FORMATS)} that can be read"
        raise BadListing(
            "damaged image", f"{label} can't be decoded ({reason[:120]}); replace it"
        ) from None


def _check_size(size: tuple[int, int], label: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadListing(
            "huge image",
            f"{label} has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,}; make it "
            "smaller",
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadListing(
            "huge image",
            f"{label} has {width} x {height} pixels, one side more than {MAX_ASPECT_RATIO} times "
            "the other; crop it",
        )
