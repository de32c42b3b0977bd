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

REMEMBERED = 1 << 15  # pairs whose terms are kept: a catalogue says the same few again and again
LONGEST_REMEMBERED = 100  # characters of a value
TOLD = 0.5  # of what documents say on average: one that says less can't fully agree with another


def attribute_terms(
    attributes: Mapping[str, str], left_out: Container[str] = frozenset()
) -> list[str]:
    """The terms of a listing: "name=value" and the value's words, folded, repeats kept.

    {"color": "Navy Blue"} gives ["color=navy blue", "navy", "blue"]: two blues agree in part, two
    navy blues fully. A value that says nothing (`is_empty`) gives nothing; of names that are equal
    when folded the first counts, and those in `left_out`, folded, do not.
    """
    pairs = _terms_by_name(attributes).items()
    return [term for name, terms in pairs if name not in left_out for term in terms]


def _terms_by_name(attributes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Folded name -> the terms of its value; none where the value says nothing."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in attributes.items():
        short = len(value) <= LONGEST_REMEMBERED
        name, terms = (_remembered if short else _pair_terms)(name, value)
        if not found.get(name):
            found[name] = terms
    return found


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
    """All terms of the documents, and in how many documents each is."""
    n_terms, frequencies = 0, Counter()
    for attributes in documents:
        terms = attribute_terms(attributes, left_out)
        n_terms += len(terms)
        frequencies.update(set(terms))
    return n_terms, frequencies


def _empty_values(documents: Sequence[Mapping[str, str]]) -> Counter[str]:
    """How often each value that says nothing stands in the documents, folded."""
    values = (fold(value) for attributes in documents for value in attributes.values())
    return Counter(value for value in values if says_nothing(value))


@dataclass(frozen=True)
class CorpusStatistics:
    """What BM25 must know of the training catalogue; kept in checkpoints so that scores stay put.

    idf = log(1 + (N - n + .5) / (n + .5)), which is never negative.
    """

    n_documents: int
    average_length: float  # terms a document, repeats counted
    document_frequencies: dict[str, int]  # term -> documents that hold it; its place is its id
    k1: float = 1.2  # how slowly repeats of a term saturate
    b: float = 0.75  # how much a long document is held back
    identifiers: dict[str, int] = field(default_factory=dict)  # left out: name -> documents
    empty_values: dict[str, int] = field(default_factory=dict)  # what says nothing -> how often

    @classmethod
    def from_documents(
        cls, documents: Sequence[Mapping[str, str]], k1: float = 1.2, b: float = 0.75
    ) -> "CorpusStatistics":
        """Counts the terms of a catalogue's attributes, one mapping a document. Identifiers are
        left out (`find_identifiers`), here and of what is encoded later."""
        n_terms, frequencies = _count(documents)
        if left_out := find_identifiers(frequencies):
            n_terms, frequencies = _count(documents, left_out)
        # Sorted, as the ids must not hang on the hash seed of the process that counted.
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
        """All of it as one JSON object, read back by `from_json`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CorpusStatistics":
        """The statistics that `to_json` wrote."""
        return cls(**json.loads(text))

    def encode(
        self, documents: Sequence[Mapping[str, str]], max_terms: int
    ) -> dict[str, np.ndarray]:
        """Static arrays of N documents' attributes, for `bm25_matrix`.

        Returns terms int32[N, T] (-1 pads), query_weights float32[N, T] = idf x count, and
        document_weights float32[N, T] = count (k1 + 1) / (count + k1 (1 - b + b length / average)),
        T = max_terms. A document with more distinct terms keeps those of the highest idf; its
        length still counts them all. A term that the corpus lacks keeps the idf of an unseen one
        and an id hashed from its text, equal in every process: two listings that share a value
        coined after training still match.

        Weights beside a -1 are what a document leaves unsaid (`_unsaid`): a part of its score
        against itself that no other document reaches.
        """
        shape = (len(documents), max_terms)
        terms = np.full(shape, -1, np.int32)
        query_weights = np.zeros(shape, np.float32)
        document_weights = np.zeros(shape, np.float32)
        for row, attributes in enumerate(documents):
            pairs = _terms_by_name(attributes)
            told = [terms for name, terms in pairs.items() if name not in self.identifiers]
            listed = list(itertools.chain(*told))
            length = len(listed) / (self.average_length or 1.0)
            saturation = self.k1 * (1 - self.b + self.b * length)
            kept = []
            for term, count in Counter(listed).items():
                term_id, idf = self._id_and_idf(term)
                weight = count * (self.k1 + 1) / (count + saturation)
                kept.append((term_id, idf * count, weight, idf))
            unsaid = self._unsaid(
                told.count(()), sum(query * weight for _, query, weight, _ in kept)
            )
            if unsaid:
                kept.append((-1, unsaid, 1.0, math.inf))
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

    def _unsaid(self, n_empty: int, own_score: float) -> float:
        """What a document's score against itself would be higher by, had it said more.

        Two listings that say "navy" and of all else that it is unknown, or nothing at all, do not
        agree fully. n_empty: its values that say nothing; each counts as a pair and a word of the
        mean idf. own_score: of what it says. Together they are at least TOLD of what a document of
        the corpus scores against itself.
        """
        empty = 2 * n_empty * self._mean_idf
        return max(empty, TOLD * self.average_length * self._mean_idf - own_score)

    @cached_property
    def _mean_idf(self) -> float:
        """Of the terms as they stand in documents, repeats within one not counted."""
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
    """BM25 of every document for every query: the sum of query weight x document weight over terms
    that both hold (Robertson's BM25, split in two factors by `CorpusStatistics.encode`).

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
