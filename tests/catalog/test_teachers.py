"""Teachers' vectors from Parquet, and what is wrong with such files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.catalog.teachers import TeacherFiles
from afmrl_jax.core.errors import UserError


@pytest.fixture
def catalog(catalogue_folder, tmp_path):
    return open_catalog(catalogue_folder, cache_dir=tmp_path / "cache")


def write(path, ids, vectors):
    pq.write_table(pa.table({"listing_id": ids, "vector": vectors}), path)
    return path


def vectors_of(ids, width=4, seed=0):
    return list(np.random.default_rng(seed).normal(size=(len(ids), width)))


def test_products_are_the_mean_cosine_of_the_teachers_that_know_both(catalog, tmp_path):
    ids = catalog.listing_ids.to_pylist()
    first, second = vectors_of(ids), vectors_of(ids, 3, 1)
    folder = tmp_path / "first"
    folder.mkdir()
    write(folder / "a.parquet", ids[:7], first[:7])
    write(folder / "b.parquet", ids[:6:-1], first[:6:-1])
    path = write(tmp_path / "second.parquet", ["elsewhere", *ids[2:]], [[1.0] * 3, *second[2:]])
    teachers = TeacherFiles(f"{folder} 0.75, {path} 0.25").read(catalog)
    found = teachers[np.arange(len(ids))]
    weights = found["teacher_weight"] @ found["teacher_weight"].T
    cosines = found["teacher"] @ found["teacher"].T / weights

    def cosine(vectors, i, j):
        one, other = vectors[i], vectors[j]
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    both = 0.75 * cosine(first, 5, 9) + 0.25 * cosine(second, 5, 9)
    assert cosines[5, 9] == pytest.approx(both, rel=1e-5)
    assert cosines[1, 9] == pytest.approx(cosine(first, 1, 9), rel=1e-5)  # the second lacks one
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-6)
    again = TeacherFiles(f"{folder} 0.75, {path} 0.25").read(catalog)
    assert again.fingerprint == teachers.fingerprint
    assert TeacherFiles(str(folder)).read(catalog).fingerprint != teachers.fingerprint


def test_listings_without_a_vector_are_counted(catalog, tmp_path, caplog):
    ids = [catalog.listing(int(i)).listing_id for i in catalog.indices("train")]
    path = write(tmp_path / "v.parquet", ids[:-3], vectors_of(ids[:-3]))
    TeacherFiles(str(path)).read(catalog)
    assert f"no vector of 3 of {len(ids)} training listings" in caplog.text


@pytest.mark.parametrize(
    "ids, vectors, told",
    [
        (["x"], [[1.0, 2.0]], "the vector of no training listing .* as 'x', and .* as 'mug-red-0'"),
        (["x", "y"], [[1.0], [1.0, 2.0]], r"vectors of \[1, 2\] numbers"),
        (["x", "y"], [[1.0], [0.0]], "'y' in .* zero or not finite"),
        (["x", "y"], [[1.0], [float("nan")]], "'y' in .* zero or not finite"),
        (["x", "y"], [[1.0], None], "without an id or a vector"),
        (["x", "x"], [[1.0], [2.0]], "two vectors of one listing_id"),
        (["x"], [["a"]], "write lists of numbers"),
        (["x"], ["a"], "write lists of numbers"),
        (["x"], [[1.0, None]], "zero or not finite"),
        ([1], [[1.0]], "the vector of no training listing"),
        ([], [], "holds no rows"),
    ],
)
def test_files_that_tell_nothing_are_refused(catalog, tmp_path, ids, vectors, told):
    path = write(tmp_path / "v.parquet", ids, vectors)
    with pytest.raises(UserError, match=told):
        TeacherFiles(str(path)).read(catalog)


def test_paths_are_told(catalog, tmp_path):
    with pytest.raises(UserError, match=r"data\.teachers is empty: name Parquet files"):
        TeacherFiles("").read(catalog)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        TeacherFiles(str(tmp_path / "nowhere")).read(catalog)
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(
        UserError, match="cannot be read as Parquet with the columns listing_id and"
    ):
        TeacherFiles(str(tmp_path / "text.parquet")).read(catalog)
    pq.write_table(pa.table({"listing_id": ["x"]}), tmp_path / "v.parquet")
    with pytest.raises(
        UserError, match="cannot be read as Parquet with the columns listing_id and"
    ):
        TeacherFiles(str(tmp_path / "v.parquet")).read(catalog)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot be read as Parquet|holds no rows"):
        TeacherFiles(str(tmp_path / "empty")).read(catalog)
