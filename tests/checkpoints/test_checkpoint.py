"""What is saved, what is kept, and what is done about damage."""

import dataclasses
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afmrl_jax.checkpoints import checkpoint
from afmrl_jax.checkpoints.checkpoint import Checkpoints, checkpoint_folder, find_checkpoints
from afmrl_jax.checkpoints.integrity import MANIFEST, find_damage
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import TryAgain, UserError


def state_at(step):
    rng = np.random.default_rng(step)
    params = {"kernel": jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)}
    return TrainState(jnp.int32(step), params, {"mean": jnp.full((40, 24), step, jnp.float32)})


def save(folder, validations):
    """Saves a step for each validation that is given, by step."""
    with Checkpoints(folder, writable=True) as checkpoints:
        for step, validation in validations.items():
            checkpoints.save(state_at(step), {"config": "{}", "step": str(step)}, step, validation)


def abstract(arrays):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )


def restored(checkpoints, step):
    return checkpoints.restore(step, abstract(state_at(0)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir whose run has saved steps 1 to 3, of which the last two are left."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir / "checkpoints", {1: None, 2: 0.5, 3: 0.25})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def numbers(workdir, part="params"):
    """The file of step 3 that holds that part's numbers."""
    return max(files(workdir / "checkpoints" / "3" / part), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def test_the_last_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: 0.9, 6: 0.2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]
    save(tmp_path, {7: None, 8: 0.5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7", "8"]
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest, checkpoints.best) == (8, 5)
    for step in (5, 7, 8):
        jax.tree.map(np.testing.assert_array_equal, restored(checkpoints, step), state_at(step))


def test_a_workdir_and_a_step_s_folder_find_it(saved):
    for path, best, step in (("", False, 3), ("", True, 2), ("checkpoints/2", False, 2)):
        assert find_checkpoints(str(saved / path), best=best)[1] == step
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        find_checkpoints(str(saved / "checkpoints" / "1"))


SPOILED = {
    "missing": lambda path: path.unlink(),
    "bytes, not the": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "checksum differs": flip,
}


@pytest.mark.parametrize("part", ["params", "optimizer"])
@pytest.mark.parametrize("how", SPOILED)
def test_numbers_that_are_not_what_was_written_send_a_run_one_checkpoint_back(
    workdir, how, part, caplog
):
    """Orbax itself would not notice the flipped byte."""
    SPOILED[how](numbers(workdir, part))
    folder = workdir / "checkpoints"
    with Checkpoints(folder, writable=True) as checkpoints:
        assert checkpoints.latest == 2
        jax.tree.map(np.testing.assert_array_equal, restored(checkpoints, 2), state_at(2))
        checkpoints.save(state_at(3), {"config": "{}"}, 3, None)  # the run comes by there again
    left, aside = [r.getMessage() for r in caplog.records if r.name == "afmrl_jax"]
    assert f"{folder / '3'} is left for the checkpoint before it: its file {part}/" in left
    assert how in left
    assert aside.endswith("is set aside as 3.damaged; step 2 goes on")
    assert files(folder / "3.damaged")
    assert find_checkpoints(str(workdir))[1] == 3


def test_every_file_of_a_checkpoint_is_watched(workdir):
    """All but Orbax's own two that are written last, which tell times and places."""
    folder, whole = workdir / "checkpoints" / "3", workdir / "whole"
    shutil.copytree(folder, whole)
    last = ("_CHECKPOINT_METADATA", "commit_success.txt")
    watched = [p.relative_to(whole) for p in files(whole) if str(p.relative_to(whole)) not in last]
    assert {"_strings.json", "metrics", "_METADATA", MANIFEST} <= {name.name for name in watched}
    for name in watched:
        flip(folder / name)
        told = find_damage(folder)
        if name.name == MANIFEST:  # it tells of all parts
            assert told
        else:
            found = 3 if name.parts[0] == "optimizer" else 2  # who reads no moments may have it
            assert str(name) in told and find_checkpoints(str(workdir))[1] == found
        shutil.copy(whole / name, folder / name)
    assert find_damage(folder) == "" and find_checkpoints(str(workdir))[1] == 3


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", MANIFEST, "run"])
def test_a_copy_that_is_not_complete_is_noticed(workdir, name, caplog):
    path = workdir / "checkpoints" / "3" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert find_checkpoints(str(workdir))[1] == 2
    assert f"its file {name}" in caplog.text


def test_a_reader_leaves_what_is_damaged_where_it_is(workdir):
    flip(numbers(workdir))
    assert find_checkpoints(str(workdir))[1] == 2
    assert (workdir / "checkpoints" / "3").is_dir()
    with pytest.raises(UserError, match=r"3 cannot be read whole: its file .* name another"):
        find_checkpoints(str(workdir / "checkpoints" / "3"))


def test_a_best_one_that_is_damaged_is_not_taken(workdir):
    flip(workdir / "checkpoints" / "2" / "metrics" / "metrics")
    assert find_checkpoints(str(workdir), best=True)[1] == 3


@pytest.mark.parametrize("writable", [False, True])
def test_a_run_that_has_no_whole_checkpoint_left_does_not_begin_anew(workdir, writable):
    for step in ("2", "3"):
        flip(workdir / "checkpoints" / step / "run" / "_strings.json")
    with pytest.raises(UserError, match=r"step 2: its file run/_strings.json.*step 3.*from a copy"):
        Checkpoints(workdir / "checkpoints", writable=writable).latest  # noqa: B018
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "3"}


def test_an_older_one_with_a_torn_score_is_set_aside_and_the_run_goes_on(workdir):
    (workdir / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"valid')
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.save(state_at(4), {"config": "{}"}, 4, 0.1)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {"2.damaged", "3", "4"}


def test_a_run_whose_checkpoints_lie_in_another_folder_does_not_begin_anew(workdir, tmp_path):
    moved = str(tmp_path / "new")
    with pytest.raises(UserError, match=f"are in {workdir / 'checkpoints'}, and .*new has none"):
        checkpoint_folder(moved, workdir)
    shutil.copytree(workdir / "checkpoints", tmp_path / "new")
    assert Checkpoints(checkpoint_folder(moved, workdir)).latest == 3


def test_a_folder_in_the_home_is_found(workdir, tmp_path, monkeypatch):
    """A shell leaves ~ as it is behind --config.checkpoint_dir=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(workdir / "checkpoints", tmp_path / "new")
    assert Path(checkpoint_folder("~/new", workdir)) == tmp_path / "new"


def test_a_process_waits_until_it_sees_the_checkpoint_that_another_one_sees(workdir, monkeypatch):
    """Network file systems show a new folder late."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    monkeypatch.setattr("jax.process_count", lambda: 2)
    gather = "jax.experimental.multihost_utils.process_allgather"
    monkeypatch.setattr(gather, lambda own: np.stack([own, np.int32(20)]))
    with pytest.raises(TryAgain, match=r"process 0 does not see .*checkpoints/20, which another"):
        checkpoints._see_newest(patience=0.1)
    late = threading.Timer(0.3, (workdir / "checkpoints" / "20").mkdir)
    late.start()
    checkpoints._see_newest(patience=20)
    assert not late.is_alive() and (workdir / "checkpoints" / "20").exists()


def test_a_memory_is_saved_beside_the_state_and_read_only_by_who_goes_on(workdir):
    memory = {"embedding": jnp.arange(6.0).reshape(3, 2), "filled": jnp.array([True, True, False])}
    state = dataclasses.replace(state_at(4), memory=memory)
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        checkpoints.save(state, {"config": "{}"}, 4, None)
        checkpoints.wait()
        read = checkpoints.restore(4, abstract(state))
        jax.tree.map(np.testing.assert_array_equal, read, state)
    raw = checkpoints.restore_raw(4)
    np.testing.assert_array_equal(raw["memory"]["embedding"], memory["embedding"])
    flip(max(files(workdir / "checkpoints" / "4" / "memory"), key=lambda p: p.stat().st_size))
    assert find_checkpoints(str(workdir))[1] == 4
    with Checkpoints(workdir / "checkpoints", writable=True) as checkpoints:
        assert checkpoints.latest == 3


def test_what_a_killed_save_left_is_cleaned_away(workdir):
    folder = workdir / "checkpoints"
    (folder / "3").rename(folder / "4.orbax-checkpoint-tmp")
    with Checkpoints(folder, writable=True) as checkpoints:
        assert checkpoints.latest == 2
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_checkpoints_may_lie_elsewhere_and_the_workdir_knows_where(tmp_path):
    from afmrl_jax.configs.agcl import get_config

    config, run = get_config(), tmp_path / "run"
    config.checkpoint_dir = str(tmp_path / "large disk" / "run")
    save(checkpoint_folder(config.checkpoint_dir, run), {1: None})
    assert [path.name for path in (tmp_path / "large disk" / "run").iterdir()] == ["1"]
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    for path in (run, config.checkpoint_dir, f"{config.checkpoint_dir}/1"):
        checkpoints, step = find_checkpoints(str(path))
        assert checkpoints.record(step)["step"] == "1"
    other = tmp_path / "other"
    assert Path(checkpoint_folder("", other)) == other / "checkpoints"


def test_a_store_that_cannot_be_reached_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"s3://b/run: give a local folder, or .* gs://"):
        Checkpoints("s3://b/run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"gcsfs is"):
        checkpoint_folder("gs://bucket/run", tmp_path)
    with pytest.raises(UserError, match=r"gcsfs is not installed: pip install 'afmrl_jax\[gcs\]'"):
        find_checkpoints("gs://bucket/run")


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, monkeypatch, caplog):
    state = state_at(1)
    size = 4 + 2 * 40 * 24 * 4
    with Checkpoints(tmp_path / "new", writable=True) as checkpoints:
        for free, wanted in ((4 * size, ""), (4 * size - 1, "may need"), (size, "may need")):
            caplog.clear()
            monkeypatch.setattr(checkpoint, "_free", lambda folder, free=free: free)
            checkpoints.check_space(state)
            told = [r.getMessage() for r in caplog.records if r.name == "afmrl_jax"]
            assert [wanted in sentence for sentence in told] == ([True] if wanted else [])
        monkeypatch.setattr(checkpoint, "_free", lambda folder: size - 1)
        with pytest.raises(UserError, match=r"has 0\.01 MB free, and a checkpoint needs 0\.01 MB"):
            checkpoints.check_space(state)


def test_a_save_that_fails_is_told_with_what_is_still_whole(workdir):
    """A limit on files' size: written bytes are refused, as by a full disk, at whatever user."""
    folder = workdir / "checkpoints"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = r"^step 4 could not be saved .*: file too large\. .*B are free .* from step 3, which"
    with Checkpoints(folder, writable=True) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            params = {"kernel": jax.random.normal(jax.random.key(0), (200, 1000))}
            large = dataclasses.replace(state_at(4), params=params)
            checkpoints.save(large, {"config": "{}"}, 4, None)
            with pytest.raises(UserError, match=told):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
        checkpoints.save(state_at(4), {"config": "{}"}, 4, None)
    assert find_checkpoints(str(workdir))[1] == 4
