"""Nearest neighbours of queries among a gallery's vectors: exact on the device, or ScaNN.

Axes: N gallery vectors · Q queries · D dimensions · k neighbours.

Scores are dot products: cosines, since embeddings are L2-normalised. An index knows the version of
the model that made its vectors, hands it out with every result, and refuses vectors of another.
"""

import abc
import functools
import json
import logging
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from afmrl_jax.core.errors import UserError

EXACT_BELOW = 50_000  # rows; at 100k x 256 on CPU ScaNN's build costs 10 s and then wins 15x
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
    """What every index does; a subclass says how, in terms of rows 0..N-1 instead of ids.

    Threads may share one: a call waits until the one before it is done.
    """

    kind: ClassVar[str]

    def __init__(self, model_version: str):
        self.model_version = model_version
        self._lock = threading.RLock()  # an update moves rows: ids read meanwhile would be others'
        self._ids = np.empty(0, np.int64)
        self._rows: dict[int, int] | None = None  # id -> row; made when first updated

    def __len__(self) -> int:
        return len(self._ids)

    def build(self, vectors: np.ndarray, ids: np.ndarray) -> Self:
        """Fills the index, replacing what it held.

        vectors: float32[N, D], finite. ids: int64[N], unique and >= 0. Returns itself.
        Raises UserError where vectors or ids are not so.
        """
        if len(vectors) == 0:
            raise UserError("an index of no vectors was asked for: give it at least one listing")
        vectors, ids = _checked(vectors, ids)
        with self._lock:
            self._build(vectors)
            self._dimension, self._ids, self._rows = vectors.shape[1], ids, None
        return self

    def search(self, queries: np.ndarray, k: int, model_version: str | None = None) -> Results:
        """The k nearest of each query, best first.

        queries: float32[Q, D]. model_version: of the model that made the queries; None skips the
        check. Raises UserError on another version, another D, or queries that are not finite.
        """
        queries = self._ours(queries, model_version, "queries")
        with self._lock:
            rows, scores = self._search(queries, min(k, len(self)))
            found = rows >= 0
            ids = np.where(found, self._ids[np.where(found, rows, 0)], -1)
        results = Results(
            np.full((len(queries), k), -1, np.int64),
            np.full((len(queries), k), -np.inf, np.float32),
            self.model_version,
        )
        results.ids[:, : ids.shape[1]] = ids
        results.scores[:, : ids.shape[1]] = np.where(found, scores, -np.inf)
        return results

    def upsert(
        self, vectors: np.ndarray, ids: np.ndarray, model_version: str | None = None
    ) -> None:
        """Replaces the vectors of known ids and adds the others.

        vectors: float32[M, D]. ids: int64[M], unique and >= 0. Raises UserError as build and
        search do.
        """
        vectors = self._ours(vectors, model_version, "vectors")
        vectors, ids = _checked(vectors, ids)
        with self._lock:
            known = self._row_of()
            rows = np.array([known.setdefault(int(i), len(known)) for i in ids], np.int64)
            self._ids = np.concatenate([self._ids, ids[rows >= len(self._ids)]])
            self._put(rows, vectors)

    def delete(self, ids: np.ndarray) -> None:
        """Removes ids: int64[M]. Raises UserError on one that the index does not hold."""
        ids = _whole_numbers(ids)
        with self._lock:
            known = self._row_of()
            unknown = [i for i in ids.tolist() if i not in known]
            if unknown:
                raise UserError(
                    f"cannot delete id {unknown[0]} ({len(unknown)} such): the index of "
                    f"{len(self)} vectors does not hold it"
                )
            for i in dict.fromkeys(ids.tolist()):
                row, last = known.pop(i), len(self._ids) - 1
                self._remove(row)
                if row != last:  # the last row moves into the gap, as in ScaNN
                    self._ids[row] = self._ids[last]
                    known[int(self._ids[last])] = row
                self._ids = self._ids[:last]

    def save(self, directory: str | Path) -> None:
        """Writes the index into `directory` (npy and JSON, no pickle), whole or not at all.

        It is written beside and then renamed. An index that stands there already is set aside as
        `.NAME.old.*` for the moment between two renames, then deleted.
        """
        target = Path(directory).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            with self._lock:
                np.save(new / "ids.npy", self._ids)
                header = {
                    "kind": self.kind,
                    "model_version": self.model_version,
                    "size": len(self),
                    "dimension": self._dimension,
                }
                (new / "index.json").write_text(json.dumps(header, indent=2) + "\n")
                self._write(new)
            new.chmod(0o755)  # mkdtemp makes it private
            if target.exists():  # a full directory cannot be renamed over: set the old one aside
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
                target.rename(old / target.name)
                new.rename(target)
                shutil.rmtree(old)
            else:
                new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @staticmethod
    def load(directory: str | Path) -> "Index":
        """Reads what `save` wrote, wherever it has been moved; the kind is told by the files.

        Raises UserError where `directory` holds no whole index.
        """
        directory = Path(directory).absolute()
        try:
            header = json.loads((directory / "index.json").read_text())
            index = {kind.kind: kind for kind in (ExactIndex, ScannIndex)}[header["kind"]](
                header["model_version"]
            )
            index._dimension = header["dimension"]
            index._ids = np.load(directory / "ids.npy", allow_pickle=False)
            index._read(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{directory} holds no whole index ({type(error).__name__}: {error}): "
                "build it again"
            ) from error
        if len(index) != header["size"]:
            raise UserError(
                f"{directory} holds {len(index)} ids where index.json says {header['size']}: "
                "build the index again"
            )
        return index

    def _row_of(self) -> dict[int, int]:
        if self._rows is None:
            self._rows = {i: row for row, i in enumerate(self._ids.tolist())}
        return self._rows

    def _ours(self, vectors: np.ndarray, model_version: str | None, what: str) -> np.ndarray:
        """vectors as float32, once it is sure that they may be compared with the index's own."""
        if model_version is not None and model_version != self.model_version:
            raise UserError(
                f'{what} of model "{model_version}" were given to an index of model '
                f'"{self.model_version}": embed both with one model, or build the index again'
            )
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise UserError(
                f"{what} of shape {list(vectors.shape)} were given to an index of "
                f"{self._dimension} dimensions: expected [rows, {self._dimension}]"
            )
        require_finite(vectors, what)
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


