import numpy as np
import pytest

from afmrl_jax.data.catalog import open_catalog
from afmrl_jax.retrieval.evaluation import parse_task
from afmrl_jax.retrieval.tasks import can_be_run, validation_sample

SAME, CROSS = parse_task("image+text->image+text"), parse_task("image->text")


@pytest.fixture(scope="module")
def catalog(catalogue_folder, tmp_path_factory):
    return open_catalog(catalogue_folder, cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_task_needs_something_to_find(catalog):
    whole = catalog.indices("all")
    _, first = np.unique(catalog.products, return_index=True)  # one listing a product
    assert can_be_run(SAME, catalog, whole)
    assert not can_be_run(SAME, catalog, first)
    assert can_be_run(SAME, catalog, first, whole)
    assert can_be_run(CROSS, catalog, first)  # its own text is an answer
    assert not can_be_run(CROSS, catalog, first[:0])


def test_a_validation_sample_holds_whole_products_and_is_the_same_each_time(catalog):
    sample = validation_sample(catalog, [SAME], limit=4)
    np.testing.assert_array_equal(sample, validation_sample(catalog, [SAME], limit=4))
    assert set(sample) <= set(catalog.indices("validation"))
    assert (np.bincount(catalog.products[sample])[catalog.products[sample]] == 2).all()
    assert 4 <= len(sample) <= 6
