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
