"""Files and folders that are written whole or not at all: nobody sees them half written.

They are written beside, under a temporary name, and then renamed. Temporary names do not hold the
process's id: containers that share a folder share those too.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def write_atomically(path: Path, content: str | np.ndarray) -> None:
    """Writes a text in UTF-8, or an array as .npy."""
    with whole_files(path.parent, [path.name]) as temporary:
        if isinstance(content, str):
            temporary[path.name].write_bytes(content.encode())
        else:
            with temporary[path.name].open("wb") as file:
                np.save(file, content)


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Temporary paths by name, to write to; they take the names, in their order, if nothing is
    raised. The folder is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
        paths = {name: Path(temporary) / name for name in names}
        yield paths
        for name, path in paths.items():
            path.replace(folder / name)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the name `path` if nothing is raised.

    replace: whether it takes the place of a folder that stands there, which is set aside for the
    moment between two renames and then deleted. Else that folder stays: another process was faster.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".unfinished-"))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # with everybody's rights, which mkdtemp does not give
        yield new
        if replace and path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            if replace or not path.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
