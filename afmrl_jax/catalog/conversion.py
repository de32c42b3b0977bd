"""Converts a catalogue's source into memory-mapped Arrow columns, once.

The cache holds a folder CATALOGUE/CONTENT/ with the listings as Arrow IPC (and the image bytes, if
the source stores them), a hash of each listing's text, the bad records, and a summary. CONTENT is a
hash of every byte of the source, so a changed source gets another folder. Folders are only added,
never changed, and appear whole by renaming, so several processes may convert at once. The cache may
be deleted whenever no program runs.

A file's bytes are hashed again only if its inode, size or times differ (`file_state`). The times
include the time of change (ctime): tar, rsync and image layers keep size and modification time of
the file that they replace, but no program can set the time of change.
"""

import array
import contextlib
import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afmrl_jax.catalog.names import FIELD_NAMES, LONGEST
from afmrl_jax.catalog.sources import Source
from afmrl_jax.catalog.validation import (
    NOTHING,
    BadListing,
    CheckedListing,
    check_listing,
    identify,
)
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import whole_folder, write_atomically

# The version of the cache's contents; raise it with any change of this file or catalog/checking.py.
FORMAT = 2
BATCH_ROWS = 8192
BATCH_BYTES = 32 << 20
NAMED = 1000  # unread fields, and names of splits, that are counted separately
WATCHED_IMAGES = 100_000  # images whose state is checked each time a catalogue opens

LISTING_COLUMNS = pa.schema(
    [
        ("listing_id", pa.large_string()),  # large: dictionaries of ids may pass 2 GB
        ("product_id", pa.large_string()),
        ("title", pa.string()),
        ("description", pa.string()),
        ("category", pa.string()),
        ("attributes", pa.string()),  # JSON
        ("split", pa.string()),
        ("images", pa.list_(pa.string())),
        ("part", pa.int32()),
        ("number", pa.int64()),  # line, row or record of the listing in its part of the source
    ]
)
IMAGE_COLUMNS = pa.schema([("images", pa.list_(pa.large_binary()))])
log = logging.getLogger(__name__)


class BadListings:
    """Writes the bad listings of one pass to a file, and counts them by kind."""

    def __init__(self, path: Path, source: Source):
        self._file = path.open("w")
        self._source = source
        self.counts: Counter[str] = Counter()

    def add(self, listing_id: str | None, part: int, number: int, bad: BadListing) -> None:
        self.counts[bad.kind] += 1
        row = bad_row(self._source, listing_id, part, number, bad)
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class Readings:
    """Counts the good listings' fields that are not read, and values that are changed when read."""

    def __init__(self) -> None:
        self._unread: Counter[str] = Counter()  # field -> number of listings
        # Field -> [number of listings, an example as written, the same as read].
        self._cleaned: dict[str, list] = {}
        self._splits: dict[str, list] = {}  # split as written -> [number of listings, as read]
        self._without_split = 0

    def add(self, record: Mapping[str, Any], listing: CheckedListing) -> None:
        for name in record.keys() - FIELD_NAMES:
            if record[name] not in NOTHING:
                name = name[:LONGEST]
                if name in self._unread or len(self._unread) < NAMED:
                    self._unread[name] += 1
        self._without_split += listing.split is None
        for field in ("listing_id", "product_id", "split"):
            text, value = record.get(field), getattr(listing, field)
            if text == value or not value:
                continue
            text = text.decode() if isinstance(text, bytes) else text  # TFDS stores bytes
            if text == value:
                continue
            text, value = text[:LONGEST], value[:LONGEST]
            if field != "split":
                self._cleaned.setdefault(field, [0, text, value])[0] += 1
            elif text in self._splits or len(self._splits) < NAMED:
                self._splits.setdefault(text, [0, value])[0] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "unread": dict(self._unread.most_common()),
            "cleaned": self._cleaned,
            "splits_read": self._splits,
            "without_split": self._without_split,
        }


def bad_row(
    source: Source, listing_id: str | None, part: int, number: int, bad: BadListing
) -> dict[str, object]:
    """One line of bad_listings.jsonl."""
    return {
        "listing_id": listing_id,
        "file": str(source.root / source.parts[part]),
        "line": number,
        "kind": bad.kind,
        "problem": f"{source.place(part, number)}: {bad}",
    }


FileState = tuple[int, int, int, int]


def file_state(status: os.stat_result) -> FileState:
    """(inode, size in bytes, time of modification in ns, time of change in ns) of a file: at least
    one of them differs once the file was rewritten or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _source_state(source: Source) -> str:
    """A hash of the source files' names and states."""
    states = [(str(file), file_state(file.stat())) for file in source.files]
    return _hash_of([FORMAT, states])


def _source_content(source: Source, home: Path, state: str) -> str:
    """A hash of the source files' names and bytes. `home` keeps it for the files' state, so that
    unchanged files are hashed once."""
    remembered = home / f"{state}.content"
    if not remembered.exists():
        parts = [FORMAT]
        for path in source.files:
            with path.open("rb") as file:
                parts.append((path.name, hashlib.file_digest(file, "blake2b").hexdigest()))
        write_atomically(remembered, _hash_of(parts))
    return remembered.read_text()


