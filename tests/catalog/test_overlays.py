import json
import pickle
import shutil

import numpy as np
import pytest

from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.catalog.overlays import open_attributes
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.core.errors import UserError

SMALL = {"train": 2, "validation": 1}


@pytest.fixture(scope="module")
def catalog():
    return SyntheticCatalog(families=SMALL)


def line(listing_id, **attributes):
    return json.dumps({"listing_id": listing_id, "attributes": attributes})


@pytest.fixture
def opened(catalog, tmp_path):
    """A function: writes lines (strings or bytes), lays them over the catalogue."""

    def over(*lines, **options):
        path = tmp_path / "attributes.jsonl"
        path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
        return open_attributes(catalog, path, cache_dir=tmp_path / "cache", **options)

    return over


def test_listings_have_the_attributes_of_their_line_and_without_one_none(catalog, opened):
    ids = [catalog.listing(i).listing_id for i in range(len(catalog))]
    other = opened(line(ids[3], color="mauve"), "", line(ids[1], größe="40; 41"), line(ids[2]))
    assert [other.listing(i).attributes for i in range(4)] == [
        {},
        {"größe": "40; 41"},
        {},
        {"color": "mauve"},
    ]
    own, laid = catalog.listing(3, draw=5), other.listing(3, draw=5)
    assert laid.attributes == {"color": "mauve"}  # a fresh rendering has them too
    assert (laid.listing_id, laid.title, laid.split) == (own.listing_id, own.title, own.split)


def test_all_else_is_the_catalogue_s_own_and_the_fingerprint_is_not(catalog, opened):
    first = catalog.listing(0).listing_id
    other, changed = opened(line(first, color="red")), opened(line(first, color="blue"))
    assert len({catalog.fingerprint, other.fingerprint, changed.fingerprint}) == 3
    assert opened(line(first, color="red")).fingerprint == other.fingerprint
    assert len(other) == len(catalog) and other.name == catalog.name
    np.testing.assert_array_equal(other.products, catalog.products)
    np.testing.assert_array_equal(other.indices("validation"), catalog.indices("validation"))
    np.testing.assert_array_equal(other.image(1), catalog.image(1))


def test_a_worker_process_reads_the_same(catalog, opened):
    other = opened(line(catalog.listing(0).listing_id, color="red"))
    sent = pickle.dumps(other)
    assert len(sent) < len(pickle.dumps(catalog)) + 1000
    assert pickle.loads(sent).listing(0) == other.listing(0)
    assert pickle.loads(sent).fingerprint == other.fingerprint


def test_several_catalogues_share_one_file(catalog, opened, tmp_path, catalogue_folder):
    shop = open_catalog(catalogue_folder, cache_dir=tmp_path / "cache")
    path = tmp_path / "both.jsonl"
    path.write_text(line(shop.listing(1).listing_id, a="1") + "\n" + line("nobody's", a="2") + "\n")
    both = ConcatCatalog([catalog, shop])
    other = open_attributes(both, path, cache_dir=tmp_path / "cache")
    assert other.listing(len(catalog) + 1).attributes == {"a": "1"}


def test_lines_of_no_listing_are_counted_and_told(catalog, opened, caplog):
    caplog.set_level("INFO", "afmrl_jax")
    lines = [line("nobody's"), line(catalog.listing(0).listing_id, a="1"), line("none's")]
    for _ in range(2):  # the second time from the cache
        opened(*lines)
        assert f"attributes of 1 of {len(catalog)} listings" in caplog.messages[-1]
        assert "2 of its lines are of no listing" in caplog.messages[-1]


def test_a_file_of_another_catalogue_is_refused(opened):
    for lines in ([], [line("nobody's", a="1")]):
        with pytest.raises(UserError, match=r"none of the .* listings of built-in"):
            opened(*lines)