class ExactIndex(Index):
    """Compares each query with every vector, on the device. Equal scores: the earlier row first."""

    kind = "exact"

    def _build(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self._on_device: jax.Array | None = None

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._on_device is None:
            # Whole blocks of rows, so that a few upserts do not compile the search again.
            self._on_device = jnp.asarray(_padded(self._vectors, -len(self._vectors) % 1024))
        size = np.int32(len(self._vectors))
        step = query_block(len(self._on_device))
        step = min(step, 1 << max(3, (len(queries) - 1).bit_length()))  # few queries are few rows
        rows, scores = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), "f4")
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            found = _top_k(_padded(block, step - len(block)), self._on_device, size, k)
            scores[start : start + step] = np.asarray(found[0])[: len(block)]
            rows[start : start + step] = np.asarray(found[1])[: len(block)]
        return rows, scores

    def _put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        new = rows >= len(self._vectors)
        updated = np.concatenate([self._vectors, vectors[new]])
        updated[rows[~new]] = vectors[~new]
        self._build(updated)

    def _remove(self, row: int) -> None:
        self._vectors[row] = self._vectors[-1]
        self._build(self._vectors[:-1])

    def _write(self, directory: Path) -> None:
        np.save(directory / "vectors.npy", self._vectors)

    def _read(self, directory: Path) -> None:
        self._build(np.load(directory / "vectors.npy", allow_pickle=False))


