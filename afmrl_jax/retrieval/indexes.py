"""Builds the index that suits a number of vectors, and measures an approximate one."""

import json
import logging
from pathlib import Path

import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval.exact import ExactIndex
from afmrl_jax.retrieval.index import Index
from afmrl_jax.retrieval.scann import ScannIndex

log = logging.getLogger(__name__)

EXACT_BELOW = 50_000  # rows; at 100k x 256 on CPU ScaNN's build costs 10 s and then wins 15x


def build_index(
    vectors: np.ndarray, ids: np.ndarray, *, model_version: str, exact_below: int = EXACT_BELOW
) -> Index:
    """An index of vectors: float32[N, D] under ids: int64[N]; ScaNN from `exact_below` rows on."""
    index_type = ExactIndex if len(vectors) < exact_below else ScannIndex
    return index_type(model_version).build(vectors, ids)


def recall_against_exact(
    index: Index,
    vectors: np.ndarray,
    ids: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 10,
    sample: int = 256,
) -> float:
    """The share of the exact k nearest that `index` finds too, over a sample of the queries.

    vectors: float32[N, D] and ids: int64[N] of the index. queries: float32[Q, D]. In [0, 1].
    """
    chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
    k = min(k, len(vectors))
    exact, _ = ExactIndex(index.model_version).build(vectors, ids).search(queries[chosen], k)
    approximate, _ = index.search(queries[chosen], k)
    return float((exact[:, :, None] == approximate[:, None, :]).any(axis=2).mean())


def load_index(directory: str | Path) -> Index:
    """Reads an index that `save` wrote, also after its folder was moved.

    Raises UserError where `directory` holds no whole index.
    """
    directory = Path(directory).absolute()
    try:
        header = json.loads((directory / "index.json").read_text())
        index = {choice.kind: choice for choice in (ExactIndex, ScannIndex)}[header["kind"]](
            header["model_version"]
        )
        index._dimension = header["dimension"]
        index._ids = np.load(directory / "ids.npy", allow_pickle=False)
        index._read(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory} holds no whole index ({type(error).__name__}: {error}): build it again"
        ) from error
    if len(index) != header["size"]:
        raise UserError(
            f"{directory} holds {len(index)} ids where index.json says {header['size']}: "
            "build the index again"
        )
    return index
