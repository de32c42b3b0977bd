"""Vectors of teachers: what large encoders, whichever, made of a catalogue's listings.

Axes: N listings · K teachers · D numbers of all teachers' vectors together.
"""

import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import parse_mixture
from afmrl_jax.core.options import Options

log = logging.getLogger(__name__)

COLUMNS = ("listing_id", "vector")


@dataclass(frozen=True)
class TeacherFiles(Options, section="data"):
    """Where the teachers' vectors are."""

    # Parquet files, or folders of them, with listing_id and vector; one a teacher, with its share
    # of the cosines: "text.parquet 0.7, photos/ 0.3". A path holds neither space nor comma.
    teachers: str

    def read(self, catalog: Catalog) -> "Teachers":
        """The vectors of a catalogue's listings.

        Raises UserError where a file cannot be read, has no such columns, vectors of several
        lengths, none at all of a training listing, two of one listing, or one that is no direction.
        """
        if not self.teachers:
            raise UserError(
                "data.teachers is empty: name Parquet files with the columns listing_id and vector"
            )
        paths, shares = parse_mixture(self.teachers, self.name_of("teachers"))
        vectors, weights = [], []
        for path, share in zip(paths, shares, strict=True):
            ids, directions = _read(path)
            places = pc.index_in(catalog.listing_ids, ids)
            places = places.fill_null(-1).to_numpy(zero_copy_only=False)
            is_there = places >= 0
            part = np.where(is_there[:, None], directions[places], 0)
            training = is_there[catalog.indices("train")]
            if not training.any():
                raise UserError(
                    f"{path} has the vector of no training listing of {catalog.name}: its "
                    f"listing_id are as {ids[0].as_py()!r}, and the catalogue's as "
                    f"{catalog.listing_ids[0].as_py()!r}"
                )
            if not training.all():
                log.warning(
                    "%s has no vector of %d of %d training listings: of their pairs the other "
                    "teachers tell, if any",
                    *(path, np.sum(~training), len(training)),
                )
            vectors.append(part * np.sqrt(share))
            weights.append(is_there * np.sqrt(share))
        whole = np.concatenate(vectors, axis=1, dtype=np.float32)
        return Teachers(whole, np.stack(weights, axis=1, dtype=np.float32))


@dataclass(frozen=True)
class Teachers:
    """Of two listings, v_i . v_j / w_i . w_j is the mean cosine of the teachers that know both, by
    their shares; none knows both where w_i . w_j is 0.

    vectors: float32[N, D], v. weights: float32[N, K], w.
    """

    vectors: np.ndarray
    weights: np.ndarray

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.vectors, digest_size=8)
        digest.update(self.weights)
        return digest.hexdigest()

    def __getitem__(self, listings: np.ndarray) -> dict[str, np.ndarray]:
        """`teacher` [..., D] and `teacher_weight` [..., K] of listings, int[...]."""
        return {"teacher": self.vectors[listings], "teacher_weight": self.weights[listings]}


def _read(path: str) -> tuple[pa.Array, np.ndarray]:
    """The ids of a Parquet file, or of all in a folder, and their vectors' directions, float32
    [rows, numbers] of length one."""
    if not Path(path).exists():
        raise UserError(f"data.teachers: there is no {path}")
    try:
        table = ds.dataset(path, format="parquet").to_table(columns=list(COLUMNS))
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise UserError(
            f"data.teachers: {path} cannot be read as Parquet with the columns "
            f"{' and '.join(COLUMNS)}: {error}"
        ) from None
    ids, lists = table["listing_id"], table["vector"].combine_chunks()
    if not table.num_rows or ids.null_count or lists.null_count:
        raise UserError(f"data.teachers: {path} holds no rows, or rows without an id or a vector")
    if pc.count_distinct(ids).as_py() < len(ids):
        raise UserError(f"data.teachers: {path} has two vectors of one listing_id")
    try:
        widths = pc.unique(pc.list_value_length(lists))
        flat = pc.list_flatten(lists).cast(pa.float32()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"data.teachers: column vector of {path} is {lists.type}: write lists of numbers"
        ) from None
    if len(widths) > 1:
        raise UserError(
            f"data.teachers: {path} has vectors of {sorted(widths.to_pylist())} numbers"
        )
    vectors = flat.reshape(table.num_rows, -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise UserError(
            f"data.teachers: the vector of {ids[int(bad[0])].as_py()!r} in {path} is no direction: "
            "it is zero or not finite. Leave such listings out"
        )
    return ids.cast(pa.large_string()).combine_chunks(), vectors / lengths
