import json
from pathlib import Path

import pytest

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.core.errors import UserError
from afmrl_jax.training.unchanged import check_terms


def test_a_run_that_began_with_other_terms_goes_on_with_a_word_unless_they_are_its_labels(caplog):
    now = CorpusStatistics.from_documents([{"color": "navy"}]).to_json()
    check_terms(now, Path("run"), labels=True)
    assert not caplog.text
    before = json.dumps({"n_documents": 1, "average_length": 2, "document_frequencies": {}})
    check_terms(before, Path("run"), labels=False)
    assert "run began with a program that compares attributes otherwise (version 1" in caplog.text
    with pytest.raises(UserError, match="head's labels"):
        check_terms(before, Path("run"), labels=True)
