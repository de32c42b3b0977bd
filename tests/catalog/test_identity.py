"""Which listings of two catalogues are the same one, and what is said of it."""

import io
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from afmrl_jax.catalog.concat import ConcatCatalog
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.catalog.opening import ListingOptions, open_listings
from afmrl_jax.catalog.synthetic import SyntheticCatalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.pages import load_page
from afmrl_jax.programs.evaluate import _listings


def photo(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, "PNG")
    return file.getvalue()


def row(number: int, photos: tuple[int, ...] = (), **fields) -> dict:
    """Listing a0, a1, ... of products p0, p0, p1, p1, ...; photos: shades of grey."""
    listing = {"listing_id": f"a{number}", "product_id": f"p{number // 2}", "photos": photos}
    return {**listing, "title": f"Thing {number}", **fields}


@pytest.fixture
def shop(tmp_path):
    """A function: name and rows -> the folder of a catalogue."""

    def write(name: str, *rows: dict):
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for fields in rows:
            listing = dict(fields)
            listing["images"] = [f"{grey}.png" for grey in listing.pop("photos")]
            for grey, image in zip(fields["photos"], listing["images"]):
                (folder / image).write_bytes(photo(grey))
            lines.append(json.dumps(listing) + "\n")
        (folder / "products.jsonl").write_text("".join(lines))
        return folder

    return write


@pytest.fixture
def together(shop, tmp_path):
    """A function: the rows of each catalogue -> these as one."""

    def open_all(*catalogs, **how):
        parts = [shop(f"shop{i}", *rows) for i, rows in enumerate(catalogs)]
        opened = [open_catalog(part, cache_dir=tmp_path / "cache") for part in parts]
        return ConcatCatalog(opened, **how)

    return open_all


SHOWN = row(0, (10, 20))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (SHOWN, True),
        (row(0, (20,)), True),  # with fewer of its photos
        (row(0, (10, 20), title="Renamed"), True),  # a photo would find itself
        (row(0, (), title=" Thing  0 "), True),  # its text alone, with other blanks
        (row(0, (30,)), False),  # a customer's photo of it: a query worth asking
        (row(0, (), title="Sofa"), False),  # another shop that counts from 0
        (row(7, (10, 20), title="Thing 0"), False),  # offered twice
    ],
)
def test_listings_are_the_same_by_id_and_by_what_they_show(other, same, together):
    both = together([SHOWN], [other])
    assert both.identities.tolist() == ([0, 0] if same else [0, 1])
    assert both.indices("all").tolist() == ([0] if same else [0, 1])


def test_three_catalogues_hold_a_listing_once_in_the_first_one_s_split(together):
    many = together(
        [row(0, (1,), split="train")],
        [row(0, (3,), split="train"), row(2, (4,), split="train")],
        [row(0, (2, 1), split="test"), row(2, (4,), split="test")],
    )
    assert many.identities.tolist() == [0, 1, 2, 0, 2]
    assert [many.indices(split).tolist() for split in ("train", "test")] == [[0, 1, 2], []]


@pytest.mark.parametrize("order", itertools.permutations([(1,), (2,), (1, 2)]))
def test_two_listings_that_are_a_third_one_are_one_in_any_order(order, together):
    assert together(*([row(0, photos)] for photos in order)).identities.tolist() == [0, 0, 0]


def test_what_is_shared_merged_or_kept_apart_is_told_with_its_count(together, caplog):
    caplog.set_level("INFO", "afmrl_jax")
    together([row(i, (i,)) for i in range(4)], [row(0, (0,)), row(1, (99,)), row(8, (8,))])
    assert "1 listings stand in several of them and count once (as 'a0')" in caplog.text
    assert "1 listing_ids name different listings, which stay apart (as 'a1')" in caplog.text
    assert "1 product_ids stand in several and name one product each (as 'p0')" in caplog.text
    assert "set data.shared_ids=False" in caplog.text


def test_a_product_in_train_of_one_catalogue_and_in_test_of_another_is_told(together, caplog):
    together([row(0, split="train")], [row(1, split="test"), row(2, split="test")])
    assert "of the products that several of them have, 1 of the 1 products of test" in caplog.text


def test_catalogues_that_share_nothing_have_nothing_to_tell(together, caplog):
    caplog.set_level("INFO", "afmrl_jax.catalog.concat")
    both = together([row(0)], [row(2)])
    assert "stand in" not in caplog.text and both.identities.tolist() == [0, 1]


