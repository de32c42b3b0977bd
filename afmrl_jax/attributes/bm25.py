"""How far two listings' attributes agree: BM25, prepared on the host, scored on the device.

Axes: N listings · T term slots a listing, padded with -1 · B queries · M documents.
"""

import functools
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from afmrl_jax.attributes.comparison import fold, says_nothing, words
from afmrl_jax.attributes.identifiers import find_identifiers

REMEMBERED = 1 << 15  # pairs whose terms are cached: a catalogue repeats the same few pairs
LONGEST_REMEMBERED = 100  # characters of a value
# A document must hold this share of an average document's attributes to fully agree with another.
FULL_AGREEMENT_SHARE = 0.5


def attribute_terms(
    attributes: Mapping[str, str], left_out: Container[str] = frozenset()
) -> list[str]:
    """The terms of a listing: "name=value" and the value's words, folded, repeats kept.

    {"color": "Navy Blue"} gives ["color=navy blue", "navy", "blue"]: two blues agree in part, two
    navy blues fully. A value that says nothing (`is_empty`) gives no term. Of names that are equal
    when folded the first counts. left_out: folded names whose pairs give no terms.
    """
    pairs = _terms_by_name(attributes).items()
    return [term for name, terms in pairs if name not in left_out for term in terms]


def _terms_by_name(attributes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Folded name -> the terms of its value; no terms where the value says nothing."""
    terms_by_name: dict[str, tuple[str, ...]] = {}
    for name, value in attributes.items():
        short = len(value) <= LONGEST_REMEMBERED
        name, terms = (_remembered if short else _pair_terms)(name, value)
        if not terms_by_name.get(name):
            terms_by_name[name] = terms
    return terms_by_name


def _pair_terms(name: str, value: str) -> tuple[str, tuple[str, ...]]:
    """The folded name and the terms of one pair."""
    name, value = _name(name), fold(value)
    return name, () if says_nothing(value) else (f"{name}={value}", *words(value))


@functools.lru_cache(1024)
def _name(text: str) -> str:
    return fold(text).replace("=", " ")  # "=" ends the name in a term


_remembered = functools.lru_cache(REMEMBERED)(_pair_terms)


def _count(
    documents: Sequence[Mapping[str, str]], left_out: Container[str] = frozenset()
) -> tuple[int, Counter[str]]:
    """The number of terms in all documents, and for each term the number of documents with it."""
    n_terms, frequencies = 0, Counter()
    for attributes in documents:
        terms = attribute_terms(attributes, left_out)
        n_terms += len(terms)
        frequencies.update(set(terms))
    return n_terms, frequencies


def _empty_values(documents: Sequence[Mapping[str, str]]) -> Counter[str]:
    """How often each value that says nothing (folded) occurs in the documents."""
    values = (fold(value) for attributes in documents for value in attributes.values())
    return Counter(value for value in values if says_nothing(value))


@dataclass(frozen=True)
class CorpusStatistics:
    """BM25's statistics of the training catalogue; kept in checkpoints so that scores stay put.

    idf = log(1 + (N - n + .5) / (n + .5)), which is never negative.
    """

    n_documents: int
    average_length: float  # terms a document, repeats counted
    # Term -> number of documents that hold it. A term's position in the dict is its id.
    document_frequencies: dict[str, int]
    k1: float = 1.2  # how slowly repeats of a term saturate
    b: float = 0.75  # how much a long document's weights are lowered
    identifiers: dict[str, int] = field(default_factory=dict)  # names left out -> documents
    empty_values: dict[str, int] = field(default_factory=dict)  # folded value -> occurrences

    @classmethod
    def from_documents(
        cls, documents: Sequence[Mapping[str, str]], k1: float = 1.2, b: float = 0.75
    ) -> "CorpusStatistics":
        """Counts the terms of a catalogue's attributes, one mapping per document. Identifiers
        (`find_identifiers`) are left out here and in everything that is encoded later."""
        n_terms, frequencies = _count(documents)
        if left_out := find_identifiers(frequencies):
            n_terms, frequencies = _count(documents, left_out)
        # Sorted, because the ids must not depend on the hash seed of the process that counted.
        ordered = dict(sorted(frequencies.items()))
        average = n_terms / max(len(documents), 1)
        return cls(
            *(len(documents), average, ordered, k1, b),
            identifiers=left_out,
            empty_values=dict(_empty_values(documents).most_common()),
        )

    def terms(self, attributes: Mapping[str, str]) -> list[str]:
        """`attribute_terms`, without the identifiers."""
        return attribute_terms(attributes, self.identifiers)

    def to_json(self) -> str:
        """All fields as one JSON object, read back by `from_json`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CorpusStatistics":
        """The statistics that `to_json` wrote. Raises ValueError where the fields are others, as
        those of another version."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != cls.__dataclass_fields__.keys():
            raise ValueError("these are not the fields of BM25's statistics")
        return cls(**values)

    def encode(
        self, documents: Sequence[Mapping[str, str]], max_terms: int
    ) -> dict[str, np.ndarray]:
        """Arrays of a fixed shape that hold N documents' attributes, for `bm25_matrix`.

        Returns terms int32[N, T] (-1 pads), query_weights float32[N, T] = idf x count, and
        document_weights float32[N, T] = count (k1 + 1) / (count + k1 (1 - b + b length / average)),
        T = max_terms. A document with more distinct terms keeps those of the highest idf; its
        length still counts them all. A term that the corpus lacks gets the idf of a term in no
        document and an id hashed from its text, which is equal in every process: two listings that
        share a value coined after training still match.

        One slot with id -1 may have weights. They hold the document's missing score
        (`_missing_score`): a part of its score against itself that no other document reaches.
        """
        shape = (len(documents), max_terms)
        terms = np.full(shape, -1, np.int32)
        query_weights = np.zeros(shape, np.float32)
        document_weights = np.zeros(shape, np.float32)
        for row, attributes in enumerate(documents):
            pairs = _terms_by_name(attributes)
            pair_terms = [terms for name, terms in pairs.items() if name not in self.identifiers]
            listed = list(itertools.chain(*pair_terms))
            length = len(listed) / (self.average_length or 1.0)
            saturation = self.k1 * (1 - self.b + self.b * length)
            kept = []
            for term, count in Counter(listed).items():
                term_id, idf = self._id_and_idf(term)
                weight = count * (self.k1 + 1) / (count + saturation)
                kept.append((term_id, idf * count, weight, idf))
            missing_score = self._missing_score(
                pair_terms.count(()), sum(query * weight for _, query, weight, _ in kept)
            )
            if missing_score:
                kept.append((-1, missing_score, 1.0, math.inf))
            if len(kept) > max_terms:
                kept = sorted(kept, key=lambda term: (-term[3], term[0]))[:max_terms]
            for slot, (term_id, query_weight, document_weight, _) in enumerate(kept):
                terms[row, slot] = term_id
                query_weights[row, slot] = query_weight
                document_weights[row, slot] = document_weight
        return {
            "terms": terms,
            "query_weights": query_weights,
            "document_weights": document_weights,
        }

    def _missing_score(self, n_empty: int, self_score: float) -> float:
        """The score that is added to a document's score against itself for attributes it lacks.

        Two listings that both say "navy", and leave everything else out or unknown, agree in
        "navy" alone: they must not count as fully equal.

        n_empty: number of values that say nothing; each counts as a pair and a word of mean idf.
        self_score: score of the document's terms against itself. Its sum with the returned score
        is at least FULL_AGREEMENT_SHARE of what an average document scores against itself.
        """
        empty_score = 2 * n_empty * self._mean_idf
        least = FULL_AGREEMENT_SHARE * self.average_length * self._mean_idf
        return max(empty_score, least - self_score)

    @cached_property
    def _mean_idf(self) -> float:
        """The mean idf of all terms in all documents; a document's repeats of a term count once."""
        counts = self.document_frequencies.values()
        return sum(n * self._idf(n) for n in counts) / max(sum(counts), 1)

    def _id_and_idf(self, term: str) -> tuple[int, float]:
        known = self._vocabulary.get(term)
        if known is not None:
            return known
        size = len(self._vocabulary)
        return size + zlib.crc32(term.encode()) % (2**31 - 1 - size), self._idf(0)

    def _idf(self, frequency: int) -> float:
        return math.log(1 + (self.n_documents - frequency + 0.5) / (frequency + 0.5))

    @cached_property
    def _vocabulary(self) -> dict[str, tuple[int, float]]:
        """term -> (id, idf)."""
        frequencies = self.document_frequencies.items()
        return {term: (i, self._idf(n)) for i, (term, n) in enumerate(frequencies)}


def bm25_matrix(
    query_terms: jax.Array,
    query_weights: jax.Array,
    document_terms: jax.Array,
    document_weights: jax.Array,
) -> jax.Array:
    """BM25 of every document for every query: the sum of query weight x document weight over the
    terms that both hold (Robertson's BM25, split into two factors by `CorpusStatistics.encode`).

    query_terms int32[B, T], query_weights float32[B, T], document_terms int32[M, U],
    document_weights float32[M, U]; terms below 0 match nothing. Returns float32[B, M].
    Queries may be sharded by rows with the documents replicated: nothing is communicated.
    """
    query_weights = jnp.where(query_terms >= 0, query_weights, 0)
    slots = list(zip(document_terms.T, document_weights.T))

    def add_term(scores: jax.Array, term: tuple[jax.Array, jax.Array]):
        ids, weights = term
        # Unrolled: XLA fuses these compares into one pass over [B, M]. Written as a reduction over
        # an axis of slots, [B, M, T] would be materialised, and it runs 2 to 5 times slower.
        held = sum(jnp.where(ids[:, None] == slot, weight, 0.0) for slot, weight in slots)
        return scores + weights[:, None] * held, None

    zeros = jnp.zeros((query_terms.shape[0], document_terms.shape[0]), query_weights.dtype)
    return lax.scan(add_term, zeros, (query_terms.T, query_weights.T))[0]
