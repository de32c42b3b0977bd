"""BM25 on the device against BM25 by hand, by brute force, and after a round trip through JSON."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_jax.attributes.bm25 import CorpusStatistics, attribute_terms, bm25_matrix

JITTED = jax.jit(bm25_matrix)
SHOP = [
    {"color": "Navy Blue", "type": "Dress"},
    {"color": "Blue", "type": "Dress"},
    {"color": "Red", "type": "Mug", "trim": "blue"},
]
COLORS = st.sampled_from(["red", "navy blue", "blue", "sky blue", "green"])
LISTING = st.dictionaries(st.sampled_from(["color", "type", "trim", "sole"]), COLORS, max_size=4)


def matrix(statistics: CorpusStatistics, queries, documents, max_terms: int = 16) -> np.ndarray:
    query, document = (statistics.encode(side, max_terms) for side in (queries, documents))
    return np.asarray(
        JITTED(
            query["terms"], query["query_weights"], document["terms"], document["document_weights"]
        )
    )


def plain_bm25(corpus, query, document, k1=1.2, b=0.75) -> float:
    """The textbook's formula, term by term."""
    bags = [attribute_terms(listing) for listing in corpus]
    average = sum(map(len, bags)) / len(bags)
    score, held = 0.0, attribute_terms(document)
    for term in attribute_terms(query):
        n, tf = sum(term in bag for bag in bags), held.count(term)
        idf = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
        score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(held) / average))
    return score


def test_terms_are_whole_attributes_and_the_words_of_their_values():
    assert attribute_terms({"Color": " Navy  Blue ", "volume": "1.5 l", "brand": ""}) == [
        *("color=navy blue", "navy", "blue"),
        *("volume=1.5 l", "1.5", "l"),
    ]


def test_a_score_worked_by_hand():
    statistics = CorpusStatistics.from_documents(SHOP)
    # Lengths 5, 4, 6, average 5. Listing 0 shares "blue" (in 3 of 3: log(1 + .5/3.5)), "type=dress"
    # and "dress" (in 2 of 3: log(1 + 1.5/2.5)) with listing 1, each once, in a document of 4 terms:
    # 2.2 / (1 + 1.2 (.25 + .75 * 4/5)).
    weight = 2.2 / (1 + 1.2 * (0.25 + 0.75 * 0.8))
    expected = (math.log(1 + 0.5 / 3.5) + 2 * math.log(1 + 1.5 / 2.5)) * weight
    assert matrix(statistics, SHOP[:1], SHOP[1:2])[0, 0] == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(1.1692, abs=1e-4)


@settings(max_examples=30)
@given(st.lists(LISTING, min_size=5, max_size=5), st.lists(LISTING, min_size=4, max_size=4))
def test_the_matrix_is_the_textbooks_bm25_of_every_pair(corpus, queries):
    scores = matrix(CorpusStatistics.from_documents(corpus), queries, corpus)
    expected = [[plain_bm25(corpus, q, d) if any(corpus) else 0 for d in corpus] for q in queries]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_weights_survive_a_round_trip_through_json():
    statistics = CorpusStatistics.from_documents(SHOP, k1=0.9, b=0.4)
    restored = CorpusStatistics.from_json(statistics.to_json())
    assert restored == statistics
    for name, array in statistics.encode(SHOP, 8).items():
        np.testing.assert_array_equal(restored.encode(SHOP, 8)[name], array)


def test_a_document_with_too_many_terms_keeps_the_most_telling_ones():
    statistics = CorpusStatistics.from_documents(SHOP)
    whole, cut = (statistics.encode(SHOP[2:], size) for size in (8, 5))
    # "blue" is in all three documents, the least telling of listing 2's six terms.
    blue = list(statistics.document_frequencies).index("blue")
    assert set(whole["terms"][0]) - {-1} == set(cut["terms"][0]) | {blue}
    # What is kept weighs what it weighed: the length still counts the dropped term.
    assert set(cut["document_weights"][0]) <= set(whole["document_weights"][0])


