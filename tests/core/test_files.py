"""Files and folders that are whole or absent."""

import numpy as np
import pytest

from afmrl_jax.core.files import whole_files, whole_folder, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_text_and_an_array_are_written_into_folders_that_are_made(tmp_path):
    write_atomically(tmp_path / "new" / "text", "ä\n")
    write_atomically(tmp_path / "new" / "array", np.arange(3))
    assert (tmp_path / "new" / "text").read_bytes() == "ä\n".encode()
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "array"), [0, 1, 2])
    assert names(tmp_path / "new") == ["array", "text"]


def test_of_files_that_fail_nothing_is_left_and_nothing_replaced(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_files(tmp_path, ["a", "b"]) as temporary:
        temporary["a"].write_text("after")
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize(("replace", "left"), [(False, "theirs"), (True, "ours")])
def test_a_folder_that_stands_there_stays_or_is_replaced(tmp_path, replace, left):
    with whole_folder(tmp_path / "made", replace=replace) as new:
        (new / "ours").touch()
        (tmp_path / "made").mkdir()  # meanwhile, by another process
        (tmp_path / "made" / "theirs").touch()
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == [left]


def test_a_folder_that_fails_leaves_the_one_before(tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "made", replace=True) as new:
        (new / "half").touch()
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == []
