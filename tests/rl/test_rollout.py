"""From answers to rewards, through the whole search path, worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from words import BY_ANSWER, CATALOG, ENCODER, gallery_in, plain

from afmrl_jax.attributes.text import Verdict
from afmrl_jax.catalog.groups import askers
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.queries import QueryBatches
from afmrl_jax.rl.environment import Environment, Laps
from afmrl_jax.rl.gallery import GallerySize, gallery_of_split, open_gallery
from afmrl_jax.rl.rewards import Reward

# The first says what the other listing of the mug shows, the second what another product's does.
ANSWERS = ["color: red", "color: green", "red", "type: lamp"]

RECALL = Reward(kind="recall", function="", k=1, gain=False, invalid=-0.1, length_cost=0.0)
MARGIN = replace(RECALL, kind="margin")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return gallery_in(tmp_path_factory.mktemp("gallery"))


def judged(gallery, **options):
    environment = Environment(
        CATALOG, ENCODER, gallery, replace(RECALL, **options), 4, False, BY_ANSWER
    )
    laps, closed = Laps(), [True] * 4
    found = environment.judge(np.array([0]), np.array([0]), ANSWERS, closed, np.arange(4), laps)
    assert list(laps.seconds) == ["seconds_parse", "seconds_embed", "seconds_search"]
    return found


def test_rewards_are_those_worked_by_hand(gallery):
    found = judged(gallery, kind="margin")
    # "mug color: red" has the vector of listing 1, 1/2 in common with 2 and 3: 1 - 1/2. With
    # "green" it is listing 2's: 1/2 - 1. The third is no pair: a tenth below the worst. "mug lamp":
    # 1/2 with 1, 2 and 3.
    np.testing.assert_allclose(found.rewards, [[0.5, -0.5, -0.6, 0]], atol=3e-3)
    np.testing.assert_allclose(found.advantages.values, [[0.65, -0.35, -0.45, 0.15]], atol=3e-3)
    # Plain it finds 1 and 2 equally near, so that the gain is the margin itself.
    np.testing.assert_allclose(found.parts["gain"], [0.5, -0.5, 0, 0], atol=3e-3)
    assert found.verdicts == [Verdict.VALID, Verdict.VALID, Verdict.MALFORMED, Verdict.VALID]
    metrics = found.metrics()
    assert metrics["reward"] == pytest.approx(-0.15, abs=3e-3)
    assert metrics["verdict_malformed"] == 0.25 and metrics["valid"] == 0.75
    [group] = found.groups()
    assert group["title"] == "mug" and [a["answer"] for a in group["answers"]] == ANSWERS


def test_groups_that_differ_in_their_format_alone_are_told(gallery):
    """Their rewards do differ, so that `zero_variance` says nothing of them."""
    environment = Environment(CATALOG, ENCODER, gallery, MARGIN, 2, False, BY_ANSWER)
    texts = ["color: red", "red", "color: red", "color: green"]
    found = environment.judge(
        np.array([0, 0]), np.zeros(2, int), texts, [True] * 4, np.arange(4), Laps()
    ).metrics()
    assert found["zero_variance"] == 0 and found["valid_zero_variance"] == 0.5


def test_the_query_listing_never_counts(gallery):
    found = gallery.find(plain(np.array([0])), np.array([0]), k=1)
    assert found.ids[0, 0] == 0 and found.self_ids[0] == 0  # it lies nearest to itself
    # What is left has listing 1 and 2 at one distance, so that the right one is never alone first.
    assert judged(gallery, kind="mrr").parts["mrr"].tolist()[:2] == [1, 0.5]
    # A listing whose product has no other one in the gallery does not ask.
    assert askers(CATALOG, "train", np.arange(5)).tolist() == [0, 1]
    assert askers(CATALOG, "train", np.arange(1, 5)).tolist() == [0]


def test_a_gallery_is_embedded_once_and_its_approximate_index_is_held_against_the_exact(tmp_path):
    exact = gallery_in(tmp_path / "1")
    again = gallery_in(tmp_path / "1", embed=None)
    assert len(again) == 5 and not exact.approximate
    scann = gallery_in(tmp_path / "2", exact_below=0)
    assert (tmp_path / "2" / "1.index").is_dir()
    scann = gallery_in(tmp_path / "2", exact_below=0, embed=None)
    assert scann.approximate
    parts = judged(scann, kind="margin").parts
    assert parts["index_agreement"] == 1
    np.testing.assert_allclose(parts["gain"], judged(exact, kind="margin").parts["gain"], atol=1e-5)


def test_a_gallery_of_one_product_is_none(tmp_path):
    with pytest.raises(UserError, match="all 2 listings of the gallery are one product"):
        vectors = np.eye(2, dtype=np.float32)
        open_gallery(tmp_path, "1", CATALOG, np.array([0, 1]), lambda _: vectors)


def test_a_split_for_judging_with_one_product_alone_is_left_out(tmp_path):
    """A small catalogue whose split is drawn has one now and then."""
    one = SimpleNamespace(
        products=np.array([0, 0, 1, 1]),
        identities=np.arange(4),
        indices=lambda split: np.array([0, 1]),
    )
    size = GallerySize(gallery=9, gallery_attributes=False, batch=1)
    assert gallery_of_split(size, tmp_path, one, None, "validation") is None


def test_queries_are_a_function_of_seed_and_step():
    def batches(seed):
        return QueryBatches(CATALOG, np.array([0, 1, 2, 4]), None, 2, 1, np.arange(2), seed, 9)

    one = batches(0)
    first = [one.draw(step) for step in range(2)]
    assert sorted(np.concatenate([listings for listings, _ in first])) == [0, 1, 2, 4]
    draws = np.concatenate([draws for _, draws in first])
    assert len(set(draws)) == 4 and (draws > 0).all()
    for step, (listings, drawn) in enumerate(first):
        again = batches(0).draw(step)
        assert (again[0] == listings).all() and (again[1] == drawn).all()
    assert (batches(1).draw(0)[1] != first[0][1]).all()