@pytest.mark.parametrize(
    "bad, told",
    [
        (b'{"listing_id": "x", "attributes": {"a": "\xff"}}', "is not UTF-8"),
        ('{"listing_id": "x", "attributes": {"a": "b"', "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('["x"]', "is a list"),
        ('{"listing_id": "x"}', "attributes is missing"),
        ('{"listing_id": "x", "attributes": ["a"]}', "attributes is a list"),
        (
            '{"listing_id": "x", "attributes": "color"}',
            'attributes is the string "color"',
        ),
        ('{"listing_id": "x", "attributes": {"a": {"b": "c"}}}', 'attribute "a" is an object'),
        ('{"listing_id": "x", "attributes": {"a": "\\ud800"}}', "lone surrogate"),
        ('{"listing_id": 7, "attributes": {}}', "listing_id is a number"),
        ('{"attributes": {"a": "b"}}', "listing_id is missing"),
    ],
)
def test_a_bad_line_is_told_by_its_number_or_left_out(bad, told, catalog, opened, caplog, tmp_path):
    good = line(catalog.listing(0).listing_id, a="1")
    with pytest.raises(UserError) as error:
        opened(good, bad)
    assert "attributes.jsonl line 2" in str(error.value) and told in str(error.value)
    other = opened(good, bad, on_bad_listing="skip", report_dir=tmp_path / "w")
    assert other.listing(0).attributes == {"a": "1"}
    assert told in caplog.text
    assert json.loads((tmp_path / "w/bad_listings.jsonl").read_text())["line"] == 2


def test_several_bad_lines_are_told_with_their_counts(catalog, opened, caplog):
    lines = [line(catalog.listing(0).listing_id, a="1"), "?", "!", '{"listing_id": "x"}']
    with pytest.raises(UserError, match=r"2 x bad JSON, 1 x missing field\. Mend them"):
        opened(*lines)
    assert opened(*lines, on_bad_listing="skip").listing(0).attributes == {"a": "1"}
    assert "3 of 4 listings can't be used" in caplog.text


def test_two_lines_of_one_listing_are_refused(catalog, opened):
    first = catalog.listing(0).listing_id
    with pytest.raises(UserError, match=r"line 3: .* stands already in line 1; keep one"):
        opened(line(first, a="1"), "", line(first, a="2"))
    other = opened(line(first, a="1"), line(first, a="2"), on_bad_listing="skip")
    assert other.listing(0).attributes == {"a": "1"}


def test_a_configuration_names_the_file(agcl_config, tmp_path):
    data = agcl_config.data
    own = open_catalogue(CatalogOptions.of(agcl_config), tmp_path)
    data.attributes = str(tmp_path / "attributes.jsonl")
    with pytest.raises(UserError, match=r"data\.attributes: there is no file"):
        open_catalogue(CatalogOptions.of(agcl_config), tmp_path)
    (tmp_path / "attributes.jsonl").write_text(line(own.listing(0).listing_id, a="1"))
    other = open_catalogue(CatalogOptions.of(agcl_config), tmp_path)
    assert other.listing(0).attributes == {"a": "1"} != own.listing(0).attributes


# ---- lines that say what they were written for


def line_for(catalog, index, content=None, **attributes):
    """As annotate writes it."""
    content = catalog.content(index).key if content is None else content
    listing_id = catalog.listing(index).listing_id
    return json.dumps({"listing_id": listing_id, "attributes": attributes, "content": content})


def key(text, photos):
    return f"{text:016x}{photos:016x}"


def test_attributes_of_another_catalogue_with_the_same_ids_are_refused(catalog, opened):
    lines = [line_for(catalog, i, key(1, 2), color="red") for i in range(3)]
    with pytest.raises(UserError, match=r"none of the .* 3 lines have their ids, but were"):
        opened(*lines)


def test_lines_for_what_a_listing_was_are_left_out_and_told(catalog, opened, caplog):
    other = opened(line_for(catalog, 0, color="red"), line_for(catalog, 1, key(1, 2), color="blue"))
    assert [other.listing(i).attributes for i in (0, 1)] == [{"color": "red"}, {}]
    assert "1 lines were written for other texts and photos" in caplog.text


@pytest.mark.parametrize("same", ["text", "photos"])
def test_a_listing_with_a_new_text_or_new_photos_keeps_its_attributes_and_is_told(
    same, catalog, opened, caplog
):
    now = catalog.content(0).key
    content = now[:16] + key(0, 2)[16:] if same == "text" else key(1, 0)[:16] + now[16:]
    other = opened(line_for(catalog, 0, content, color="red"))
    assert other.listing(0).attributes == {"color": "red"}
    assert "1 listings have other photos, or another text" in caplog.text


def test_listings_without_text_are_not_the_same_by_that(tmp_path, catalogue_folder):
    photos = [f"images/{name}-0.png" for name in ("mug-red", "hat-blue")]
    for folder, photo in zip(("ours", "theirs"), photos):
        (tmp_path / folder / "images").mkdir(parents=True)
        shutil.copy(catalogue_folder / photo, tmp_path / folder / photo)
        row = {"listing_id": "0", "product_id": "0", "images": [photo]}
        (tmp_path / folder / "products.jsonl").write_text(json.dumps(row) + "\n")
    ours, theirs = (open_catalog(tmp_path / f, cache_dir=tmp_path) for f in ("ours", "theirs"))
    path = tmp_path / "attributes.jsonl"
    path.write_text(line_for(ours, 0, type="mug"))
    assert open_attributes(ours, path, cache_dir=tmp_path).listing(0).attributes == {"type": "mug"}
    with pytest.raises(UserError, match="1 lines have their ids, but were written for others"):
        open_attributes(theirs, path, cache_dir=tmp_path)


def test_of_several_answers_the_one_for_what_the_listing_is_now_counts(catalog, opened):
    lines = [
        line_for(catalog, 0, key(1, 2), color="old"),
        line_for(catalog, 0, color="now"),
        line_for(catalog, 0, key(3, 4), color="another"),
    ]
    assert opened(*lines).listing(0).attributes == {"color": "now"}


def test_a_line_that_does_not_say_which_of_two_listings_it_means_is_refused(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        row = {"listing_id": "0", "product_id": "0", "title": folder.name}
        (folder / "products.jsonl").write_text(json.dumps(row) + "\n")
    both = ConcatCatalog([open_catalog(f, cache_dir=tmp_path / "cache") for f in folders])
    path = tmp_path / "attributes.jsonl"
    path.write_text(line("0", color="red"))
    with pytest.raises(UserError, match=r"1 listing_ids .* name several listings .* \(as '0'\)"):
        open_attributes(both, path, cache_dir=tmp_path / "cache")
    path.write_text(line_for(both, 1, color="red"))
    laid = open_attributes(both, path, cache_dir=tmp_path / "cache")
    assert [laid.listing(i).attributes for i in (0, 1)] == [{}, {"color": "red"}]
