"""Both indexes: what they find, how they are updated, what survives the disk, what they refuse."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from afmrl_jax.core.errors import UserError
from afmrl_jax.retrieval import exact, scann
from afmrl_jax.retrieval.exact import ExactIndex, query_block
from afmrl_jax.retrieval.indexes import build_index, load_index, recall_against_exact
from afmrl_jax.retrieval.scann import ScannIndex

KINDS = pytest.mark.parametrize("kind", [ExactIndex, ScannIndex])


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(n, dimension=64, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(200, dimension))
    return unit(centers[rng.integers(200, size=n)] + 0.6 * rng.normal(size=(n, dimension)))


@pytest.fixture(scope="module")
def gallery():
    return clustered(5000), np.arange(5000) * 7 + 3  # ids that are not rows


def test_exact_search_equals_sorting_by_numpy_across_blocks_of_queries(gallery, monkeypatch):
    vectors, ids = gallery
    monkeypatch.setattr(exact, "query_block", lambda n: 16)
    found, scores = ExactIndex("m").build(vectors, ids).search(vectors[:37], 10)
    products = vectors[:37] @ vectors.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :10]
    assert found.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(found, ids[order])
    np.testing.assert_allclose(scores, np.take_along_axis(products, order, 1), atol=1e-6)


def test_exact_search_gives_equal_scores_in_the_order_of_the_gallery():
    vectors = unit(np.array([[0, 1], [1, 0], [1, 0], [1, 0]]))
    found, _ = ExactIndex("m").build(vectors, np.array([9, 4, 8, 2])).search(vectors[1:2], 3)
    assert found.tolist() == [[4, 8, 2]]


def test_a_block_of_scores_stays_small_however_many_rows_there_are():
    assert query_block(1) == 1024 and query_block(50_000) == 512 and query_block(10**8) == 8


def test_scann_finds_nearly_what_exact_search_finds_and_the_same_each_time(gallery):
    vectors, ids = gallery
    queries = clustered(5000)[:200] + 0.05 * clustered(200, seed=1)
    index = ScannIndex("m").build(vectors, ids)
    assert recall_against_exact(index, vectors, ids, queries, k=10) >= 0.95
    again = ScannIndex("m").build(vectors, ids)
    np.testing.assert_array_equal(index.search(queries, 10).ids, again.search(queries, 10).ids)


def test_scann_fills_a_deep_search_with_real_neighbours(gallery):
    found, scores = ScannIndex("m").build(*gallery).search(gallery[0][:20], 1000)
    assert (found >= 0).all() and np.isfinite(scores).all()
    assert all(len(set(row)) == 1000 for row in found)


@KINDS
@pytest.mark.parametrize("n", [1, 5, 16, 999, 1000])
def test_small_galleries_work_and_missing_neighbours_are_padded(kind, n):
    vectors, ids = clustered(n), np.arange(n) + 100
    found, scores = kind("m").build(vectors, ids).search(vectors[:3], n + 2)
    assert found.shape == scores.shape == (min(n, 3), n + 2)
    assert found[:, 0].tolist() == ids[:3].tolist()
    assert (found[:, n:] == -1).all() and (scores[:, n:] == -np.inf).all()
    if n < 1000:  # from there on ScaNN may miss the last of all
        np.testing.assert_array_equal(np.sort(found[:, :n]), np.tile(ids, (len(found), 1)))


@KINDS
def test_a_search_without_queries_finds_nothing(kind, gallery):
    found, scores = kind("m").build(*gallery).search(np.empty((0, 64), np.float32), 5)
    assert found.shape == scores.shape == (0, 5)


@KINDS
@pytest.mark.parametrize("n", [40, 5000])
def test_upserts_replace_and_add_and_deletes_remove(kind, n):
    vectors, ids, new = clustered(n), np.arange(n) * 7 + 3, clustered(3, seed=9)
    index = kind("m").build(vectors, ids)
    index.upsert(new, np.array([10**12, ids[5], 1]))
    assert len(index) == n + 2
    assert index.search(new, 1).ids[:, 0].tolist() == [10**12, ids[5], 1]
    assert ids[5] not in index.search(vectors[5:6], 1).ids  # its old vector is gone
    index.delete(np.array([ids[0], 10**12, ids[n - 1]]))
    assert len(index) == n - 1
    assert not np.isin([ids[0], 10**12, ids[n - 1]], index.search(new, n + 2).ids).any()
    # Rows that moved into the gaps still answer to their own ids.
    rest = np.setdiff1d(np.arange(n), [0, 5, n - 1])[:: max(1, n // 50)]
    np.testing.assert_array_equal(index.search(vectors[rest], 1).ids[:, 0], ids[rest])
    assert index.search(new[2:], 1).ids.tolist() == [[1]]


def test_scann_survives_hundreds_of_updates_and_finds_what_exact_search_finds(tmp_path):
    rng, vectors = np.random.default_rng(0), clustered(1200, 16)
    index = ScannIndex("m").build(vectors[:1000], np.arange(1000))
    held = dict(enumerate(vectors[:1000]))
    for step in range(300):
        id, new = int(rng.integers(1000)), rng.choice(vectors)
        if step % 2:
            index.upsert(new[None], np.array([id]))
        else:  # gone and back again
            index.delete(np.array([id]))
            index.upsert(new[None], np.array([id]))
        held[id] = new
        if step == 150:
            index.save(tmp_path / "index")
            index = load_index(tmp_path / "index")
    index.delete(np.arange(0, 1000, 4))
    left = np.array([id for id in range(1000) if id % 4])
    exact = ExactIndex("m").build(np.stack([held[id] for id in left]), left)
    theirs, ours = (one.search(vectors[:50], 750) for one in (exact, index))
    np.testing.assert_array_equal(np.sort(ours.ids, axis=1), np.tile(left, (50, 1)))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    index.delete(left)
    assert len(index) == 0 and (index.search(vectors[:1], 2).ids == -1).all()
    index.upsert(vectors[:1], np.array([7]))
    assert index.search(vectors[:1], 2).ids.tolist() == [[7, -1]]


def test_an_index_that_lists_vectors_twice_is_built_again_before_it_can_be_updated(
    tmp_path, caplog
):
    vectors = clustered(1000, 16)
    index = ScannIndex("m").build(vectors, np.arange(1000) + 5)
    builder = scann._import_scann().builder(vectors, 10, "dot_product")
    twice = builder.tree(31, 31, soar_lambda=1.5).score_ah(2).reorder(100)
    index._searcher = twice.set_n_training_threads(1).build(docids=None)
    index.save(tmp_path / "index")
    index = load_index(tmp_path / "index")
    assert "it is built again" in caplog.text
    for id in range(100, 250):  # of one that lists them twice, ScaNN ends the process here
        index.delete(np.array([id]))
    rest = np.setdiff1d(np.arange(1000), np.arange(95, 245))
    np.testing.assert_array_equal(index.search(vectors[rest], 1).ids[:, 0], rest + 5)


@KINDS
def test_a_search_amid_updates_by_another_thread_answers_as_before_or_after_them(kind):
    vectors = clustered(40)
    index, stop = kind("m").build(vectors, np.arange(40)), threading.Event()

    def update():
        while not stop.is_set():  # row 39 moves to row 0 and back to the end
            index.delete(np.array([0]))
            index.upsert(vectors[:1], np.array([0]))

    with ThreadPoolExecutor(1) as pool:
        updates = pool.submit(update)
        try:
            for _ in range(100):
                assert index.search(vectors[1:], 1).ids[:, 0].tolist() == list(range(1, 40))
        finally:
            stop.set()
        updates.result()


@KINDS
def test_the_callers_arrays_are_never_changed_by_an_update(kind):
    vectors, ids = clustered(50), np.arange(50)
    before = vectors.copy()
    index = kind("m").build(vectors, ids)
    index.delete(np.array([0]))
    np.testing.assert_array_equal(vectors, before)
    np.testing.assert_array_equal(ids, np.arange(50))


@KINDS
@pytest.mark.parametrize("n", [40, 5000])
def test_a_saved_index_answers_the_same_after_its_folder_moved_and_can_be_updated(
    kind, n, tmp_path
):
    vectors, ids = clustered(n), np.arange(n) * 7 + 3
    index = kind("run-1@500").build(vectors, ids)
    index.delete(ids[:2])
    index.save(tmp_path / "here" / "index")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = load_index(tmp_path / "there" / "index")
    assert isinstance(loaded, kind) and loaded.model_version == "run-1@500"
    before, after = index.search(vectors, 7), loaded.search(vectors, 7)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_allclose(before.scores, after.scores, atol=1e-6)
    loaded.upsert(vectors[:1], ids[:1])
    assert loaded.search(vectors[:1], 1).ids.tolist() == [[ids[0]]]
    loaded.save(tmp_path / "there" / "index")  # replaces the other
    assert len(load_index(tmp_path / "there" / "index")) == n - 1
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["index"]
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_broken_save_leaves_the_old_index_as_it_was(tmp_path, monkeypatch):
    vectors = clustered(20)
    ExactIndex("m").build(vectors, np.arange(20)).save(tmp_path / "index")
    other = ExactIndex("m").build(vectors[:5], np.arange(5))
    monkeypatch.setattr(other, "_write", lambda directory: (directory / "no" / "such").touch())
    with pytest.raises(FileNotFoundError):
        other.save(tmp_path / "index")
    assert len(load_index(tmp_path / "index")) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("broken", ["missing", "kind", "size", "vectors"])
def test_a_folder_without_a_whole_index_is_refused(broken, tmp_path):
    ExactIndex("m").build(clustered(5), np.arange(5)).save(tmp_path / "i")
    header = json.loads((tmp_path / "i" / "index.json").read_text())
    if broken == "missing":
        (tmp_path / "i" / "index.json").unlink()
    elif broken == "vectors":
        (tmp_path / "i" / "vectors.npy").write_bytes(b"not an array")
    else:
        header[broken] = {"kind": "faiss", "size": 6}[broken]
        (tmp_path / "i" / "index.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match=r"build (it|the index) again"):
        load_index(tmp_path / "i")


def test_a_pickle_among_scanns_files_is_refused(tmp_path):
    ScannIndex("m").build(clustered(20), np.arange(20)).save(tmp_path / "i")
    (tmp_path / "i" / "scann" / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_index(tmp_path / "i")


@KINDS
def test_results_carry_the_models_version_and_another_version_is_refused(kind):
    vectors = clustered(20)
    index = kind("v1").build(vectors, np.arange(20))
    assert index.search(vectors, 3, model_version="v1").model_version == "v1"
    with pytest.raises(UserError, match=r'"v2".*"v1"'):
        index.search(vectors, 3, model_version="v2")
    with pytest.raises(UserError, match=r'"v2".*"v1"'):
        index.upsert(vectors[:1], np.array([50]), model_version="v2")
    assert len(index) == 20


@KINDS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_and_vectors_that_are_not_finite_are_refused(kind, bad):
    vectors = clustered(20)
    index = kind("m").build(vectors, np.arange(20))
    broken = vectors.copy()
    broken[3, 1] = bad
    with pytest.raises(UserError, match=r"1 of 20 queries are not finite \(first: row 3\)"):
        index.search(broken, 2)
    with pytest.raises(UserError, match="not finite"):
        index.upsert(broken, np.arange(20))
    with pytest.raises(UserError, match="not finite"):
        kind("m").build(broken, np.arange(20))


@KINDS
def test_other_mistakes_are_told(kind):
    vectors = clustered(20)
    index = kind("m").build(vectors, np.arange(20))
    with pytest.raises(UserError, match="64 dimensions"):
        index.search(vectors[:, :32], 2)
    with pytest.raises(UserError, match="cannot delete id 77"):
        index.delete(np.array([3, 77]))
    assert len(index) == 20  # nothing was half deleted
    with pytest.raises(UserError, match="unique"):
        kind("m").build(vectors, np.zeros(20, int))
    with pytest.raises(UserError, match="whole numbers"):
        index.upsert(vectors[:1], np.array([1.7]))
    with pytest.raises(UserError, match="whole numbers"):
        index.delete(np.array([1.7]))
    with pytest.raises(UserError, match="no vectors"):
        kind("m").build(vectors[:0], np.arange(0))


def test_exact_serves_small_galleries_and_scann_large_ones(gallery):
    assert isinstance(build_index(*gallery, model_version="m"), ExactIndex)
    assert isinstance(build_index(*gallery, model_version="m", exact_below=5000), ScannIndex)


def test_scann_is_imported_with_tensorflow_hidden_and_tensorflow_is_given_back(monkeypatch):
    tensorflow = object()
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    scann._import_scann()
    assert sys.modules["tensorflow"] is tensorflow
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)  # as if it did not import
    with pytest.raises(UserError, match="TensorFlow"):
        scann._import_scann()
