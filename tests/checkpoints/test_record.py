"""Records of runs that other versions began. first_records.json: the oldest that can be read."""

import json
from pathlib import Path

import pytest

from afmrl_jax.assembly.options import TrainingOptions
from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.checkpoints.record import (
    MAY_CHANGE,
    catalogue_record,
    check_catalogue,
    check_terms,
    check_unchanged,
    recorded,
)
from afmrl_jax.configs import agcl, evaluate, sft
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import flatten
from afmrl_jax.core.pages import program_fields

FIRST = json.loads((Path(__file__).parent / "first_records.json").read_text())
RUN = Path("runs/sft")


def record(**fields):
    """Of an SFT run; fields by section__name, None for one that did not exist."""
    saved = json.loads(sft.get_config().to_json())
    for name, value in fields.items():
        section, name = name.split("__")
        if value is None:
            del saved[section][name]
        else:
            saved[section][name] = value
    return json.dumps(saved)


@pytest.mark.parametrize("program", FIRST)
def test_each_field_since_the_first_records_tells_what_was_computed_without_it(program):
    fields = flatten(recorded(FIRST[program]))
    new = program_fields(program).keys() - fields.keys()
    assert [name for name in sorted(new) if not name.startswith(MAY_CHANGE)] == []


def test_a_run_from_before_a_field_goes_on_where_its_value_computes_the_same():
    saved = record(data__answer_dropout=None, data__timeout=None)
    config = sft.get_config()  # leaves answers' attributes out, which was not possible then
    sentence = (
        r"answer_dropout was 0\.0 \(the run is older than it\) and is now 0\.15\. .*, as --co"
    )
    with pytest.raises(UserError, match=sentence + r"nfig\.data\.answer_dropout=0\.0, or another"):
        check_unchanged(saved, config, RUN)
    config.data.answer_dropout = 0.0
    check_unchanged(saved, config, RUN)


def test_an_old_record_describes_its_model():
    settings = recorded(json.dumps(FIRST["agcl"]))
    assert TrainingOptions.of(settings).lora is None and settings.data.prompt == "plain"
    assert settings.model.preset == FIRST["agcl"]["model"]["preset"]


@pytest.mark.parametrize(
    "saved, sentence",
    [
        (
            record(optimizer__embedding_rate=10.0),
            "version of sft: optimizer.embedding_rate is gone",
        ),
        (record(model__dtype=None), "version of sft: model.dtype is new since; go on with that ve"),
        (evaluate.get_config().to_json(), "holds a run of evaluate: give sft another --workdir"),
        ("{", "runs/sft: the record of a run holds no configuration; bring it back"),
        ("[]", "runs/sft: the record of a run holds no configuration; bring it back"),
    ],
)
def test_a_record_that_cannot_be_gone_on_with_says_what_can_be_done(saved, sentence):
    with pytest.raises(UserError, match=sentence):
        check_unchanged(saved, sft.get_config(), RUN)


def test_equal_numbers_of_another_type_are_no_change():
    config = agcl.get_config()
    saved = json.loads(config.to_json())
    saved["loss"]["weight_strength"], saved["data"]["flip_share"] = 1, 0
    check_unchanged(json.dumps(saved), config, RUN)


def test_a_run_that_began_with_other_terms_goes_on_with_a_word_unless_they_are_its_labels(caplog):
    now = CorpusStatistics.from_documents([{"color": "navy"}]).to_json()
    check_terms(now, Path("run"), labels=True)
    assert not caplog.text
    before = json.dumps({"n_documents": 1, "average_length": 2, "document_frequencies": {}})
    check_terms(before, Path("run"), labels=False)
    assert "run began with a program that compares attributes otherwise (version 1" in caplog.text
    with pytest.raises(UserError, match="head's labels"):
        check_terms(before, Path("run"), labels=True)


def test_a_run_from_before_fingerprints_saw_bytes_goes_on_with_a_word(caplog):
    check_catalogue(catalogue_record("now"), "now", "shop", RUN)
    assert not caplog.text
    with pytest.raises(UserError, match="is not the one that runs/sft began with"):
        check_catalogue(catalogue_record("other"), "now", "shop", RUN)
    check_catalogue({"catalogue": "of sizes"}, "now", "shop", RUN)
    assert "runs/sft began with a version that knew photos by their size alone" in caplog.text
