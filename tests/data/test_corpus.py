import itertools
import json
import pickle

import numpy as np
import pytest

from afmrl_jax.catalog.groups import listings_by_product
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.data.corpus import (
    TrainedOn,
    corpus_statistics,
    look_alikes,
    product_attributes,
)


@pytest.fixture(scope="module")
def catalog(catalogue_folder, tmp_path_factory):
    return open_catalog(catalogue_folder, cache_dir=tmp_path_factory.mktemp("cache"))


def test_listings_stand_by_product(catalog):
    listings, starts = listings_by_product(catalog, "train")
    assert len(starts) == 15 + 1
    for start, end in itertools.pairwise(starts):
        assert len(set(catalog.products[listings[start:end]])) == 1
    np.testing.assert_array_equal(np.sort(listings), catalog.indices("train"))


def test_a_training_split_can_be_cut_and_nothing_else_is(catalog):
    some = catalog.indices("train")[:4]
    cut = pickle.loads(pickle.dumps(TrainedOn(catalog, some)))
    listings, starts = listings_by_product(cut, "train")
    np.testing.assert_array_equal(np.sort(listings), some)
    assert len(starts) == 2 + 1 and len(cut) == len(catalog)
    assert cut.listing(30) == catalog.listing(30) and cut.image(30).size == catalog.image(30).size
    for split in ("validation", "test", "all"):
        np.testing.assert_array_equal(cut.indices(split), catalog.indices(split))
    # What is cached of one is not taken for the other's.
    others = [catalog.fingerprint, TrainedOn(catalog, some[:2]).fingerprint]
    assert cut.fingerprint == TrainedOn(catalog, some).fingerprint not in others


def test_look_alikes_share_an_attribute(catalog, tmp_path):
    statistics = corpus_statistics(catalog, "train", tmp_path)
    products = product_attributes(catalog, "train")
    neighbours = look_alikes(catalog, "train", 3, statistics, tmp_path)
    assert neighbours.shape == (15, 3)
    for product, others in enumerate(neighbours):
        assert product not in others
        for other in others[others >= 0]:
            assert set(products[product].items()) & set(products[other].items())


def test_the_catalogue_is_read_once(catalog, tmp_path, monkeypatch):
    first = corpus_statistics(catalog, "train", tmp_path)
    mined = look_alikes(catalog, "train", 2, first, tmp_path)

    def read(*_):
        raise AssertionError("the cache should have answered")

    monkeypatch.setattr("afmrl_jax.data.corpus.product_attributes", read)
    assert corpus_statistics(catalog, "train", tmp_path) == first
    np.testing.assert_array_equal(look_alikes(catalog, "train", 2, first, tmp_path), mined)


def test_what_statistics_leave_out_is_told_and_an_empty_value_hides_no_other(tmp_path, caplog):
    lines = [
        {
            "listing_id": f"{i}-{n}",
            "product_id": str(i),
            "title": "mug",
            "split": "train",
            "attributes": {"sku": f"s{i}{n}", "color": "unknown" if n else "navy", "size": "n/a"},
        }
        for i in range(12)
        for n in range(2)
    ]
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "products.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shop = open_catalog(folder, cache_dir=tmp_path / "cache")
    assert {p["color"] for p in product_attributes(shop, "train")} == {"navy"}
    for _ in range(2):  # made, and from the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            statistics = corpus_statistics(shop, "train", tmp_path)
        assert "sku (of 12 products)" in caplog.text and "n/a (12 times)" in caplog.text
    assert list(statistics.document_frequencies) == ["color=navy", "navy"]


def test_what_another_comparison_made_is_not_taken_from_the_cache(catalog, tmp_path, monkeypatch):
    first = corpus_statistics(catalog, "train", tmp_path)
    look_alikes(catalog, "train", 2, first, tmp_path)
    monkeypatch.setattr("afmrl_jax.attributes.comparison.VERSION", 99)
    corpus_statistics(catalog, "train", tmp_path)
    look_alikes(catalog, "train", 2, first, tmp_path)
    assert (
        len(list(tmp_path.glob("statistics-*"))) == len(list(tmp_path.glob("look-alikes-*"))) == 2
    )


@pytest.mark.parametrize("change", ["a field more", "a field less", "no fields"])
def test_statistics_that_another_version_cached_are_counted_anew(catalog, tmp_path, change):
    statistics = corpus_statistics(catalog, "train", tmp_path)
    (path,) = tmp_path.glob("statistics-*")
    values = json.loads(path.read_text())
    if change == "a field more":
        values["documents"] = 3
    if change == "a field less":
        del values["empty_values"]
    path.write_text(json.dumps([] if change == "no fields" else values))
    assert corpus_statistics(catalog, "train", tmp_path) == statistics
    assert json.loads(path.read_text()) == json.loads(statistics.to_json())
