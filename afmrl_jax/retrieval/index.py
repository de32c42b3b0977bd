"""Nearest neighbours of queries among a gallery's vectors: exact on the device, or ScaNN.

Axes: N gallery vectors · Q queries · D dimensions · k neighbours.

Scores are dot products: cosines, since embeddings are L2-normalised. An index records the version
of the model that made its vectors, returns it with every result, and refuses vectors of another.
"""

import abc
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import whole_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """Neighbours, best first; unpacks into `ids, scores`.

    ids: int64[Q, k], -1 where the index holds fewer. scores: float32[Q, k], -inf there.
    """

    ids: np.ndarray
    scores: np.ndarray
    model_version: str

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.ids, self.scores))


class Index(abc.ABC):
    """An index of vectors under ids; subclasses search and update rows 0..N-1 instead of ids.

    Threads may share an index: each call waits for the call before it.
    """

    kind: ClassVar[str]

    def __init__(self, model_version: str):
        self.model_version = model_version
        self._lock = threading.RLock()  # a search during an update would return wrong ids
        self._ids = np.empty(0, np.int64)
        self._rows: dict[int, int] | None = None  # id -> row; made when first updated

    def __len__(self) -> int:
        return len(self._ids)

    def build(self, vectors: np.ndarray, ids: np.ndarray) -> Self:
        """Fills the index, replacing its content; returns the index.

        vectors: float32[N, D], finite. ids: int64[N], unique and >= 0. Raises UserError for vectors
        or ids that break these rules.
        """
        if len(vectors) == 0:
            raise UserError("an index of no vectors was asked for: give it at least one listing")
        vectors, ids = _checked(vectors, ids)
        with self._lock:
            self._build(vectors)
            self._dimension, self._ids, self._rows = vectors.shape[1], ids, None
        return self

    def search(self, queries: np.ndarray, k: int = 5, model_version: str | None = None) -> Results:
        """The k nearest of each query, best first.

        queries: float32[Q, D]. model_version: of the model that made the queries; None skips the
        check. Raises UserError on another version, another D, or queries that are not finite.
        """
        queries = self._comparable(queries, model_version, "queries")
        with self._lock:
            rows, scores = self._search(queries, min(k, len(self)))
            filled = rows >= 0
            ids = np.where(filled, self._ids[np.where(filled, rows, 0)], -1)
        results = Results(
            np.full((len(queries), k), -1, np.int64),
            np.full((len(queries), k), -np.inf, np.float32),
            self.model_version,
        )
        results.ids[:, : ids.shape[1]] = ids
        results.scores[:, : ids.shape[1]] = np.where(filled, scores, -np.inf)
        return results

    def upsert(
        self, vectors: np.ndarray, ids: np.ndarray, model_version: str | None = None
    ) -> None:
        """Replaces the vectors of known ids and adds the others.

        vectors: float32[M, D]. ids: int64[M], unique and >= 0. Raises UserError as build and
        search do.
        """
        vectors = self._comparable(vectors, model_version, "vectors")
        vectors, ids = _checked(vectors, ids)
        with self._lock:
            row_of = self._row_of_id()
            rows = np.array([row_of.setdefault(int(i), len(row_of)) for i in ids], np.int64)
            self._ids = np.concatenate([self._ids, ids[rows >= len(self._ids)]])
            self._put(rows, vectors)

    def delete(self, ids: np.ndarray) -> None:
        """Removes ids: int64[M]. Raises UserError on one that the index does not hold."""
        ids = _whole_numbers(ids)
        with self._lock:
            row_of = self._row_of_id()
            unknown = [i for i in ids.tolist() if i not in row_of]
            if unknown:
                raise UserError(
                    f"cannot delete id {unknown[0]} ({len(unknown)} such): the index of "
                    f"{len(self)} vectors does not hold it"
                )
            for i in dict.fromkeys(ids.tolist()):
                row, last = row_of.pop(i), len(self._ids) - 1
                self._remove(row)
                if row != last:  # the last row moves into the gap, as in ScaNN
                    self._ids[row] = self._ids[last]
                    row_of[int(self._ids[last])] = row
                self._ids = self._ids[:last]

    def save(self, directory: str | Path) -> None:
        """Writes the index into `directory` (npy and JSON, no pickle), whole or not at all.

        An index that stands there already is replaced.
        """
        with whole_folder(Path(directory).absolute(), replace=True) as new, self._lock:
            np.save(new / "ids.npy", self._ids)
            header = {
                "kind": self.kind,
                "model_version": self.model_version,
                "size": len(self),
                "dimension": self._dimension,
            }
            (new / "index.json").write_text(json.dumps(header, indent=2) + "\n")
            self._write(new)

    def _row_of_id(self) -> dict[int, int]:
        if self._rows is None:
            self._rows = {i: row for row, i in enumerate(self._ids.tolist())}
        return self._rows

    def _comparable(self, vectors: np.ndarray, model_version: str | None, noun: str) -> np.ndarray:
        """vectors as float32, checked to be comparable with those of the index. noun: the name of
        the vectors in errors."""
        if model_version is not None and model_version != self.model_version:
            raise UserError(
                f'{noun} of model "{model_version}" were given to an index of model '
                f'"{self.model_version}": embed both with one model, or build the index again'
            )
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise UserError(
                f"{noun} of shape {list(vectors.shape)} were given to an index of "
                f"{self._dimension} dimensions: expected [rows, {self._dimension}]"
            )
        require_finite(vectors, noun)
        return vectors

    @abc.abstractmethod
    def _build(self, vectors: np.ndarray) -> None: ...

    @abc.abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [Q, <=k], -1 where none, and scores."""

    @abc.abstractmethod
    def _put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Writes vectors to rows; rows beyond the end come in order and are appended."""

    @abc.abstractmethod
    def _remove(self, row: int) -> None:
        """Takes a row out; the last row moves into its place."""

    @abc.abstractmethod
    def _write(self, directory: Path) -> None: ...

    @abc.abstractmethod
    def _read(self, directory: Path) -> None: ...


def padded(vectors: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(vectors, ((0, rows), (0, 0)))


def _checked(vectors: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.array(vectors, np.float32, order="C")  # a copy, which updates may change
    ids = _whole_numbers(ids)
    if vectors.ndim != 2 or ids.shape != vectors.shape[:1]:
        raise UserError(
            f"vectors of shape {list(vectors.shape)} came with ids of shape {list(ids.shape)}: "
            "expected [rows, dimensions] and [rows]"
        )
    if len(np.unique(ids)) != len(ids) or (ids < 0).any():
        raise UserError("the ids of an index must be unique and not negative: number the listings")
    require_finite(vectors, "vectors")
    return vectors, ids


def _whole_numbers(ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)
    if len(ids) and ids.dtype.kind not in "iu":
        raise UserError(
            f"the ids of an index must be whole numbers, unique and not negative, not {ids.dtype}: "
            "number the listings"
        )
    return ids.astype(np.int64)  # a copy, which updates may change


def require_finite(vectors: np.ndarray, noun: str) -> None:
    """Raises UserError where a row of vectors: float[N, D] holds a NaN or an infinity. noun: the
    name of the vectors in the error."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(vectors)} {noun} are not finite (first: row {bad.argmax()}): "
            "the model that made them has diverged, take an earlier checkpoint"
        )
