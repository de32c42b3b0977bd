"""Whether a checkpoint still holds what was written to it, by a manifest of its files.

The manifest tells each file's size and checksum: SHA-256 of a local file, which is read for it; of
an object in a bucket the CRC32C that the store keeps itself, so that nothing is fetched. Orbax and
TensorStore alone notice damage in indices, but not in numbers.
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
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file that a whole checkpoint has
_COMMITTED = "commit_success.txt"  # its last in a bucket, where nothing can be renamed at once
_THREADS = 8  # that hash local files: hashlib lets go of Python's lock
_TOLD = 400  # bytes of a sentence that processes exchange


def is_bucket(folder: epath.PathLike) -> bool:
    """Whether that is a folder of an object store, gs://BUCKET/FOLDER."""
    return str(folder).startswith("gs://")


def check_reachable(folder: epath.PathLike) -> None:
    """Raises UserError where `folder` is in a kind of store that this installation cannot reach."""
    scheme, separator, _ = str(folder).partition("://")
    if separator and scheme != "gs":
        raise UserError(f"{folder}: give a local folder, or one of a bucket as gs://BUCKET/FOLDER")
    if separator and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{folder} is in a bucket, and gcsfs is not installed: pip install 'afmrl_jax[gcs]'"
        )


def is_finished(folder: epath.Path) -> bool:
    """Whether the save that wrote a checkpoint came to its end."""
    return (folder / (_COMMITTED if is_bucket(folder) else _METADATA)).exists()


def write_manifest(folder: epath.Path) -> None:
    """Tells of all files of a checkpoint; call it when they are written, from one process."""
    # To Orbax's own it adds the time, later.
    sizes = {name: size for name, size in _files(folder).items() if name != _METADATA}
    told = {name: {"size": sizes[name]} | facts for name, facts in _facts(folder, sizes).items()}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1))


def find_damage(folder: epath.Path, unread: tuple[str, ...] = ()) -> str:
    """Why a checkpoint cannot be used, as far as this process sees; "" where it can.

    unread: beginnings of the names of files that nobody will read. It looks at the sizes of all
    others and at the checksums of its share of them. Files beside those of the manifest do not
    matter.
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
    except OSError as error:  # a bad disk: the other processes wait to hear of it
        return f"it cannot be read: {error}"


def _differences(folder: epath.Path, manifest: dict[str, dict], sizes: dict[str, int]) -> str:
    found = _files(folder)
    for name, size in sizes.items():
        if name not in found:
            return f"its file {name} is missing"
        if found[name] != size:
            return f"its file {name} has {found[name]} bytes, not the {size} that were written"
    own = list(sizes)[jax.process_index() :: jax.process_count()]
    facts = _facts(folder, own)
    for name in own:
        if {"size": sizes[name]} | facts[name] != manifest[name]:
            return f"its file {name} is not as it was written: its checksum differs"
    return ""


def agree(told: str) -> str:
    """The words of the first process that has any; every process calls, and gets the same."""
    return next(filter(None, texts_of_all(told, _TOLD)), "")


def _files(folder: epath.Path) -> dict[str, int]:
    """Size in bytes by path within `folder`."""
    if is_bucket(folder):
        return {name: info["size"] for name, info in _objects(folder).items()}
    root = Path(folder)  # epath lists no folders within folders
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}


def _facts(folder: epath.Path, names: list[str]) -> dict[str, dict[str, str]]:
    """The checksum of each of these files."""
    if is_bucket(folder):
        objects = _objects(folder)
        return {name: {"crc32c": objects[name]["crc32c"]} for name in names}

    def digest(name: str) -> dict[str, str]:
        with (folder / name).open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names)))


def _objects(folder: epath.Path) -> dict[str, dict]:
    """What the store itself knows of each object, by path within `folder`."""
    import fsspec

    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    store = fsspec.filesystem("gs")
    store.invalidate_cache()  # it keeps listings, and others write here
    found = store.find(root, detail=True)
    return {name.removeprefix(root): info for name, info in found.items()}
