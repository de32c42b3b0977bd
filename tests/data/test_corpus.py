import itertools
import pickle

import numpy as np
import pytest

from afmrl_jax.data.catalog import open_catalog
from afmrl_jax.data.corpus import (
    TrainedOn,
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
