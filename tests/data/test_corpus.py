import itertools

import numpy as np
import pytest

from afmrl_jax.data.catalog import open_catalog
from afmrl_jax.data.corpus import (
    corpus_statistics,
    listings_by_product,
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
