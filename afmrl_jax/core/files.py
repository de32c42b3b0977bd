"""Files that are never seen half written."""

import tempfile
from pathlib import Path

import numpy as np


def write_atomically(path: Path, content: str | np.ndarray) -> None:
    """Writes a text, or an array as .npy, that is never seen half written: to a temporary name,
    then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not named by process id: containers that share a folder share those too.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.save(file, content)
    Path(file.name).replace(path)
