"""What opening a catalogue gives, from every format, and what its cache promises."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from afmrl_jax.catalog import checking, conversion, validation
from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import Listing, open_catalog, split_of_product
from afmrl_jax.core.errors import UserError


def real_data(name: str) -> Path:
    path = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no real catalogue {name} beside this checkout")
    return path.resolve()


def png(color, size=(8, 6), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def rows(n: int) -> list[dict]:
    """n listings of n / 2 products, every other one with an image, a few in other scripts."""
    return [
        {
            "listing_id": f"l{i}",
            "product_id": f"p{i // 2}",
            "title": f"Café-Becher 杯 {i}",
            "description": "",
            "category": "Mugs",
            "attributes": {"color": "red", "size": str(i)},
            "images": [f"images/{i}.png"] * (i % 2),
        }
        for i in range(n)
    ]


def write_folder(folder: Path, listings: list[dict], name: str = "products.jsonl") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in listings:
        for image in row["images"]:
            (folder / image).write_bytes(png((10 * int(row["listing_id"][1:]), 0, 0)))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in listings]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def expect(catalog, listings: list[dict]) -> None:
    assert len(catalog) == len(listings)
    for index, row in enumerate(listings):
        images = row["images"]
        texts = {name: value for name, value in row.items() if name != "images"}
        assert catalog.listing(index) == Listing(**({"split": None} | texts), n_images=len(images))
        for which in range(len(images)):
            pixel = catalog.image(index, which).getpixel((0, 0))
            assert pixel == (10 * int(row["listing_id"][1:]), 0, 0)
    assert catalog.products.dtype == np.int32
    order = list(dict.fromkeys(row["product_id"] for row in listings))
    assert catalog.products.tolist() == [order.index(row["product_id"]) for row in listings]


# ---- formats


def test_a_folder_of_json_lines_keeps_its_order_and_content(tmp_path):
    listings = rows(6)
    expect(open_catalog(write_folder(tmp_path / "a", listings), cache_dir=tmp_path), listings)


def test_shards_are_one_catalogue_in_the_order_of_their_names(tmp_path):
    listings = rows(6)
    write_folder(tmp_path / "a", listings[3:], "products-00001.jsonl")
    write_folder(tmp_path / "a", listings[:3], "products-00000.jsonl")
    expect(open_catalog(tmp_path / "a", cache_dir=tmp_path), listings)


def test_byte_order_marks_blank_lines_nulls_and_unknown_fields_do_no_harm(tmp_path):
    folder = write_folder(tmp_path / "a", [])
    line = '{"listing_id": "1", "product_id": "1", "title": "x", "images": null, "style_id": 5}'
    (folder / "products.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n  \n")
    catalog = open_catalog(folder, cache_dir=tmp_path)
    assert catalog.listing(0) == Listing("1", "1", "x", "", "", {}, 0, None)


@pytest.mark.parametrize("images", ["bytes", "struct", "paths"])
@pytest.mark.parametrize("attributes", ["struct", "map", "json"])
def test_parquet_gives_what_json_lines_give(images, attributes, tmp_path):
    listings = rows(6)
    folder = write_folder(tmp_path / "a", listings)
    (folder / "products.jsonl").unlink()
    encode = {
        "bytes": (lambda name: (folder / name).read_bytes(), pa.binary()),
        "struct": (
            lambda name: {"bytes": (folder / name).read_bytes(), "path": "1.png"},
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "paths": (lambda name: name, pa.string()),
    }
    image, kind = encode[images]
    columns = {name: [row[name] for row in listings] for name in listings[0]}
    columns["images"] = pa.array(
        [[image(x) for x in xs] for xs in columns["images"]], pa.list_(kind)
    )
    if attributes == "map":
        pairs = [list(value.items()) for value in columns["attributes"]]
        columns["attributes"] = pa.array(pairs, pa.map_(pa.string(), pa.string()))
    elif attributes == "json":
        columns["attributes"] = [json.dumps(value) for value in columns["attributes"]]
    table = pa.table(columns)
    pq.write_table(table.slice(0, 2), folder / "products-0.parquet")
    pq.write_table(table.slice(2), folder / "products-1.parquet", row_group_size=3)
    expect(open_catalog(folder, cache_dir=tmp_path), listings)


def test_a_bad_row_of_parquet_is_told_by_its_row(tmp_path):
    table = pa.table(
        {
            "listing_id": ["a", "b", "c"],
            "product_id": ["a", "b", "c"],
            "title": pa.array([b"x", b"\xff", b"z"]).view(pa.string()),
            "images": [[png("red")], [], [png("red")[:40]]],
        }
    )
    pq.write_table(table, tmp_path / "shop.parquet")
    with pytest.raises(UserError) as raised:
        open_catalog(tmp_path / "shop.parquet", cache_dir=tmp_path / "cache")
    assert "shop.parquet row 2: holds text that is not UTF-8" in str(raised.value)
    assert "shop.parquet row 3: an image can't be decoded" in str(raised.value)
    catalog = open_catalog(
        tmp_path / "shop.parquet", cache_dir=tmp_path / "cache", on_bad_listing="skip"
    )
    assert [catalog.listing(i).listing_id for i in range(len(catalog))] == ["a"]


def test_a_parquet_file_that_can_not_be_right_is_refused_at_once(tmp_path):
    path = tmp_path / "products.parquet"
    pq.write_table(pa.table({"listing_id": [1], "product_id": ["1"]}), path)
    with pytest.raises(UserError, match="column listing_id is int64, expected string"):
        open_catalog(path, cache_dir=tmp_path)
    pq.write_table(pa.table({"id": ["1"]}), path)
    with pytest.raises(UserError, match="no column listing_id; it has id"):
        open_catalog(path, cache_dir=tmp_path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="can't be read as Parquet"):
        open_catalog(path, cache_dir=tmp_path)


def test_a_tfds_dataset_is_read_by_folder_and_by_name(tmp_path, monkeypatch, caplog):
    import tensorflow_datasets as tfds

    listings = rows(4)
    folder = write_folder(tmp_path / "a", listings)
    text = tfds.features.Text()

    class Shop(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "listing_id": text,
                "product_id": text,
                "title": text,
                "category": text,
                "price": text,
                "attributes": {"color": text, "size": text},
                "images": tfds.features.Sequence(tfds.features.Image()),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, row in enumerate(listings):
                images = [str(folder / image) for image in row["images"]]
                yield (
                    index,
                    {k: v for k, v in row.items() if k != "description"}
                    | {"images": images, "price": "5"},
                )

    home = tmp_path / "tfds"
    Shop(data_dir=home, file_format="array_record").download_and_prepare()
    with caplog.at_level("INFO", "afmrl_jax"):
        by_folder = open_catalog(home / "shop" / "1.0.0", cache_dir=tmp_path)
    assert 'shop: fields that are not read: "price" (4 listings)' in caplog.messages
    assert by_folder.name == "shop"
    # TFDS shuffles as it writes
    found = [int(by_folder.listing(i).listing_id[1:]) for i in range(len(by_folder))]
    assert sorted(found) == list(range(4))
    expect(by_folder, [listings[i] | {"split": "train"} for i in found])

    monkeypatch.setenv("TFDS_DATA_DIR", str(home))
    for name in ("tfds:shop", "tfds:shop:1.0.0"):
        assert open_catalog(name, cache_dir=tmp_path).fingerprint == by_folder.fingerprint
    with pytest.raises(UserError, match="no prepared TFDS dataset"):
        open_catalog("tfds:shop:2.0.0", cache_dir=tmp_path)


# ---- splits


def test_without_a_split_field_one_product_in_twenty_is_validation(tmp_path):
    listings = [row | {"images": []} for row in rows(400)]
    catalog = open_catalog(write_folder(tmp_path / "a", listings), cache_dir=tmp_path)
    expected = [
        i
        for i, row in enumerate(listings)
        if int(hashlib.sha256(row["product_id"].encode()).hexdigest(), 16) % 20 == 0
    ]
    assert 4 <= len(expected) <= 40
    assert catalog.indices("val").tolist() == catalog.indices("validation").tolist() == expected
    assert sorted([*catalog.indices("train"), *expected]) == list(range(400))
    assert catalog.indices("test").tolist() == [] and catalog.indices("all").dtype == np.int64
    assert split_of_product(listings[expected[0]]["product_id"]) == "validation"


def test_a_split_field_is_followed_and_an_unknown_split_is_an_error(tmp_path):
    splits = ["val", "train", "catalog", "test"]
    listings = [row | {"split": split} for row, split in zip(rows(4), splits)]
    catalog = open_catalog(write_folder(tmp_path / "a", listings), cache_dir=tmp_path)
    assert catalog.indices("validation").tolist() == [0]
    assert catalog.indices("catalog").tolist() == [2]
    assert catalog.listing(0).split == "validation"
    with pytest.raises(UserError, match="no split 'trian'; it has catalog, test, train"):
        catalog.indices("trian")


# ---- images


def test_images_come_upright_in_rgb_on_white(tmp_path):
    folder = write_folder(tmp_path / "a", [])
    names = ["alpha.png", "palette.png", "grey16.png", "cmyk.jpg", "turned.jpg"]
    alpha = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    alpha.putpixel((3, 3), (255, 0, 0, 255))
    alpha.save(folder / "images/alpha.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((3, 3), 1)
    palette.save(folder / "images/palette.png", transparency=0)
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    grey.save(folder / "images/grey16.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(folder / "images/cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 4), "red").save(folder / "images/turned.jpg", exif=exif)
    row = {"listing_id": "1", "product_id": "1", "images": [f"images/{name}" for name in names]}
    (folder / "products.jsonl").write_text(json.dumps(row))

    catalog = open_catalog(folder, cache_dir=tmp_path)
    alpha, palette, grey, cmyk, turned = (catalog.image(0, which) for which in range(5))
    assert {image.mode for image in (alpha, palette, grey, cmyk, turned)} == {"RGB"}
    assert alpha.getpixel((0, 0)) == palette.getpixel((0, 0)) == (255, 255, 255)
    assert alpha.getpixel((3, 3)) == palette.getpixel((3, 3)) == (255, 0, 0)
    assert grey.getpixel((0, 0)) == (128, 128, 128)
    assert min(cmyk.getpixel((0, 0))) > 250
    assert turned.size == (4, 8)


def test_images_of_one_colour_are_counted_and_named_at_each_opening(tmp_path, caplog):
    folder = write_folder(tmp_path / "a", rows(6))
    (folder / "images/3.png").write_bytes(png("red", size=(1, 1)))
    two = Image.new("RGB", (8, 6), "red")
    two.putpixel((0, 0), (0, 0, 255))
    two.save(folder / "images/1.png")
    for more in ([], [], rows(7)[6:]):  # converted, from the cache, checked again with one more
        write = "".join(json.dumps(row) + "\n" for row in rows(6) + more)
        (folder / "products.jsonl").write_text(write)
        caplog.clear()
        catalog = open_catalog(folder, cache_dir=tmp_path)
        said = "a: 2 images of the 3 show one colour and nothing else, as of listing "
        assert said + '"l3"' in caplog.messages
    assert len(catalog) == 7


def test_an_image_that_goes_bad_later_is_an_error_or_skipped_and_told_once(tmp_path):
    folder = write_folder(tmp_path / "a", rows(4))
    strict = open_catalog(folder, cache_dir=tmp_path)
    report = tmp_path / "report"
    lenient = open_catalog(folder, cache_dir=tmp_path, on_bad_listing="skip", report_dir=report)
    (folder / "images/1.png").unlink()
    (folder / "images/3.png").write_bytes(b"overwritten")
    with pytest.raises(UserError, match=r"products.jsonl line 2: image .*1\.png.*can't be found"):
        strict.image(1)
    for reader in (lenient, lenient, pickle.loads(pickle.dumps(lenient))):  # another process's
        assert reader.image(1) is None and reader.image(3) is None
    lines = [json.loads(line) for line in (report / "bad_listings.jsonl").read_text().splitlines()]
    assert [(row["listing_id"], row["line"]) for row in lines] == [("l1", 2), ("l3", 4)]


# ---- cache


def count_decodes(monkeypatch) -> list[str]:
    decoded: list[str] = []

    def read_image(source, name, *, decode=True):
        decoded.append(f"{name} {decode}")
        return validation.read_image(source, name, decode=decode)

    monkeypatch.setattr(checking, "read_image", read_image)
    return decoded


def test_the_second_open_neither_converts_nor_decodes(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", rows(6))
    decoded = count_decodes(monkeypatch)
    first = open_catalog(folder, cache_dir=tmp_path)
    assert len(decoded) == 3
    monkeypatch.setattr(conversion, "_convert_into", None)
    second = open_catalog(folder, cache_dir=tmp_path)
    assert len(decoded) == 3 and second.fingerprint == first.fingerprint
    expect(second, rows(6))


def test_only_what_changed_is_looked_at_again(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", rows(6))
    first = open_catalog(folder, cache_dir=tmp_path)
    decoded = count_decodes(monkeypatch)
    more = rows(8)
    (folder / "images/7.png").write_bytes(png((70, 0, 0)))
    (folder / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    second = open_catalog(folder, cache_dir=tmp_path)
    assert decoded == ["images/7.png True"] and second.fingerprint != first.fingerprint
    (folder / "images/3.png").write_bytes(png((30, 0, 0), size=(20, 30)))
    third = open_catalog(folder, cache_dir=tmp_path)
    assert decoded[1:] == ["images/3.png True"] and third.fingerprint != second.fingerprint
    expect(third, more)


def test_a_mended_image_is_good_again_even_where_not_every_image_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "WATCHED_IMAGES", 1)
    monkeypatch.setattr(checking, "WATCHED_IMAGES", 1)
    folder = write_folder(tmp_path / "a", rows(8))
    (folder / "images/7.png").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="line 8: image"):
            open_catalog(folder, cache_dir=tmp_path)
    (folder / "images/7.png").write_bytes(png((70, 0, 0)))
    expect(open_catalog(folder, cache_dir=tmp_path), rows(8))


def test_beyond_the_limit_most_images_are_judged_by_their_header(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "FULLY_DECODED", 10)
    decoded = count_decodes(monkeypatch)
    open_catalog(write_folder(tmp_path / "a", rows(200)), cache_dir=tmp_path)
    fully = sum(entry.endswith("True") for entry in decoded)
    assert len(decoded) == 100 and 1 <= fully <= 30


def test_the_fingerprint_is_of_the_content_not_of_the_place_or_time(tmp_path):
    one = write_folder(tmp_path / "one", rows(4))
    two = write_folder(tmp_path / "two", rows(4))
    os.utime(two / "products.jsonl", (1, 1))
    prints = [open_catalog(path, cache_dir=tmp_path).fingerprint for path in (one, two)]
    assert prints[0] == prints[1]
    changed = rows(4)
    changed[2]["title"] += "!"
    write_folder(two, changed)
    assert open_catalog(two, cache_dir=tmp_path).fingerprint != prints[0]


def with_times_of(path: Path, write) -> None:
    """Writes a file as tar, rsync and image layers do, which set the time of what was there."""
    status = path.stat()
    write()
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_source_of_equal_size_and_time_is_read_again(tmp_path):
    folder = write_folder(tmp_path / "a", rows(4))
    path = folder / "products.jsonl"
    first = open_catalog(folder, cache_dir=tmp_path / "cache")
    with_times_of(path, lambda: path.write_text(path.read_text().replace("杯 3", "杯 4")))
    second = open_catalog(folder, cache_dir=tmp_path / "cache")
    assert second.listing(3).title == "Café-Becher 杯 4" != first.listing(3).title
    assert second.fingerprint != first.fingerprint


def test_a_source_that_was_only_touched_is_not_converted_again(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", rows(4))
    first = open_catalog(folder, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(conversion, "_convert_into", None)
    os.utime(folder / "products.jsonl", (1, 1))
    assert open_catalog(folder, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", rows(4))
    convert_into = conversion._convert_into

    def convert_and_change(temporary, source):
        convert_into(temporary, source)
        write_folder(folder, rows(6))

    monkeypatch.setattr(conversion, "_convert_into", convert_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        open_catalog(folder, cache_dir=tmp_path / "cache")
    monkeypatch.undo()
    expect(open_catalog(folder, cache_dir=tmp_path / "cache"), rows(6))


def test_a_source_that_changes_behind_its_hash_is_refused(tmp_path, monkeypatch):
    """Else the new listings would lie under the old ones' name, and be served for these."""
    folder = write_folder(tmp_path / "a", rows(4))
    hash_content = conversion._source_content

    def hash_and_change(*arguments):
        content = hash_content(*arguments)
        write_folder(folder, rows(6))
        return content

    monkeypatch.setattr(conversion, "_source_content", hash_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        open_catalog(folder, cache_dir=tmp_path / "cache")
    monkeypatch.undo()
    write_folder(folder, rows(4))
    expect(open_catalog(folder, cache_dir=tmp_path / "cache"), rows(4))


def bmp(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "BMP")
    return buffer.getvalue()


def test_pictures_of_equal_size_are_told_apart_by_their_bytes(tmp_path):
    """An uncompressed picture's size says nothing of what it shows."""
    prints, photos = [], []
    for name, shift in (("studio", 0), ("phone", 1)):
        folder = write_folder(tmp_path / name, rows(6))
        for i in (1, 3, 5):
            (folder / f"images/{i}.png").write_bytes(bmp((10 * i + shift, 0, 0)))
        catalog = open_catalog(folder, cache_dir=tmp_path / "cache")
        prints.append(catalog.fingerprint)
        photos.append([catalog.content(i).photos for i in range(6)])
    assert prints[0] != prints[1]
    assert photos[0][::2] == photos[1][::2] == [frozenset()] * 3  # every other one has no photo
    assert not any(one & other for one, other in zip(*photos))


def test_a_picture_of_equal_size_and_time_is_another_catalogue_even_where_few_are_watched(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(conversion, "WATCHED_IMAGES", 1)
    folder = write_folder(tmp_path / "a", rows(8))
    first = open_catalog(folder, cache_dir=tmp_path / "cache")
    for i in (1, 3, 5, 7):
        path = folder / f"images/{i}.png"
        path.unlink()
        path.write_bytes(png((10 * i, 0, 0)))  # the same bytes in another file
    assert open_catalog(folder, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    other = folder / "images/other"
    other.write_bytes(png((31, 0, 0)))
    assert other.stat().st_size == (folder / "images/3.png").stat().st_size
    os.utime(other, ns=((folder / "images/3.png").stat().st_mtime_ns,) * 2)
    other.rename(folder / "images/3.png")  # as tar and rsync replace a file
    second = open_catalog(folder, cache_dir=tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    assert second.image(3).getpixel((0, 0)) == (31, 0, 0)


def open_there(folder: Path, cache: Path) -> str:
    return open_catalog(folder, cache_dir=cache).fingerprint


def test_processes_that_convert_at_once_agree_and_leave_nothing_behind(tmp_path):
    folder = write_folder(tmp_path / "a", rows(40))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        prints = list(pool.map(open_there, [folder] * 2, [tmp_path / "cache"] * 2))
    assert prints[0] == prints[1]
    assert not list((tmp_path / "cache").rglob(".unfinished*"))


def test_a_pickled_catalogue_carries_no_data_and_reads_the_same(tmp_path):
    listings = rows(400)
    catalog = open_catalog(write_folder(tmp_path / "a", listings), cache_dir=tmp_path)
    data = pickle.dumps(catalog)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert copy.listing(399) == catalog.listing(399)
    assert copy.image(1).tobytes() == catalog.image(1).tobytes()


# ---- several catalogues


def test_concatenated_catalogues_share_products_by_id(tmp_path):
    one = open_catalog(write_folder(tmp_path / "one", rows(4)), cache_dir=tmp_path)
    two = open_catalog(write_folder(tmp_path / "two", rows(6)), cache_dir=tmp_path)
    both = pickle.loads(pickle.dumps(ConcatCatalog([one, two])))
    assert len(both) == 10 and both.name == "one+two"
    assert both.products.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2]
    assert both.listing(9) == two.listing(5)
    assert both.image(9).tobytes() == two.image(5).tobytes()
    assert [*both.indices("train"), *both.indices("validation")] == [0, 1, 2, 3, 8, 9]
    with pytest.raises(IndexError):
        both.listing(10)


# ---- real catalogues


@pytest.mark.parametrize(
    ("name", "n_listings", "n_products"), [("luma", 675, 420), ("grocery", 1673, 81)]
)
def test_real_catalogues_open_whole(name, n_listings, n_products, tmp_path):
    catalog = open_catalog(real_data(name), cache_dir=tmp_path)
    assert len(catalog) == n_listings
    assert catalog.products.max() + 1 == len(np.unique(catalog.products)) == n_products
    assert catalog.listing(0).title and catalog.image(0).mode == "RGB"
