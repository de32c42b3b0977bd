"""Checks that the files of a checkpoint are as they were written, by a manifest.

The manifest holds each file's size and checksum: for a local file SHA-256, which reads the file;
for an object in a bucket the CRC32C that the store keeps, so that nothing is fetched. Orbax and
TensorStore detect damage in indices alone, and not in numbers.
"""

import concurrent.futures
import hashlib
import importlib.util
import json
from pathlib import Path

import jax
from etils import epath

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.processes import texts_of_all

MANIFEST = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"  # file of Orbax in a finished checkpoint
_COMMITTED = "commit_success.txt"  # last object in a bucket, where folders cannot be renamed
_THREADS = 8  # threads that hash local files: hashlib releases Python's lock
_SENTENCE_BYTES = 400  # limit for a sentence that processes exchange


def is_bucket(folder: epath.PathLike) -> bool:
    """Whether the folder is in an object store, gs://BUCKET/FOLDER."""
    return str(folder).startswith("gs://")


def check_reachable(folder: epath.PathLike) -> None:
    """Raises UserError where this installation cannot reach the store of the folder."""
    scheme, separator, _ = str(folder).partition("://")
    if separator and scheme != "gs":
        raise UserError(f"{folder}: give a local folder, or one of a bucket as gs://BUCKET/FOLDER")
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{folder} is in a bucket, and gcsfs is not installed: pip install 'afmrl_jax[gcs]'"
        )


def is_finished(folder: epath.Path) -> bool:
    """Whether the save that wrote a checkpoint has finished."""
    return (folder / (_COMMITTED if is_bucket(folder) else _METADATA)).exists()


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of a checkpoint. One process calls it, once all files are written."""
    # Orbax adds the time to its metadata later.
    sizes = {name: size for name, size in _files(folder).items() if name != _METADATA}
    checksums = _checksums(folder, sizes)
    files = {name: {"size": sizes[name]} | checksum for name, checksum in checksums.items()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def find_damage(folder: epath.Path, unread: tuple[str, ...] = ()) -> str:
    """The damage of a checkpoint as a clause, as far as this process checks it; "" without damage.

    A process checks the sizes of all files of the manifest, and the checksums of its share of them.
    unread: prefixes of files to skip, e.g. "optimizer/" for readers of parameters.
    """
    changed = "its file {} is not as it was written"
    try:
        json.loads((folder / _METADATA).read_text())
    except FileNotFoundError:
        return f"its file {_METADATA} is missing"
    except ValueError:
        return changed.format(_METADATA)
    if not is_finished(folder):
        return f"its file {_COMMITTED} is missing"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [name for name in sorted(manifest) if not name.startswith(unread)]
        sizes = {name: manifest[name]["size"] for name in names}
    except FileNotFoundError:
        return f"its file {MANIFEST} is missing"
    except (ValueError, TypeError, KeyError):
        return changed.format(MANIFEST)
    try:
        return _differences(folder, manifest, sizes)
    except OSError as error:  # a bad disk; returned, because the other processes wait for a result
        return f"it cannot be read: {error}"


def _differences(folder: epath.Path, manifest: dict[str, dict], sizes: dict[str, int]) -> str:
    present = _files(folder)
    for name, size in sizes.items():
        if name not in present:
            return f"its file {name} is missing"
        if present[name] != size:
            return f"its file {name} has {present[name]} bytes, not the {size} that were written"
    share = list(sizes)[jax.process_index() :: jax.process_count()]
    checksums = _checksums(folder, share)
    for name in share:
        if {"size": sizes[name]} | checksums[name] != manifest[name]:
            return f"its file {name} is not as it was written: its checksum differs"
    return ""


def agree(sentence: str) -> str:
    """The sentence of the first process that has one; all processes call it, and get the same."""
    return next(filter(None, texts_of_all(sentence, _SENTENCE_BYTES)), "")


def _files(folder: epath.Path) -> dict[str, int]:
    """Size in bytes by path within `folder`."""
    if is_bucket(folder):
        return {name: info["size"] for name, info in _objects(folder).items()}
    root = Path(folder)  # epath lists no folders within folders
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}


def _checksums(folder: epath.Path, names: list[str]) -> dict[str, dict[str, str]]:
    """{algorithm: checksum} of each file."""
    if is_bucket(folder):
        objects = _objects(folder)
        return {name: {"crc32c": objects[name]["crc32c"]} for name in names}

    def digest(name: str) -> dict[str, str]:
        with (folder / name).open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names)))


def _objects(folder: epath.Path) -> dict[str, dict]:
    """The store's information on each object, by path within `folder`."""
    import fsspec

    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    store = fsspec.filesystem("gs")
    store.invalidate_cache()  # of listings, as others write here
    objects = store.find(root, detail=True)
    return {name.removeprefix(root): info for name, info in objects.items()}