class ScannIndex(Index):
    """Google's ScaNN: a tree of partitions, hashed scores, exact re-scoring of the best.

    Each vector stands in one partition. SOAR (Sun et al., 2023) would list it in a second one, but
    ScaNN 1.4.2 loses track of those when rows are deleted or replaced, and ends the process. A
    search opens twice the partitions instead, which costs and finds as much.

    Upserts go to the partitions found at build: build again when the gallery has doubled. Building
    peaks at 3 times the vectors' bytes, in one thread, since two do not make the same index twice.
    """

    kind = "scann"

    def _build(self, vectors: np.ndarray) -> None:
        builder = _import_scann().builder(vectors, 10, "dot_product")
        if len(vectors) < 1000:  # too few rows to train partitions and codebooks on
            builder = builder.score_brute_force()
        else:
            leaves = int(len(vectors) ** 0.5)
            # Random first centers differ from build to build, whatever the seed: k-means++ does
            # not. Spherical: a vector lies in the leaf that a query equal to it opens first.
            builder = (
                builder.tree(leaves, leaves, random_init=False, spherical=True)
                .score_ah(2, anisotropic_quantization_threshold=0.2)
                .reorder(100)
            )
        # ScaNN's own id list is a pickle and a Python loop: rows are mapped to ids here instead.
        self._searcher = builder.set_n_training_threads(1).build(docids=None)
        self._leaves = 0 if len(vectors) < 1000 else leaves

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if len(queries) == 0 or k == 0:
            return np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        depth = {}
        if self._leaves:
            # A fifth of the leaves, and at least as many as hold 40 k rows on average.
            share = max(0.2, min(1.0, 40 * k / len(self)))
            depth = {
                "leaves_to_search": int(np.ceil(share * self._leaves)),
                "pre_reorder_num_neighbors": max(100, 3 * k),
            }
        rows, scores = self._searcher.search_batched_parallel(
            queries, final_num_neighbors=k, **depth
        )
        # Where the searched leaves hold fewer than k rows, ScaNN fills up with row 0, score NaN.
        return np.where(np.isnan(scores), -1, rows.astype(np.int64)), scores

    def _put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        size = self._searcher.size()
        where = [int(row) if row < size else None for row in rows]
        self._searcher.searcher.upsert(where, vectors, 1)

    def _remove(self, row: int) -> None:
        self._searcher.searcher.delete([row])

    def _write(self, directory: Path) -> None:
        (directory / "scann").mkdir()
        # By default absolute paths are written, which would tie the index to this folder.
        self._searcher.serialize(str(directory / "scann"), relative_path=True)
        (directory / "scann.json").write_text(json.dumps({"leaves": self._leaves}) + "\n")

    def _read(self, directory: Path) -> None:
        folder = directory / "scann"
        if (folder / "hashed_dataset_soar.npy").exists():
            log.warning(
                "the index in %s lists vectors twice (SOAR), which ScaNN cannot update: it is "
                "built again from its vectors; save it to keep that",
                directory,
            )
            self._build(np.load(folder / "dataset.npy", allow_pickle=False))
            return
        self._leaves = json.loads((directory / "scann.json").read_text())["leaves"]
        if (folder / "scann_docids.pkl").exists():
            raise ValueError("scann_docids.pkl is a pickle, which this program never writes")
        try:
            self._searcher = _import_scann().load_searcher(
                str(folder), assets_backcompat_shim=False
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def build_index(
    vectors: np.ndarray, ids: np.ndarray, *, model_version: str, exact_below: int = EXACT_BELOW
) -> Index:
    """An index of vectors: float32[N, D] under ids: int64[N]; ScaNN from `exact_below` rows on."""
    kind = ExactIndex if len(vectors) < exact_below else ScannIndex
    return kind(model_version).build(vectors, ids)


def recall_against_exact(
    index: Index,
    vectors: np.ndarray,
    ids: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 10,
    sample: int = 256,
    seed: int = 0,
) -> float:
    """The share of the exact k nearest that `index` finds too, over a sample of the queries.

    vectors: float32[N, D] and ids: int64[N] of the index. queries: float32[Q, D]. In [0, 1].
    """
    chosen = np.random.default_rng(seed).permutation(len(queries))[:sample]
    k = min(k, len(vectors))
    exact, _ = ExactIndex(index.model_version).build(vectors, ids).search(queries[chosen], k)
    found, _ = index.search(queries[chosen], k)
    return float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())


def query_block(n: int) -> int:
    """Queries to score at once against n rows: at most 2**25 scores (128 MiB), a power of two."""
    return 1 << max(3, min(10, (2**25 // max(n, 1)).bit_length() - 1))


@functools.partial(jax.jit, static_argnames="k")
def _top_k(
    queries: jax.Array, vectors: jax.Array, size: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    # Full precision: accelerators otherwise round the products, and the search is not exact.
    scores = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(jnp.arange(len(vectors)) < size, scores, -jnp.inf), k)


def _padded(vectors: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(vectors, ((0, rows), (0, 0)))


def _checked(vectors: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.array(vectors, np.float32, order="C")  # a copy: the index changes its own
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
    return ids.astype(np.int64)  # a copy: the index changes its own


def require_finite(vectors: np.ndarray, what: str) -> None:
    """Raises UserError where a row of vectors: float[N, D] holds a NaN or an infinity."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(vectors)} {what} are not finite (first: row {bad.argmax()}): "
            "the model that made them has diverged, take an earlier checkpoint"
        )


def _import_scann() -> Any:
    # ScaNN imports TensorFlow where it finds one, for operators that are not used here, and beside
    # TensorFlow >= 2.21 that import breaks: hide it meanwhile.
    missing = object()
    seen = sys.modules.get("tensorflow", missing)
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN, which galleries of {EXACT_BELOW:,} listings and more need, does not import "
            f"({error}), even with TensorFlow hidden from it: install scann==1.4.2 in an "
            "environment without TensorFlow >= 2.21"
        ) from error
    finally:
        if seen is missing:
            del sys.modules["tensorflow"]
        else:
            sys.modules["tensorflow"] = seen
    return scann_ops_pybind
