"""Ranking: own listings, ties, dropped queries, exact against ScaNN."""

import numpy as np
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval import metrics, ranking
from afmrl_jax.retrieval.ranking import Side, rank_and_score


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def angles(*degrees):
    """Unit vectors in the plane: the cosine of two falls with the angle between them."""
    radians = np.deg2rad(np.array(degrees, float))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def judge(vectors, keys, products, **options):
    side = Side(vectors, np.array(keys), np.array(products))
    return rank_and_score(side, side, **{"exclude_self": True, **options}).means()


def test_a_gallery_of_four_scores_as_worked_by_hand():
    # Listings stand at 0, 10, 30 and 90 degrees; the nearer, the better the rank.
    scores = judge(angles(0, 10, 30, 90), ["a1", "b1", "a2", "b2"], ["a", "b", "a", "b"])
    # The one right listing's ranks: a1 -> 2, b1 -> 3 (after a1, a2), a2 -> 2 (b1), b2 -> 2 (a2).
    assert scores["recall@1"] == 0 and scores["recall@5"] == 1
    assert scores["mrr"] == scores["map"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert scores["ndcg@10"] == pytest.approx((3 / np.log2(3) + 1 / 2) / 4)
    assert (scores["n_queries"], scores["n_gallery"]) == (4, 4)
    assert scores["recall@1_ci95"] == metrics.interval95(np.zeros(4))


def test_several_right_listings_count_by_their_precisions():
    vectors, products = angles(0, 1, 2, 3), ["a", "a", "b", "a"]
    query = (vectors[:1], np.array(["q"]), np.array(["a"]))
    gallery = (vectors, np.array(["q", "w", "x", "y"]), np.array(products))
    scores = rank_and_score(Side(*query), Side(*gallery), exclude_self=True).means()
    assert scores["map"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert scores["recall@1_ci95"] == pytest.approx((1 - 1 / (1 + 1.96**2)) / 2)  # of one hit


def test_the_query_itself_is_neither_found_nor_in_the_way():
    alone = judge(angles(0, 5, 90), ["a1", "a2", "b1"], ["a", "a", "b"])
    assert alone["recall@1"] == 1 and alone["n_queries"] == 2
    seen = judge(angles(0, 5, 90), ["a1", "a2", "b1"], ["a", "a", "b"], exclude_self=False)
    assert seen["n_queries"] == 3  # b1 now finds itself


def test_every_copy_of_the_query_listing_in_the_gallery_is_taken_out():
    # The gallery is two catalogues that share listing a1: its copy must not count as a find.
    query = (angles(0), np.array(["a1"]), np.array(["a"]))
    gallery = (angles(0, 0, 20, 40), np.array(["a1", "a1", "b1", "a2"]), np.array([*"aaba"]))
    scores = rank_and_score(Side(*query), Side(*gallery), exclude_self=True).means()
    assert scores["mrr"] == 1 / 2 and scores["n_gallery"] == 4
    scores = rank_and_score(Side(*query), Side(*gallery), exclude_self=True, exact_below=0).means()
    assert scores["mrr"] == 1 / 2 and scores["index_recall"] == 1


def test_listings_under_one_key_are_told_apart_by_nothing_so_two_products_there_are_refused():
    with pytest.raises(ValueError, match="two products"):
        judge(angles(0, 5), ["a1", "a1"], ["a", "b"])


def test_ties_count_against_us():
    # The right listing scores exactly what a wrong one does, wherever it stands in the gallery.
    for order in ([0, 1, 2], [0, 2, 1]):
        keys, products = np.array(["a1", "a2", "b1"])[order], np.array(["a", "a", "b"])[order]
        scores = judge(angles(0, 30, 30)[order], keys, products)
        assert scores["mrr"] == 1 / 2  # a1 -> 2; a2 sees b1 (at 0 degrees) first -> 2


def test_right_listings_that_tie_with_each_other_lose_nothing():
    scores = judge(angles(0, 30, 30, 90), [1, 2, 3, 4], [7, 7, 7, 8])
    assert scores["map"] == 1


def test_a_collapsed_model_finds_nothing_by_luck():
    vectors = np.tile(unit(np.random.default_rng(0).normal(size=(1, 64))), (1100, 1))
    scores = judge(vectors, np.arange(1100), np.arange(1100) // 4)
    assert scores["recall@10"] == 0 and scores["mrr"] < 1 / 1000


@pytest.mark.parametrize("below", [0, 1201])
def test_products_with_one_photo_are_not_told_apart_at_any_size_of_the_gallery(below):
    # 120 photos, each of five products with two listings.
    photos = unit(np.random.default_rng(0).normal(size=(120, 16)))
    listings, products = np.arange(1200), np.arange(1200) // 2
    scores = judge(photos[listings // 10], listings, products, exact_below=below)
    assert scores["recall@5"] == 0 and scores["recall@10"] == 1  # behind the 8 that look the same
    assert scores["mrr"] == pytest.approx(1 / 9)


def test_a_tie_that_goes_on_behind_scanns_last_rank_finds_nothing():
    vectors = np.tile(angles(20), (1100, 1))
    scores = judge(vectors, np.arange(1100), np.arange(1100) // 4, exact_below=0)
    assert scores["mrr"] == scores["map"] == 0


def test_equal_vectors_tie_however_a_block_of_the_product_rounds_them(monkeypatch):
    monkeypatch.setattr(ranking, "query_block", lambda n: 8)
    photos = unit(np.random.default_rng(0).normal(size=(5, 256)))
    rows = np.arange(1001)
    queries = (photos[1:4], -rows[1:4], rows[1:4])
    gallery = (photos[rows % 5], rows, rows)
    scores = rank_and_score(Side(*queries), Side(*gallery), exclude_self=True).means()
    assert scores["mrr"] == 1 / 200  # of 200 with its photo one is its product's


def test_queries_with_nothing_to_find_are_dropped_and_none_left_is_an_error():
    scores = judge(angles(0, 5, 90), [1, 2, 3], [1, 1, 2])
    assert scores["n_queries"] == 2
    with pytest.raises(UserError, match="none of 3 queries"):
        judge(angles(0, 5, 90), [1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize("side", [0, 3])
def test_embeddings_that_are_not_finite_are_refused(side):
    arguments = [angles(0, 5), np.arange(2), np.zeros(2), angles(0, 5), np.arange(2), np.zeros(2)]
    arguments[side] = arguments[side] * np.array([[1], [np.nan]])
    with pytest.raises(UserError, match=r"1 of 2 (query|gallery) embeddings are not finite"):
        rank_and_score(Side(*arguments[:3]), Side(*arguments[3:]), exclude_self=True)


def clustered(rng, products, dimension=32, noise=0.25):
    centers = unit(rng.normal(size=(products.max() + 1, dimension)))
    return unit(centers[products] + noise * rng.normal(size=(len(products), dimension)))


@pytest.mark.parametrize("path", ["a pass a column", "bins", "scann"])
def test_every_way_of_ranking_equals_the_slow_definition_also_among_ties(path, monkeypatch):
    products = np.repeat(np.arange(60), [8] * 10 + [5] * 12 + [1] * 38)
    # Steps of 1/4: cosines are exact in float32, and many of them equal.
    vectors = np.round(4 * clustered(np.random.default_rng(1), products, 8)) / 4
    monkeypatch.setattr(ranking, "query_block", lambda n: 64)
    monkeypatch.setattr(ranking, "WIDE", 1 if path == "bins" else 1000)
    ranking._exact_ranks.clear_cache()
    below = 0 if path == "scann" else 179
    ours = judge(vectors.astype(np.float32), np.arange(178), products, exact_below=below)
    ranks, n_relevant = np.zeros((140, 7), int), np.array([7] * 80 + [4] * 60)
    for query, cosines in enumerate((vectors @ vectors.T)[:140]):
        same = products == products[query]
        wrong, right = cosines[~same], cosines[same & (np.arange(178) != query)]
        for place, score in enumerate(-np.sort(-right)):
            ranks[query, place] = (wrong >= score).sum() + place + 1
    theirs = metrics.score_ranks(ranks, n_relevant)
    assert (ours["n_queries"], ours["n_gallery"]) == (140, 178)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values.mean(), abs=1e-9), name


def test_a_large_gallery_is_scored_by_scann_and_says_how_far_to_trust_it():
    rng = np.random.default_rng(2)
    products = np.repeat(np.arange(500), 10)
    vectors = clustered(rng, products, 64, noise=0.12)
    queries = (vectors[:400], np.arange(400), products[:400])
    gallery = (vectors, np.arange(5000), products)
    exact = rank_and_score(Side(*queries), Side(*gallery), exclude_self=True).means()
    scann = rank_and_score(
        Side(*queries), Side(*gallery), exclude_self=True, exact_below=5000
    ).means()
    assert 0.8 < scann["index_recall"] <= 1 and "index_recall" not in exact
    for name in ("recall@1", "recall@10", "mrr", "map", "ndcg@10"):
        assert scann[name] == pytest.approx(exact[name], abs=0.03), name
