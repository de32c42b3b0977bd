"""How far two listings' attributes agree: BM25, prepared on the host, scored on the device.

Axes: N listings · T term slots a listing, padded with -1 · B queries · M documents.
"""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")  # "1.5" stays one word


def attribute_terms(attributes: Mapping[str, str]) -> list[str]:
    """The terms of a listing: "name=value" and the value's words, lower-cased, repeats kept.

    {"color": "Navy Blue"} gives ["color=navy blue", "navy", "blue"]: two blues agree in part, two
    navy blues fully. An empty value gives nothing.
    """
    terms = []
    for name, value in attributes.items():
        value = " ".join(value.lower().split())
        if value:
            terms.append(f"{name.strip().lower()}={value}")
            terms.extend(WORD.findall(value))
    return terms


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

    @classmethod
    def from_documents(
        cls, documents: Iterable[Mapping[str, str]], k1: float = 1.2, b: float = 0.75
    ) -> "CorpusStatistics":
        """Counts the terms of a catalogue's attributes, one mapping a document."""
        n_documents = n_terms = 0
        frequencies: Counter[str] = Counter()
        for attributes in documents:
            terms = attribute_terms(attributes)
            n_documents += 1
            n_terms += len(terms)
            frequencies.update(set(terms))
        # Sorted, as the ids must not hang on the hash seed of the process that counted.
        ordered = dict(sorted(frequencies.items()))
        return cls(n_documents, n_terms / max(n_documents, 1), ordered, k1, b)

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
        """
        shape = (len(documents), max_terms)
        terms = np.full(shape, -1, np.int32)
        query_weights = np.zeros(shape, np.float32)
        document_weights = np.zeros(shape, np.float32)
        for row, attributes in enumerate(documents):
            listed = attribute_terms(attributes)
            length = len(listed) / (self.average_length or 1.0)
            saturation = self.k1 * (1 - self.b + self.b * length)
            kept = [(*self._id_and_idf(term), count) for term, count in Counter(listed).items()]
            if len(kept) > max_terms:
                kept = sorted(kept, key=lambda term: (-term[1], term[0]))[:max_terms]
            for slot, (term_id, idf, count) in enumerate(kept):
                terms[row, slot] = term_id
                query_weights[row, slot] = idf * count
                document_weights[row, slot] = count * (self.k1 + 1) / (count + saturation)
        return {
            "terms": terms,
            "query_weights": query_weights,
            "document_weights": document_weights,
        }

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
    document_weights float32[M, U]; padding weighs 0. Returns float32[B, M].
    Queries may be sharded by rows with the documents replicated: nothing is communicated.
    """
    slots = list(zip(document_terms.T, document_weights.T))

    def add_term(scores: jax.Array, term: tuple[jax.Array, jax.Array]):
        ids, weights = term
        # Unrolled: XLA fuses these compares into one pass over [B, M]. Written as a reduction over
        # an axis of slots, [B, M, T] would be materialised, and it runs 2 to 5 times slower.
        held = sum(jnp.where(ids[:, None] == slot, weight, 0.0) for slot, weight in slots)
        return scores + weights[:, None] * held, None

    zeros = jnp.zeros((query_terms.shape[0], document_terms.shape[0]), query_weights.dtype)
    return lax.scan(add_term, zeros, (query_terms.T, query_weights.T))[0]
