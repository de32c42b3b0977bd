"""Attributes that rows or answers cannot hold are told before anything compiles."""

import dataclasses
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict

from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.processor import Processor, RowSizes
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.models.presets import preset
from afmrl_jax.programs import agcl, sft

TOKENIZER = train_tokenizer(["color: red; type: mug; n0: v; fine mug shirt lamp shoe hat"] * 4, 340)
CONFIG = preset("tiny").replace(
    vocab_size=TOKENIZER.get_vocab_size(), **special_token_ids(TOKENIZER)
)
DATA = ConfigDict({"attribute_share": 0.7, "query_views": "image 1", "target_views": "text 1"})


def processor(max_answer=0, **sizes):
    usual = {"max_tokens": 64, "max_patches": 4, "min_pixels": 256, "max_pixels": 256}
    return Processor(TOKENIZER, CONFIG, RowSizes(**usual | sizes), max_answer=max_answer)


@pytest.fixture(scope="module")
def catalog(catalogue_folder, tmp_path_factory):
    return open_catalog(catalogue_folder, cache_dir=tmp_path_factory.mktemp("cache"))


class With:
    """A catalogue with other attributes."""

    def __init__(self, catalog, attributes):
        self.listing_of, self._attributes = catalog.listing, attributes

    def listing(self, index, draw=0):
        return dataclasses.replace(self.listing_of(index, draw), attributes=self._attributes)


def test_agcl_tells_of_attributes_that_its_rows_do_not_hold(catalog, caplog):
    agcl._tell_of_cut_attributes(DATA, catalog, processor())
    assert not caplog.records
    tight = processor(max_tokens=12)
    agcl._tell_of_cut_attributes(DATA, catalog, tight)
    assert "30 of 30 texts lose attributes" in caplog.text  # all training listings
    assert "data.max_tokens=12" in caplog.text
    caplog.clear()
    for changes in ({"attribute_share": 0.0}, {"target_views": "image 1"}):
        agcl._tell_of_cut_attributes(ConfigDict(DATA.to_dict() | changes), catalog, tight)
    assert not caplog.records


def test_sft_tells_how_many_attributes_are_not_learned_and_what_would_hold_them(catalog, caplog):
    listings = np.arange(4)
    sixty = With(catalog, {f"n{i}": "v" for i in range(60)})
    sft._check_answers_fit(catalog, listings, processor(max_answer=32))
    assert not caplog.records
    sft._check_answers_fit(sixty, listings, processor(max_answer=3000))
    told = "4 of 4 training listings have more attributes than an answer holds"
    assert told in caplog.text and "40 of their 240 attributes are not learned" in caplog.text
    assert "--config" not in caplog.text  # no answer of more than 50 pairs is valid
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sft._check_answers_fit(sixty, listings, processor(max_answer=32))
    needed = int(caplog.text.partition("--config.data.max_answer=")[2].partition(" ")[0])
    assert needed > 32 and "data.max_answer=32" in caplog.text
    caplog.clear()
    sft._check_answers_fit(sixty, listings, processor(max_answer=needed))
    assert "40 of their 240" in caplog.text
    with pytest.raises(UserError, match="no attribute of 4 training listings fits into an answer"):
        sft._check_answers_fit(sixty, listings, processor(max_answer=2))