def _hash_of(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def convert(source: Source, cache_dir: Path) -> Path:
    """The folder of the converted source; converts it now if the cache has no such folder."""
    path_hash = hashlib.blake2b(str(source.path).encode(), digest_size=6).hexdigest()
    home = cache_dir / f"{source.name}-{path_hash}"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {cache_dir} can't be written ({error.strerror}); name another folder"
        ) from None
    state = _source_state(source)
    folder = home / _source_content(source, home, state)
    if not folder.exists():
        log.info("%s: converting %s", source.name, source.path)
        with whole_folder(folder) as temporary:
            _convert_into(temporary, source)
            if _source_state(source) != state:
                raise UserError(f"{source.path} changed while it was read: start again")
    return folder


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def text_hash(title: str, description: str, category: str) -> int:
    """A 64-bit hash of a listing's text. Unicode's forms and the number of blanks do not matter."""
    texts = (
        " ".join(unicodedata.normalize("NFC", t).split()) for t in (title, description, category)
    )
    return hash_bytes("\0".join(texts).encode())


def _convert_into(folder: Path, source: Source) -> None:
    bad, readings = BadListings(folder / "bad.jsonl", source), Readings()
    content = hashlib.blake2b(digest_size=16)
    n_images, texts = 0, array.array("Q")
    with contextlib.closing(bad), _Writer(folder, source.stores_images) as writer:
        for listing, part, number in _good_records(source, bad, readings):
            text = "\0".join([*listing[:6], listing.split or "", *listing.image_names])
            content.update(text.encode() + b"\n")
            n_images += len(listing.image_names)
            texts.append(text_hash(listing.title, listing.description, listing.category))
            writer.add(listing, part, number)
            if writer.rows % 500_000 == 0:
                log.info("%s: %d listings read", source.name, writer.rows)
    np.save(folder / "texts.npy", np.array(texts, np.uint64))
    summary = {
        "content": content.hexdigest(),
        "n_rows": writer.rows,
        "n_images": n_images,
        "bad": bad.counts,
        "readings": readings.summary(),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "watched.json").write_text(json.dumps(_watched(folder, n_images)))


def _good_records(
    source: Source, bad: BadListings, readings: Readings
) -> Iterator[tuple[CheckedListing, int, int]]:
    for part, name in enumerate(source.parts):
        for number, record in source.read(name):
            try:
                if isinstance(record, BadListing):
                    raise record
                listing = check_listing(record)
                readings.add(record, listing)
                yield listing, part, number
            except BadListing as problem:
                bad.add(identify(record), part, number, problem)


def _watched(folder: Path, n_images: int) -> list[str]:
    """Names of image files whose state is checked whenever the catalogue opens.

    If there are more than WATCHED_IMAGES, at most that many are watched, spread evenly, and all
    images' folders too: a program that replaces a file by another (as tar and rsync do) changes the
    folder.
    """
    step = max(1, -(-n_images // WATCHED_IMAGES))
    names: list[str] = []
    folders: set[str] = set()
    n_seen = 0
    for batch in open_columns(folder / "listings.arrow").to_batches():
        flat = batch.column("images").flatten()
        names += [name for name in flat[-n_seen % step :: step].to_pylist() if name]
        if step > 1:
            folders.update(name.rpartition("/")[0] for name in flat.to_pylist() if name)
        n_seen += len(flat)
    return names + sorted(folders)


class _Writer:
    """Streams listings into Arrow IPC files in record batches of bounded size."""

    def __init__(self, folder: Path, stores_images: bool):
        self.rows = 0
        self._schemas = {"listings.arrow": LISTING_COLUMNS}
        if stores_images:
            self._schemas["images.arrow"] = IMAGE_COLUMNS
        self._writers = {
            name: pa.ipc.new_file(str(folder / name), schema)
            for name, schema in self._schemas.items()
        }
        self._clear()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def add(self, listing: CheckedListing, part: int, number: int) -> None:
        self.rows += 1
        self._listings.append((*listing[:7], listing.image_names, part, number))
        self._images.append((listing.image_bytes,))
        self._bytes += sum(map(len, listing[:6]))
        self._bytes += sum(len(data) for data in listing.image_bytes if data is not None)
        if len(self._listings) == BATCH_ROWS or self._bytes > BATCH_BYTES:
            self._flush()

    def _clear(self) -> None:
        self._listings: list[tuple] = []
        self._images: list[tuple] = []
        self._bytes = 0

    def _flush(self) -> None:
        if not self._listings:
            return
        for name, rows in (("listings.arrow", self._listings), ("images.arrow", self._images)):
            if name in self._writers:
                self._writers[name].write_batch(_to_batch(rows, self._schemas[name]))
        self._clear()


def _to_batch(rows: Iterable[tuple], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows)
    return pa.record_batch(
        [pa.array(column, dtype) for column, dtype in zip(columns, schema.types)], schema=schema
    )


def open_columns(path: Path) -> pa.Table:
    """An Arrow IPC file as a memory-mapped table."""
    return pa.ipc.open_file(pa.memory_map(os.fspath(path))).read_all()
