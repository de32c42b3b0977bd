"""Nothing that a catalogue says under a nearly right name is dropped without a word."""

import json
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afmrl_jax.catalog.checking import SharedProducts, describe_shared, shared_products
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.catalog.names import clean_identifier, similar_field, similar_splits, split_name
from afmrl_jax.catalog.overlays import open_attributes
from afmrl_jax.core.errors import UserError


@pytest.fixture
def opened(tmp_path, caplog):
    """Writes listings (fields of each) as a catalogue, opens it twice, and gives (catalogue, what
    was logged the second time), as all is said from the cache as well."""

    def open_twice(*listings: dict, **options):
        lines = [
            json.dumps({"listing_id": f"l{i}", "product_id": f"p{i}", "title": "Mug"} | fields)
            for i, fields in enumerate(listings)
        ]
        (tmp_path / "shop.jsonl").write_text("\n".join(lines))
        for _ in range(2):
            caplog.clear()
            with caplog.at_level("INFO", "afmrl_jax"):
                catalog = open_catalog(tmp_path / "shop.jsonl", cache_dir=tmp_path, **options)
        return catalog, "\n".join(caplog.messages)

    return open_twice


# ---- fields


@pytest.mark.parametrize(
    ("field", "names"),
    {
        "images": "image Images img photo photos picture image_path imagePaths main_image iamges",
        "attributes": "Attributes attribute attrs atributes ATTRIBUTES",
        "description": "desc Description descriptions discription product_description",
        "title": "name Title titel product_name productTitle ｔｉｔｌｅ",
        "category": "categories Category category_name catgory",
        "split": "Split splits spilt",
        "listing_id": "id listingId item_id sku listing-id",
        "product_id": "productID product group_id product.id",
    }.items(),
)
def test_what_others_call_a_field_is_known(field, names):
    assert {name: similar_field(name) for name in names.split()} == dict.fromkeys(
        names.split(), field
    )
    assert similar_field(f" {field}\u200b") == field


def test_what_means_something_else_is_no_misspelt_field():
    names = (
        "price url style_id brand color size gender season category_id subtitle image_url "
        "attribute_set image_count text label type"
    )
    assert [name for name in names.split() if similar_field(name)] == []


def test_unread_fields_are_counted_and_named_and_a_filled_field_needs_no_other(opened):
    fields = {"style_id": "s", "name": "x", "price": None}
    catalog, said = opened(fields, fields, {"style_id": 5, "images": [], "image": ""})
    assert len(catalog) == 3
    assert 'shop: fields that are not read: "style_id" (3 listings), "name" (2 listings)' in said
    assert "price" not in said


def test_a_catalogue_without_images_whose_fields_speak_of_some_is_told(opened):
    _, said = opened({"image_url": "http://x/1.jpg"})
    assert 'no listing has an image, though "image_url" may tell of some' in said


def test_a_column_with_a_nearly_right_name_is_refused_as_a_field_is(tmp_path):
    path = tmp_path / "shop.parquet"
    columns = {"listing_id": ["a"], "product_id": ["p"], "title": ["x"]}
    pq.write_table(pa.table(columns | {"Attributes": ['{"a": "b"}']}), path)
    with pytest.raises(UserError, match='row 1: has a field "Attributes" and no attributes; did'):
        open_catalog(path, cache_dir=tmp_path)
    pq.write_table(pa.table({"listing_id": ["a"], "Product_ID": ["p"]}), path)
    with pytest.raises(UserError, match=r'no column product_id; .*did you mean "Product_ID"'):
        open_catalog(path, cache_dir=tmp_path)


def test_a_column_or_part_of_a_column_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "shop.parquet"
    ids, one = [pa.array(["a"]), pa.array(["p"])], pa.array(["x"])
    names = ["listing_id", "product_id", "title"]
    pq.write_table(pa.Table.from_arrays([*ids, one, one], [*names, "title"]), path)
    with pytest.raises(UserError, match="two columns title; keep one"):
        open_catalog(path, cache_dir=tmp_path)
    struct = pa.StructArray.from_arrays([one, one], names=["color", "color"])
    pq.write_table(pa.Table.from_arrays([*ids, one, struct], [*names, "attributes"]), path)
    with pytest.raises(UserError, match='column attributes names "color" twice'):
        open_catalog(path, cache_dir=tmp_path)
    pairs = pa.array([[("color", "x"), ("color", "y")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.Table.from_arrays([*ids, one, pairs], [*names, "attributes"]), path)
    with pytest.raises(UserError, match='row 1: names "color" twice'):
        open_catalog(path, cache_dir=tmp_path)


def test_one_attribute_in_two_spellings_with_one_value_is_no_mistake(opened):
    catalog, _ = opened({"attributes": {"Color": "navy", "color ": " navy", "size": ""}})
    assert catalog.listing(0).attributes["Color"] == "navy"


def test_a_file_of_attributes_is_held_to_the_same_names(opened, tmp_path):
    catalog, _ = opened({}, {})
    path = tmp_path / "answers.jsonl"
    for line, says in {
        '{"listing_id": "l0", "Attributes": {"a": "b"}}': 'a field "Attributes" and no attributes',
        '{"listing_id": "l0", "attributes": {}, "attrs": {"a": "b"}}': 'a field "attrs" and no',
        '{"listing_id": "l0", "attributes": {"a": "b", "a": "c"}}': 'names "a" twice',
        '{"id": "l0", "attributes": {"a": "b"}}': 'it has "id": is that it',
    }.items():
        path.write_text(line)
        with pytest.raises(UserError, match=says):
            open_attributes(catalog, path, cache_dir=tmp_path)
    path.write_text('{"listing_id": "\\ufeffl1 ", "attributes": {"a": "b"}, "model": "m"}')
    assert open_attributes(catalog, path, cache_dir=tmp_path).listing(1).attributes == {"a": "b"}


# ---- identifiers


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (" p1\t", "p1"),
        ("p\u200b1", "p1"),
        ("\ufeffp1\u00a0", "p1"),
        (unicodedata.normalize("NFD", "café"), "café"),
        ("P 1/ü", "P 1/ü"),
    ],
)
def test_an_identifier_is_what_a_reader_sees(written, read):
    assert clean_identifier(written) == read == clean_identifier(read)


