"""Held-out queries with different attributes in their texts. Listing 0, "mug", seeks 1, "red mug",
and 1 seeks 0; others are "green mug", "red lamp" and "hat"."""

import dataclasses
import json

import pytest
from words import CATALOG, ENCODER, gallery_in

from afmrl_jax.core.errors import UserError
from afmrl_jax.rl.held_out import Arms, HeldOut, QueryAnswer, choose_confidence, comparison_table
from afmrl_jax.rl.rewards import Reward
from afmrl_jax.rl.watch import WatchLimits

LIMITS = WatchLimits(
    copied=1.0, leaked=0.02, answer_diversity=0.0, pair_diversity=0.0, held_out_gain=-2.0
)


def said(**pairs):
    """An answer; pairs: name = (value, confidence)."""
    return QueryAnswer(
        str(pairs), lambda least: {name: v for name, (v, sure) in pairs.items() if sure >= least}
    )


# What is wrong weighs more than what is right: "mug red green green" is next to "green mug".
SURE_OF_THE_RIGHT = [said(color=("red", 0.9), type=("green green", 0.2)), said()]
INVALID = [QueryAnswer("red", lambda least: {}), QueryAnswer("red", lambda least: {})]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    gallery = gallery_in(tmp_path_factory.mktemp("gallery"))
    options = Reward(kind="margin", function="", k=50, gain=False, invalid=-0.1, length_cost=0.0)
    return {
        split: HeldOut(CATALOG, split, gallery, ENCODER, options, limit=9)
        for split in ("validation", "test")
    }


def test_arms_are_found_as_by_hand_and_what_they_ask_alike_once(held_out, monkeypatch):
    where = held_out["test"]
    assert where.queries.tolist() == [0, 1] and where.k == 1
    asked, embed_listings = [], ENCODER.embed_listings

    def noting(catalog, listings, **options):
        asked.append(len(listings))
        return embed_listings(catalog, listings, **options)

    monkeypatch.setattr(ENCODER, "embed_listings", noting)
    (plain, oracle, again), _ = where.find([[{}] * 2, where.true, [{}, where.true[1]]])
    assert asked == [4]
    # "mug" finds "red mug" and "green mug" by .71; "mug red" its own by 1, "green mug" by .5.
    assert plain["margin"][0] == pytest.approx(0, abs=5e-3)
    assert oracle["margin"][0] == pytest.approx(0.5, abs=5e-3)
    assert again["margin"].tolist() == [plain["margin"][0], oracle["margin"][1]]


def test_a_pair_must_be_as_sure_as_lets_validation_queries_find_most(held_out):
    where = held_out["validation"]
    assert choose_confidence(where, SURE_OF_THE_RIGHT) == 0.3  # the lowest that leaves out .2
    # Both are wrong, so that R@1 is the same: without the second the right one moves up to rank 2.
    wrong = [said(color=("green green", 1.0), type=("hat hat hat", 0.6)), said()]
    assert choose_confidence(where, wrong) == 0.7
    assert choose_confidence(where, INVALID) == 0


def arms_of(folder, held_out):
    """The arms of a generator that as it begins doubts the wrong, and as it ends knows no format;
    and what was asked of it."""
    asked = []

    def say(trained, listings):
        asked.append(trained)
        return SURE_OF_THE_RIGHT if trained == "begun" else INVALID

    return Arms(folder, held_out, say, LIMITS), asked


def test_answers_that_lost_before_training_are_no_cheating_until_they_lose_more(held_out, tmp_path):
    limits = dataclasses.replace(LIMITS, held_out_gain=-0.01)
    loses = Arms(tmp_path, held_out, lambda trained, listings: SURE_OF_THE_RIGHT, limits)
    loses.begin("begun")
    assert loses.validate("trained", 1)["gain"] < -0.01
    says = {"begun": INVALID, "trained": SURE_OF_THE_RIGHT}
    learns_it = Arms(tmp_path, held_out, lambda trained, listings: says[trained], limits)
    learns_it.begin("begun")
    with pytest.raises(UserError, match="is what such answers gain on held-out queries over none"):
        learns_it.validate("trained", 1)


def test_the_baseline_is_chosen_on_validation_and_judged_on_test_queries(held_out, tmp_path):
    arms, asked = arms_of(tmp_path, held_out)
    arms.begin("begun")
    found = arms.validate("ended", 1)
    assert found["over_sft"] == found["recall@1"] - 0.5
    assert found["over_sft_sure"] == found["recall@1"] - 1
    arms.end("ended", 7)
    assert asked == ["begun"] * 2 + ["ended"] * 3  # answers are given once a split and moment
    results = json.loads(arms.path.read_text())
    assert list(results["arms"]) == ["plain", "sft", "sft_sure", "rar", "rar_sure", "oracle"]
    assert results["least_confidence"] == {"sft_sure": 0.3, "rar_sure": 0.0}
    recall = {arm: means["recall@1"] for arm, means in results["arms"].items()}
    assert recall["sft"] == 0.5 and recall["sft_sure"] == 1
    assert recall["rar"] == recall["rar_sure"] == recall["plain"]
    differences = results["differences"]
    assert {"sft - plain", "rar - sft", "rar - sft_sure", "oracle - sft"} <= set(differences)
    assert differences["sft_sure - sft"]["recall@1"] == 0.5
    assert differences["sft_sure - sft"]["recall@1_ci95"] > 0
    # The one answer of two pairs became invalid, with the right colour and a wrong type.
    lost = {name: count for name, count in results["changes"]["pairs"].items() if count}
    assert lost == {"left_out_right": 1, "left_out_wrong": 1}
    assert results["split"] == "test" and "| rar - sft_sure " in comparison_table(results)


def test_without_validation_queries_there_is_no_such_baseline(held_out, tmp_path):
    arms, asked = arms_of(tmp_path, {"test": held_out["test"]})
    arms.begin("begun")
    arms.end("ended", 7)
    results = json.loads(arms.path.read_text())
    assert list(results["arms"]) == ["plain", "sft", "rar", "oracle"] and len(asked) == 2
    assert results["least_confidence"] == {} and "rar - sft_sure" not in results["differences"]


def test_without_test_queries_validation_answers_serve_for_both(held_out, tmp_path):
    arms, asked = arms_of(tmp_path, {"validation": held_out["validation"]})
    arms.begin("begun")
    arms.end("ended", 7)
    assert json.loads(arms.path.read_text())["split"] == "validation" and len(asked) == 2
