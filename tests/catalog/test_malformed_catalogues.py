"""Each mistake gets its own clear sentence, and costs none of the good listings around it."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.core.errors import UserError

GOOD = 4  # good listings around the bad one, which stands on line 3 of 5
BAD_LINE = 3


def listing(name: str, **fields) -> dict:
    return {
        "listing_id": name,
        "product_id": f"product-{name}",
        "title": f"Red mug {name}",
        "attributes": {"color": "red"},
        "images": [f"images/{name}.png"],
    } | fields


def picture(path: Path, size=(8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def png_header_only(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def write_file(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def cut_jpeg(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG")
    (folder / "images/bad.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])


def link_out(folder: Path) -> None:
    picture(folder.parent / "secret.png")
    (folder / "images/bad.png").symlink_to(folder.parent / "secret.png")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "images/bad.png")  # opening it would wait for ever


@dataclass
class Mistake:
    name: str
    line: dict | bytes  # what stands on the bad line
    says: str  # what was found
    advises: str  # what to do
    prepare: Callable[[Path], None] = lambda folder: picture(folder / "images/bad.png")


def bad(**fields) -> dict:
    return listing("bad", **fields)


def raw(text: str) -> bytes:
    return text.encode()


MISTAKES = [
    Mistake(
        "duplicate id",
        bad(listing_id="good0"),
        'listing_id "good0" stands already at products.jsonl line 1',
        "give each listing its own",
    ),
    Mistake(
        "missing image",
        bad(images=["images/nothing.png"]),
        'image "images/nothing.png" can\'t be found (No such file',
        "add the file or take it out",
    ),
    Mistake(
        "truncated image",
        bad(images=["images/bad.jpg"]),
        'image "images/bad.jpg" can\'t be decoded (image file is truncated',
        "replace it",
        cut_jpeg,
    ),
    Mistake(
        "empty image",
        bad(),
        "can't be decoded (empty)",
        "replace it",
        write_file("images/bad.png", b""),
    ),
    Mistake(
        "no image at all",
        bad(),
        "can't be decoded (no JPEG, PNG",
        "replace it",
        write_file("images/bad.png", b"<html>404</html>"),
    ),
    Mistake(
        "PostScript, which would start Ghostscript",
        bad(),
        "can't be decoded (no JPEG, PNG",
        "replace it",
        write_file("images/bad.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ),
    Mistake(
        "decompression bomb",
        bad(),
        "has far more than 89,478,485 pixels",
        "make it smaller",
        write_file("images/bad.png", png_header_only(60_000, 60_000)),
    ),
    Mistake(
        "absurdly large image",
        bad(),
        "has 12000 x 8000 pixels, more than 89,478,485",
        "make it smaller",
        write_file("images/bad.png", png_header_only(12_000, 8_000)),
    ),
    Mistake(
        "a sliver that the image processor refuses",
        bad(),
        "has 1000 x 2 pixels",
        "crop it",
        lambda folder: picture(folder / "images/bad.png", (1000, 2)),
    ),
    Mistake(
        "pipe in place of an image",
        bad(),
        '"images/bad.png" is no file',
        "give a file's path",
        pipe,
    ),
    Mistake(
        "absolute path",
        bad(images=["/etc/passwd"]),
        'image "/etc/passwd" is not a relative path',
        "move it under images/",
    ),
    Mistake(
        "path out of the catalogue",
        bad(images=["../cover.jpg"]),
        'image "../cover.jpg" points outside the catalogue',
        'move it under images/ or set data.on_bad_listing="skip"',
    ),
    Mistake(
        "link out of the catalogue",
        bad(),
        'image "images/bad.png" is a link to a file outside the catalogue',
        "copy it into images/",
        link_out,
    ),
    Mistake(
        "URL",
        bad(images=["https://example.com/1.jpg"]),
        'image "https://example.com/1.jpg" is a URL',
        "download it",
    ),
    Mistake(
        "number as an id",
        bad(listing_id=17),
        "listing_id is a number (17)",
        "write it as a string",
    ),
    Mistake("no product", bad(product_id=None), "product_id is missing", "every listing needs one"),
    Mistake(
        "images not a list",
        bad(images="images/bad.png"),
        'images is the string "images/bad.png"',
        "write a list",
    ),
    Mistake(
        "list as an attribute",
        bad(attributes={"color": ["red", "blue"]}),
        'attribute "color" is a list',
        "write it as a string",
    ),
    Mistake(
        "attributes not an object",
        bad(attributes=["red"]),
        "attributes is a list",
        "write an object of strings",
    ),
    Mistake(
        "bad UTF-8",
        b'{"listing_id": "bad", "product_id": "p", "title": "Caf\xe9"}',
        "is not UTF-8 (byte 0xe9 at column",
        "save the file as UTF-8",
    ),
    Mistake(
        "half a character",
        raw('{"listing_id": "bad", "product_id": "p", "title": "smile \\ud83d"}'),
        "title holds half a character (\\ud83d",
        "write the whole character",
    ),
    Mistake(
        "bad JSON",
        raw('{"listing_id": "bad", "product_id": }'),
        "is not JSON (Expecting value at column",
        "correct it",
    ),
    Mistake("cut line", raw('{"listing_id": "bad", "prod'), "is not JSON", "correct it"),
    Mistake(
        "list in place of an object",
        raw('["bad", "p"]'),
        "is a list",
        "write one JSON object a line",
    ),
    Mistake(
        "deeply nested JSON",
        raw('{"listing_id": "bad", "product_id": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "is nested too deeply",
        "a listing is one flat object",
    ),
    Mistake(
        "NaN",
        raw('{"listing_id": "bad", "product_id": "p", "title": NaN}'),
        "NaN is no JSON number",
        "correct it",
    ),
    Mistake(
        "number of 10,000 digits",
        raw('{"listing_id": ' + "9" * 10_000 + ', "product_id": "p", "title": "x"}'),
        "is not JSON (Exceeds the limit",
        "correct it",
    ),
    Mistake(
        "endless line",
        raw('{"listing_id": "bad", "title": "' + "x" * (17 << 20) + '"}'),
        "is longer than 16,777,216 bytes",
        "write one listing a line",
    ),
    Mistake(
        "nearly right field",
        raw('{"listing_id": "bad", "product_id": "p", "title": "x", "Image_Paths": ["a.png"]}'),
        'has a field "Image_Paths" and no images; did you mean "images"?',
        "Rename it, or take it out",
    ),
    Mistake(
        "the field beside a nearly right one is empty",
        bad(title="", product_name="Red mug"),
        'has a field "product_name" and no title; did you mean "title"?',
        "Rename it, or take it out",
    ),
    Mistake(
        "nearly right id",
        raw('{"listing_id": "bad", "productId": "p", "title": "x"}'),
        'product_id is missing; every listing needs one (it has "productId": is that it?',
        "Rename it",
    ),
    Mistake(
        "nearly right split",
        bad(split="tset"),
        'split is "tset"',
        'did you mean "test"?',
    ),
    Mistake(
        "split of two meanings",
        bad(split="Eval"),
        'split is "Eval"',
        'did you mean "validation" or "test"?',
    ),
    Mistake(
        "field that stands twice",
        raw('{"listing_id": "bad", "product_id": "p", "title": "Navy dress", "title": "Sofa"}'),
        'names "title" twice',
        "keep one of the two",
    ),
    Mistake(
        "attribute that stands twice",
        raw(
            '{"listing_id": "bad", "product_id": "p", "attributes": {"a": "1", "b": "", "a": "2"}}'
        ),
        'names "a" twice',
        "keep one of the two",
    ),
    Mistake(
        "attribute that stands twice in JSON as text",
        bad(attributes='{"a": "1", "a": "2"}'),
        'names "a" twice',
        "keep one of the two",
    ),
    Mistake(
        "one attribute in two spellings with two values",
        bad(attributes={"Color": "red", " color": "navy"}),
        'has attributes "Color" and " color", which are one name with two values',
        "keep one of the two",
    ),
    Mistake(
        "attribute without a name",
        bad(attributes={" ": "red"}),
        'attribute " " has no name',
        "give it one",
    ),
    Mistake(
        "ids that differ by what nobody sees",
        bad(listing_id=" good0\u200b"),
        'listing_id "good0" stands already at products.jsonl line 1',
        "give each listing its own",
    ),
    Mistake(
        "wholly transparent image",
        bad(),
        'image "images/bad.png" is wholly transparent and shows nothing',
        "replace it or take it out",
        lambda folder: Image.new("RGBA", (8, 6)).save(folder / "images/bad.png"),
    ),
    Mistake(
        "neither text nor image",
        bad(title=" ", images=[]),
        "has no title, description, category or image",
        "give it at least one",
    ),
]


def write_catalogue(folder: Path, mistake: Mistake) -> None:
    lines = []
    for number in range(GOOD):
        picture(folder / f"images/good{number}.png")
        lines.append(json.dumps(listing(f"good{number}")).encode())
    line = mistake.line if isinstance(mistake.line, bytes) else json.dumps(mistake.line).encode()
    lines.insert(BAD_LINE - 1, line)
    (folder / "products.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    mistake.prepare(folder)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_with_its_line_and_cure_and_loses_no_good_listing(mistake, tmp_path):
    folder, cache, report = (tmp_path / name for name in ("shop", "cache", "report"))
    write_catalogue(folder, mistake)
    for _ in range(2):  # said by the conversion, then from the cache
        with pytest.raises(UserError) as raised:
            open_catalog(folder, cache_dir=cache)
        message = str(raised.value)
        assert message.startswith(f"products.jsonl line {BAD_LINE}: ")
        assert mistake.says in message
        assert mistake.advises in message
        assert message.endswith('or set data.on_bad_listing="skip"')
        assert "\n" not in message and len(message) < 400

    catalog = open_catalog(folder, cache_dir=cache, on_bad_listing="skip", report_dir=report)
    assert [catalog.listing(i).listing_id for i in range(len(catalog))] == [
        f"good{number}" for number in range(GOOD)
    ]
    assert all(catalog.image(i).size == (8, 6) for i in range(GOOD))
    (row,) = [json.loads(line) for line in (report / "bad_listings.jsonl").read_text().splitlines()]
    assert row["file"] == str(folder / "products.jsonl") and row["line"] == BAD_LINE
    assert mistake.says in row["problem"]
    expected = mistake.line["listing_id"] if isinstance(mistake.line, dict) else None
    assert row["listing_id"] in (expected, None, "bad", "good0")


def test_there_are_at_least_twenty_malformed_catalogues():
    assert len(MISTAKES) >= 20


def test_many_mistakes_are_told_by_the_first_twenty_and_counts(tmp_path):
    lines = [json.dumps(listing(f"n{i}", images=["../x.jpg"])) for i in range(25)]
    lines += ["{", json.dumps(listing("fine", images=[]))]
    (tmp_path / "products.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        open_catalog(tmp_path, cache_dir=tmp_path / "cache")
    message = str(raised.value).splitlines()
    assert message[0].endswith("26 of 27 listings can't be used:")
    assert [line.split(":")[0].strip() for line in message[1:21]] == [
        f"products.jsonl line {i}" for i in range(1, 21)
    ]
    assert message[21] == "  ... and 6 more"
    assert "25 x image path, 1 x bad JSON" in message[22]


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n"])
def test_a_catalogue_without_a_good_listing_is_an_error_even_when_skipping(content, tmp_path):
    (tmp_path / "products.jsonl").write_text(content)
    with pytest.raises(UserError, match="is empty"):
        open_catalog(tmp_path, cache_dir=tmp_path / "cache", on_bad_listing="skip")


def test_a_wrong_path_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "fashion").mkdir()
    with pytest.raises(UserError, match=r"no catalogue at .*fashoin; did you mean .*fashion\?"):
        open_catalog(tmp_path / "fashoin", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="holds no catalogue: expected"):
        open_catalog(tmp_path / "fashion", cache_dir=tmp_path / "cache")


def test_of_two_formats_in_one_folder_the_user_must_choose(tmp_path):
    for name in ("products.jsonl", "products.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds both"):
        open_catalog(tmp_path, cache_dir=tmp_path / "cache")


def test_a_cache_path_that_is_a_file_is_told(tmp_path):
    write_catalogue(tmp_path / "shop", MISTAKES[0])
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="can't be written"):
        open_catalog(tmp_path / "shop", cache_dir=tmp_path / "cache")
