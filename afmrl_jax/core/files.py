"""Files and folders that are written whole or not at all: nobody sees them half written.

They are written in the same folder under a temporary name, and then renamed. Temporary names do not
hold the process's id: processes of several containers that share a folder may have the same id.
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
    """Temporary paths by name, to write to. If nothing is raised, they are renamed to the names, in
    their order. A missing folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as temporary:
        paths = {name: Path(temporary) / name for name in names}
        yield paths
        for name, path in paths.items():
            path.replace(folder / name)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` if nothing is raised.

    replace: whether it replaces a folder at `path`, which is set aside between two renames and then
    deleted. Else that folder stays, because another process was faster.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".unfinished-"))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # readable for others, unlike a folder of mkdtemp
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
