"""Whether a run may go on from its record."""

import json
from pathlib import Path

import pytest

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.checkpoints.record import (
    MAY_CHANGE,
    check_catalogue,
    check_statistics,
    check_unchanged,
)
from afmrl_jax.configs import agcl, evaluate, sft
from afmrl_jax.core.errors import UserError

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


@pytest.mark.parametrize(
    "saved, sentence",
    [
        (
            record(optimizer__embedding_rate=10.0),
            "version of sft: optimizer.embedding_rate is gone",
        ),
        (
            record(model__dtype=None),
            "version of sft: model.dtype is new since; use that version, or start anew",
        ),
        (evaluate.get_config().to_json(), "holds a run of evaluate: give sft another --workdir"),
        ("{", "runs/sft: the record of a run holds no configuration; bring it back"),
        ("[]", "runs/sft: the record of a run holds no configuration; bring it back"),
    ],
)
def test_a_record_that_cannot_be_gone_on_with_says_what_can_be_done(saved, sentence):
    with pytest.raises(UserError, match=sentence):
        check_unchanged(saved, sft.get_config().to_json(), RUN)


def test_a_changed_field_is_refused_by_its_name_unless_it_may_change():
    saved, config = sft.get_config().to_json(), sft.get_config()
    config.update(log_every=7, checkpoint_dir="elsewhere")
    config.mesh.fsdp = 2
    check_unchanged(saved, config.to_json(), RUN)
    config.optimizer.b1 = 0.5
    sentence = r"configuration: optimizer.b1 was 0.9 and is now 0.5\. .* --config.optimizer.b1=0.9"
    with pytest.raises(UserError, match=sentence):
        check_unchanged(saved, config.to_json(), RUN)
    check_unchanged(saved, config.to_json(), RUN, (*MAY_CHANGE, "optimizer."))


def test_equal_numbers_of_another_type_are_no_change():
    config = agcl.get_config()
    saved = json.loads(config.to_json())
    saved["loss"]["weight_strength"], saved["data"]["flip_share"] = 1, 0
    check_unchanged(json.dumps(saved), config.to_json(), RUN)


def test_a_run_that_began_with_other_terms_is_refused():
    now = CorpusStatistics.from_documents([{"color": "navy"}]).to_json()
    check_statistics({"statistics": now}, now, RUN)
    before = CorpusStatistics.from_documents([{"color": "Navy"}, {"color": "navy"}]).to_json()
    with pytest.raises(UserError, match="runs/sft began with a version of the program that comp"):
        check_statistics({"statistics": before}, now, RUN)


def test_a_run_that_began_with_another_catalogue_is_refused():
    check_catalogue({"catalogue": "now"}, "now", "shop", RUN)
    with pytest.raises(UserError, match="shop is not the one that runs/sft began with"):
        check_catalogue({"catalogue": "other"}, "now", "shop", RUN)