def test_values_that_the_corpus_never_saw_match_each_other_and_nothing_else():
    statistics = CorpusStatistics.from_documents(SHOP)
    unseen = [{"fit": "oversized"}, {"fit": "oversized"}, {"fit": "slim"}]
    scores = matrix(statistics, unseen, unseen + SHOP)
    assert (scores[0, :2] > 0).all() and (scores[0, 2:] == 0).all()


def test_a_listing_without_attributes_scores_nothing():
    statistics = CorpusStatistics.from_documents(SHOP)
    assert (matrix(statistics, [{}], [*SHOP, {}]) == 0).all()
    assert (matrix(statistics, SHOP, [{}]) == 0).all()


ROW = ("color", "type", "brand", "size", "fit", "neck", "hem")
VARIED = [{name: f"{name}{i * (1 + k % 4) % 5}" for k, name in enumerate(ROW)} for i in range(40)]


def agreement(statistics: CorpusStatistics, left: dict, right: dict) -> float:
    """As the mask by attributes reckons it: the lesser share of either's score against itself."""
    encoded = statistics.encode([left, right], 16)
    scores = matrix(statistics, [left, right], [left, right])
    whole = np.sum(encoded["query_weights"] * encoded["document_weights"], axis=1)
    return min(scores[0, 1] / whole[0], scores[1, 0] / whole[1])


def test_values_that_say_nothing_never_agree():
    statistics = CorpusStatistics.from_documents(VARIED)
    unknown = dict.fromkeys(ROW[1:], "unknown")
    navy, red = {"color": "color0", **unknown}, {"color": "color1", **unknown}
    assert agreement(statistics, navy, dict(navy)) < 0.5
    assert agreement(statistics, navy, red) == 0
    # Nor does what is not said at all: one colour alone is not the same product.
    assert agreement(statistics, {"color": "color0"}, {"color": "color0"}) < 0.8
    assert agreement(statistics, VARIED[0], dict(VARIED[0])) == pytest.approx(1)
    # Also where all listings say little: the seven values weigh as pairs and words of mean idf.
    sparse = CorpusStatistics.from_documents([navy, navy, red])
    assert sparse.empty_values == {"unknown": 18}
    assert agreement(sparse, navy, dict(navy)) < 0.5


def test_what_is_left_unsaid_has_a_place_of_its_own_and_matches_nothing():
    statistics = CorpusStatistics.from_documents(VARIED)
    encoded = statistics.encode([{**VARIED[0], "hem": "n/a"}], 3)
    assert (encoded["terms"][0] == -1).sum() == 1  # even where the places are few
    unsaid = encoded["query_weights"][0][encoded["terms"][0] == -1]
    idf = math.log(1 + (40 - 8 + 0.5) / (8 + 0.5))  # every term is in 8 of 40 listings
    assert unsaid == pytest.approx(2 * idf)
    assert matrix(statistics, [{"a": "-"}], [{"a": "-"}])[0, 0] == 0


def test_identifiers_are_left_out_of_terms_here_and_of_listings_encoded_later():
    ids = [
        {
            **listing,
            "SKU": f"A-{i:05}",
            "made by": f"{4000000000000 + i * 7919}",
            "model": f"Duo {i}",
        }
        for i, listing in enumerate(VARIED * 3)
    ]
    statistics = CorpusStatistics.from_documents(ids)
    assert statistics.identifiers == {"made by": 120, "sku": 120}  # words make the model none
    assert not any("sku" in term or "400000" in term for term in statistics.document_frequencies)
    restored = CorpusStatistics.from_json(statistics.to_json())
    other = {**ids[0], "sku": "B-77777", "made by": "5000000000003"}
    assert agreement(restored, ids[0], other) == pytest.approx(1)
    few = CorpusStatistics.from_documents(
        [listing | {"sku": str(i)} for i, listing in enumerate(SHOP)]
    )
    assert not few.identifiers  # three products can't tell