def test_shops_that_count_on_their_own_share_no_listing_and_no_product(together, caplog):
    caplog.set_level("INFO", "afmrl_jax.catalog.concat")
    shops = [row(0), row(1)], [row(0), row(1)]
    both = together(*shops, shared_ids=False)
    assert both.products.tolist() == [0, 0, 1, 1]
    assert both.indices("all").tolist() == both.identities.tolist() == [0, 1, 2, 3]
    assert both.product_ids.to_pylist() == ["p0", "p0"]
    assert "stand in" not in caplog.text


def test_one_listing_of_two_products_is_refused(together):
    with pytest.raises(UserError, match=r"1 listings are of one product .* \(as 'a0'\): correct"):
        together([row(0, (1,))], [row(0, (1,), product_id="p9")])


def test_the_fingerprint_says_whether_ids_are_shared(shop, tmp_path):
    one = open_catalog(shop("one", row(0)), cache_dir=tmp_path / "cache")
    two = open_catalog(shop("two", row(1)), cache_dir=tmp_path / "cache")
    prints = [ConcatCatalog([one, two], shared).fingerprint for shared in (True, False)]
    assert prints[0] != prints[1]


def test_the_configuration_says_whether_ids_are_shared(shop, tmp_path):
    path = f"{shop('one', row(0))},{shop('two', row(0))}"
    for shared, listings in ((True, [0]), (False, [0, 1])):
        config = load_page("configs/evaluate.py").unlock()
        config.data.update(path=path, shared_ids=shared, cache_dir=str(tmp_path / "cache"))
        options = ListingOptions.of(config)
        assert open_listings(options, tmp_path).indices("all").tolist() == listings


def test_a_rendered_catalogue_is_the_same_as_itself_and_as_no_other():
    catalogs = [SyntheticCatalog(seed, families={"test": 1}) for seed in (0, 0, 1)]
    n = len(catalogs[0])
    both = ConcatCatalog(catalogs)
    assert both.identities[: 2 * n].tolist() == [*range(n), *range(n)]
    assert (both.identities[2 * n :] >= 2 * n).all()
    ids = [both.listing(i).listing_id for i in range(len(both))]
    assert both.listing_ids.to_pylist() == ids


@pytest.fixture
def evaluated(tmp_path):
    """A function: fields of data and of eval -> the listings that `evaluate` judges."""

    def listings(data=None, **chosen):
        config = load_page("configs/evaluate.py").unlock()
        config.data.update(path="", cache_dir=str(tmp_path / "cache"))
        config.data.update(data or {})
        config.eval.update(query_split="all", gallery_split="all")
        config.eval.update(chosen)
        return _listings(config, tmp_path)

    return listings


def test_no_query_finds_itself_in_another_catalogue(shop, evaluated):
    whole = [row(i, (i,), split="test" if i < 4 else "train") for i in range(8)]
    paths = [shop("whole", *whole), shop("part", *whole[2:6])]
    both = ",".join(map(str, paths))
    listed = evaluated(queries=str(paths[1]), gallery=both, downstream=True)
    catalog = listed.catalog
    names = SimpleNamespace(
        **{
            side: [catalog.listing(int(i)).listing_id for i in getattr(listed, side)]
            for side in ("queries", "gallery")
        }
    )
    assert names.queries == ["a2", "a3", "a4", "a5"]
    assert sorted(names.gallery) == [f"a{i}" for i in range(8)]  # what both hold, once
    itself = catalog.identities[listed.queries][:, None] == catalog.identities[listed.gallery]
    equal_ids = np.array(names.queries)[:, None] == np.array(names.gallery)
    np.testing.assert_array_equal(itself, equal_ids)
    assert not len(listed.training)  # all of the queries' training listings are judged


def test_one_of_the_queries_catalogues_is_the_same_in_the_gallery_where_ids_are_not_shared(
    shop, evaluated
):
    paths = [str(shop(name, row(0, (1,)), row(1, (n,)))) for n, name in ((2, "one"), (3, "two"))]
    listed = evaluated({"path": ",".join(paths), "shared_ids": False}, gallery=paths[1])
    assert len(listed.catalog) == 4
    assert listed.queries.tolist() == [0, 1, 2, 3] and listed.gallery.tolist() == [2, 3]


def test_a_comma_too_many_names_no_catalogue_and_none_at_all_is_told(shop, evaluated):
    assert len(evaluated({"path": f"{shop('one', row(0))}, "}).catalog) == 1
    with pytest.raises(UserError, match="no catalogue is named"):
        evaluated({"path": " "})