def test_products_whose_ids_look_the_same_are_one_product_and_that_is_told(opened):
    ids = ["p1", "p1 ", "p\u200b1", "p2"]
    catalog, said = opened(*({"product_id": i} for i in ids))
    assert catalog.products.tolist() == [0, 0, 0, 1]
    assert catalog.listing(1).product_id == "p1"
    assert 'in 2 listings that changes them, as "p1 " to "p1"' in said


def test_ids_that_differ_by_case_stay_different_products_and_that_is_told(opened):
    catalog, said = opened(*({"product_id": i} for i in ("Ab", "aB", "c")))
    assert catalog.products.tolist() == [0, 1, 2]
    assert '2 product_ids differ by upper and lower case alone, as "Ab" and "aB"' in said


# ---- splits


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": ["train", "Train", "train ", "TRAINING"],
        "validation": ["val", "valid", "Valid\u00a0", "dev", "validate", "Validation"],
        "test": ["test", " Test", "testing"],
        "catalog": ["Catalog"],
    }.items(),
)
def test_a_split_is_read_whatever_its_case_blanks_and_short_form(split, names):
    assert [split_name(name) for name in names] == [split] * len(names)
    assert similar_splits(split) == ()


def test_only_what_nearly_spells_a_split_is_taken_for_a_slip():
    assert similar_splits("trian") == ("train",)
    assert similar_splits("validaton") == ("validation",)
    assert similar_splits("all") == ("train", "validation", "test")
    for name in ("gallery", "rest", "best", "test_hard", "train2", "fold1", "x" * 10**6):
        assert similar_splits(name) == ()


def test_what_splits_were_read_as_and_which_are_of_no_use_is_told(opened):
    splits = ["Train", "train", "dev", "catalog", "catalog", None]
    catalog, said = opened(*({"split": split} for split in splits))
    assert catalog.indices("validation").tolist() == catalog.indices("Dev ").tolist() == [2]
    assert catalog.listing(0).split == "train"
    assert 'names of splits: "Train = train" (1 listing), "dev = validation" (1 listing)' in said
    assert 'it has other splits, "catalog" (2 listings): nothing trains on them' in said
    assert "1 listing of 6 name no split" in said
    assert "no listing of validation" not in said


def test_a_catalogue_that_leaves_nothing_to_judge_by_is_told_before_training(opened):
    _, said = opened({"split": "train"}, {"split": "holdout"})
    assert "it has no listing of validation or test, by which a model could be judged" in said


# ---- products in two splits


def test_products_in_two_splits_are_counted_by_pair_of_splits():
    products = np.array([0, 0, 1, 1, 2, 2, 2, 3, 4], np.int32)
    listings = {
        "train": np.array([0, 2, 4]),  # products 0, 1, 2
        "validation": np.array([1, 5, 6, 8]),  # 0, 2, 4
        "test": np.array([7]),  # 3
    }
    expected = SharedProducts("validation", "train", products=2, of=3, listings=3, example=1)
    assert shared_products(products, listings) == [expected]
    listings["test"] = np.array([3, 7, 8])  # 1, 3, 4
    assert shared_products(products, listings)[1:] == [
        SharedProducts("test", "train", products=1, of=3, listings=1, example=3),
        SharedProducts("test", "validation", products=1, of=3, listings=1, example=8),
    ]
    assert shared_products(products, {"train": np.arange(9)}) == []
    assert "2 of the 3 products of validation are in train as well (with 3 listings of valid" in (
        describe_shared([expected], lambda index: f"p{index}")
    )


def test_a_split_drawn_by_row_is_told_with_its_counts_an_example_and_the_cure(opened):
    splits = ("train", "train", "validation", "test")
    rows = [{"product_id": f"p{i}", "split": split} for i in range(91) for split in splits]
    _, said = opened(*rows)
    for split in ("validation", "test"):
        assert (
            f"91 of the 91 products of {split} are in train as well (with 91 listings of {split}, "
            'as "p0")'
        ) in said
    assert "give all listings of a product one split" in said


def test_products_divided_whole_are_not_told(opened):
    rows = [{"product_id": f"p{i % 40}"} for i in range(80)]
    catalog, said = opened(*rows)
    assert len(catalog.indices("validation")) and "as well" not in said
