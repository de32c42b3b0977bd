"""Approximate search by ScaNN."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval.index import Index

log = logging.getLogger(__name__)


class ScannIndex(Index):
    """Google's ScaNN: a tree of partitions, hashed scores, exact re-scoring of the best.

    Each vector lies in one partition. SOAR (Sun et al., 2023) would list it in a second one, but
    ScaNN 1.4.2 loses track of the second entry when rows are deleted or replaced, and ends the
    process. A search opens twice the partitions instead, at the same cost and recall.

    Upserts do not change the partitions: build again when the gallery has doubled. Building needs
    3 times the vectors' bytes, and runs in one thread: several would build another index each time.
    """

    kind = "scann"

    def _build(self, vectors: np.ndarray) -> None:
        builder = _import_scann().builder(vectors, 10, "dot_product")
        if len(vectors) < 1000:  # too few rows to train partitions and codebooks on
            builder = builder.score_brute_force()
        else:
            leaves = int(len(vectors) ** 0.5)
            # k-means++ starts from the same centers in each build; random ones differ, whatever the
            # seed. Spherical: a vector lies in the leaf that a query equal to it opens first.
            builder = (
                builder.tree(leaves, leaves, random_init=False, spherical=True)
                .score_ah(2, anisotropic_quantization_threshold=0.2)
                .reorder(100)
            )
        # ScaNN keeps ids in a pickle and finds them by a Python loop, so Index maps rows to ids.
        self._searcher = builder.set_n_training_threads(1).build(docids=None)
        self._leaves = 0 if len(vectors) < 1000 else leaves

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if len(queries) == 0 or k == 0:
            return np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        depth = {}
        if self._leaves:
            # A fifth of the leaves, and at least so many that they hold 40 k rows on average.
            share = max(0.2, min(1.0, 40 * k / len(self)))
            depth = {
                "leaves_to_search": int(np.ceil(share * self._leaves)),
                "pre_reorder_num_neighbors": max(100, 3 * k),
            }
        rows, scores = self._searcher.search_batched_parallel(
            queries, final_num_neighbors=k, **depth
        )
        # Where the searched leaves hold fewer than k rows, ScaNN returns row 0 with score NaN.
        return np.where(np.isnan(scores), -1, rows.astype(np.int64)), scores

    def _put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        size = self._searcher.size()
        where = [int(row) if row < size else None for row in rows]
        self._searcher.searcher.upsert(where, vectors, 1)

    def _remove(self, row: int) -> None:
        self._searcher.searcher.delete([row])

    def _write(self, directory: Path) -> None:
        (directory / "scann").mkdir()
        # The default writes absolute paths, which would tie the index to this folder.
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


def _import_scann() -> Any:
    # ScaNN imports an installed TensorFlow for operators that are not used here. With TensorFlow >=
    # 2.21 that import fails, so TensorFlow is hidden meanwhile.
    missing = object()
    seen = sys.modules.get("tensorflow", missing)
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            "ScaNN, which large galleries need, does not import "
            f"({error}), even with TensorFlow hidden from it: install scann==1.4.2 in an "
            "environment without TensorFlow >= 2.21"
        ) from error
    finally:
        if seen is missing:
            del sys.modules["tensorflow"]
        else:
            sys.modules["tensorflow"] = seen
    return scann_ops_pybind
