"""Finds the good listings among a converted catalogue's rows: drops duplicates, checks images.

A catalogue's fingerprint, and its listings' `texts` and `photos`, are hashes of whole texts and
whole image files: no byte is left out. A file is read again only if its state
(`conversion.file_state`) differs from the state in which it was read.

Axes: R rows of the converted source · N good listings among them · I images of a batch of rows · J
images of all good listings.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afmrl_jax.catalog.conversion import (
    FORMAT,
    WATCHED_IMAGES,
    BadListings,
    FileState,
    file_state,
    hash_bytes,
    open_columns,
)
from afmrl_jax.catalog.names import SPLITS
from afmrl_jax.catalog.sources import Source
from afmrl_jax.catalog.validation import BadListing, ImageFolder, quote, read_image
from afmrl_jax.core.files import whole_folder, write_atomically
from afmrl_jax.core.pixels import is_one_colour

X, Y = TypeVar("X"), TypeVar("Y")
FULLY_DECODED = 100_000  # images; of a larger catalogue's other images only the header is read
log = logging.getLogger(__name__)


def split_of_product(product_id: str) -> str:
    """The split of a product whose listings name none: 1 in 20 is validation, the rest train."""
    digest = hashlib.sha256(product_id.encode()).hexdigest()
    return "validation" if int(digest, 16) % 20 == 0 else "train"


class SharedProducts(NamedTuple):
    """Products that have listings in two splits."""

    held_out: str  # the split that should share nothing
    other: str  # the split that it shares products with
    products: int  # number of products in both splits
    of: int  # number of products in the held-out split
    listings: int  # number of the held-out split's listings of shared products
    example: int  # index of one of these listings


def shared_products(
    products: np.ndarray, listings: Mapping[str, np.ndarray]
) -> list[SharedProducts]:
    """The pairs of splits that share products: validation or test with train, test with validation.

    products: int32[N], codes 0..P-1. listings: split -> indices of its listings; a split that is
    left out is empty.
    """
    n_products = int(products.max(initial=-1)) + 1
    inside = {split: np.zeros(n_products, bool) for split in SPLITS}
    for split, mask in inside.items():
        mask[products[listings.get(split, [])]] = True
    shared = []
    for held_out, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        both = inside[held_out] & inside[other]
        if both.any():
            rows = listings[held_out][both[products[listings[held_out]]]]
            counts = int(both.sum()), int(inside[held_out].sum()), len(rows), int(rows[0])
            shared.append(SharedProducts(held_out, other, *counts))
    return shared


def describe_shared(shared: Sequence[SharedProducts], product_id: Callable[[int], str]) -> str:
    """A message that describes shared products, what they mean, and what to do.

    shared: the result of `shared_products`. product_id: maps a listing's index to its product_id.
    """
    counts = [
        f"{s.products:,} of the {s.of:,} products of {s.held_out} are in {s.other} as well (with "
        f"{s.listings:,} listings of {s.held_out}, as {quote(product_id(s.example))})"
        for s in shared
    ]
    return (
        f"{'; '.join(counts)}. Scores there are of products that the model was trained or chosen "
        'by: give all listings of a product one split, or leave "split" out and products are '
        "divided whole. Leave it so only where known products are to be found again"
    )


def check(source: Source, converted: Path, *, workers: int, anew: bool = False) -> Path:
    """Checks a converted source; returns the folder that lists its good listings.

    The folder holds kept.npy int32[N] (rows), products.npy int32[N], splits.npy int32[N], texts.npy
    uint64[N] (a hash of each listing's text, see `text_hash`), photos.npy uint64[J] (a hash of each
    image file), photo_starts.npy int64[N + 1] (the index in photos.npy of each listing's first),
    bad.jsonl and summary.json. Threads read and decode the images whose state the cache does not
    know. anew=True looks at every image's state; otherwise only the watched images are looked at.
    """
    with ThreadPoolExecutor(workers) as pool:
        state = _images_state(source, converted, pool)
        folder = converted / state
        if folder.exists() and not anew:
            return folder
        with whole_folder(folder) as temporary:
            _check_into(temporary, source, converted, pool)
            if anew:
                shutil.rmtree(folder, ignore_errors=True)
    return folder


def watches_every_image(converted: Path) -> bool:
    """Whether opening the catalogue notices a change of any of its image files."""
    return json.loads((converted / "summary.json").read_text())["n_images"] <= WATCHED_IMAGES


def _images_state(source: Source, converted: Path, pool: Executor) -> str:
    """A hash of the watched images' states."""
    names = json.loads((converted / "watched.json").read_text())
    stats = _in_chunks(pool, functools.partial(_stat, source.root), names)
    return "images-" + hashlib.blake2b(np.array(stats, np.int64).tobytes()).hexdigest()[:24]


def _stat(root: Path, name: str) -> FileState:
    try:
        return file_state(os.stat(f"{root}/{name}"))  # noqa: PTH116 (100,000 Paths take a second)
    except (OSError, ValueError):
        return -1, -1, -1, -1


def _in_chunks(
    pool: Executor, function: Callable[[X], Y], items: list[X], size: int = 64
) -> list[Y]:
    """[function(item) for item in items]; each task of the pool takes `size` items."""
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    return [y for ys in pool.map(lambda chunk: [function(x) for x in chunk], chunks) for y in ys]


def _check_into(folder: Path, source: Source, converted: Path, pool: Executor) -> None:
    summary = json.loads((converted / "summary.json").read_text())
    table = open_columns(converted / "listings.arrow")
    content = hashlib.blake2b(summary["content"].encode(), digest_size=16)
    bad = BadListings(folder / "bad.jsonl", source)
    good = np.ones(len(table), bool)
    with contextlib.closing(bad):
        for row, problem in _duplicates(table, source):
            good[row] = False
            bad.add(*_origin(table, row), problem)
        log.info("%s: looking at %d images", source.name, summary["n_images"])
        images = _ImageCheck(source, converted, table, summary["n_images"], pool)
        for row, problem in images.problems():
            if good[row]:
                good[row] = False
                bad.add(*_origin(table, row), problem)
        images.remember()
    kept = np.flatnonzero(good).astype(np.int32)
    products, splits, names = _codes(table, kept)
    photos, photo_starts = images.of_rows(kept)
    arrays = {
        "kept": kept,
        "products": products,
        "splits": splits,
        "texts": np.load(converted / "texts.npy")[kept],
        "photos": photos,
        "photo_starts": photo_starts,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    content.update(kept.tobytes() + photos.tobytes())
    one_coloured = [row for row in images.one_coloured if good[row]]
    sizes = np.bincount(splits, minlength=len(names)).tolist()
    listings = {s: np.flatnonzero(splits == names.index(s)) for s in SPLITS if s in names}
    summary = {
        "fingerprint": content.hexdigest(),
        "splits": names,
        "bad": bad.counts,
        "split_sizes": dict(zip(names, sizes)),
        "shared_products": shared_products(products, listings),
        "case_twins": _case_twins(table),
        "one_coloured": [len(one_coloured), [_origin(table, row)[0] for row in one_coloured[:1]]],
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def _origin(table: pa.Table, row: int) -> tuple[str, int, int]:
    return tuple(table[name][row].as_py() for name in ("listing_id", "part", "number"))


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(int32[R] codes in order of first appearance, the value of each code). Null is -1."""
    encoded = column.dictionary_encode()
    if not encoded.num_chunks:
        return np.zeros(0, np.int32), pa.array([], column.type)
    codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks]
    return np.concatenate(codes), encoded.chunk(encoded.num_chunks - 1).dictionary


def _duplicates(table: pa.Table, source: Source) -> Iterator[tuple[int, BadListing]]:
    """The rows whose listing_id an earlier row already has."""
    codes, _ = _encode(table["listing_id"])
    _, first = np.unique(codes, return_index=True)
    repeated = np.ones(len(codes), bool)
    repeated[first] = False
    for row in np.flatnonzero(repeated):
        listing_id, part, number = _origin(table, first[codes[row]])
        yield (
            int(row),
            BadListing(
                "duplicate listing_id",
                f"listing_id {quote(listing_id)} stands already at {source.place(part, number)}; "
                "give each listing its own",
            ),
        )


def _codes(table: pa.Table, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The good listings' products int32[N], their splits int32[N], and the splits' names."""
    products, product_ids = _encode(table["product_id"])
    row_codes, values = _encode(table["split"])
    names = sorted({*values.to_pylist(), "train", "validation"})
    code_of = {name: code for code, name in enumerate(names)}
    codes = [code_of[value] for value in values.to_pylist()]
    splits = np.array([*codes, -1], np.int32)[row_codes]  # -1: the listing names no split
    if (splits < 0).any():
        rule = [code_of[split_of_product(str(product))] for product in product_ids]
        splits = np.where(splits < 0, np.array(rule, np.int32)[products], splits)
    _, first, dense = np.unique(products[kept], return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int32)  # dense code -> code in the order of the good listings
    order[np.argsort(first)] = np.arange(len(first))
    return order[dense], splits[kept], names


def _case_twins(table: pa.Table) -> tuple[int, list[str]]:
    """The number of product_ids that differ from another only in case, and an example of two."""
    ids = pc.unique(table["product_id"])
    lower = pc.utf8_lower(ids)
    counts = pc.value_counts(lower)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    examples = ids.filter(pc.equal(lower, twice[0])).to_pylist()[:2] if len(twice) else []
    return pc.sum(pc.is_in(lower, twice)).as_py() or 0, examples


class _ImageCheck:
    """Checks every image of a converted catalogue; remembers the good images between runs.

    The memory has one row per good image, uint64[n, 2]: a key and a hash of the file's bytes. The
    key is a 64-bit hash of the file's name and state, or of its bytes if the source stores them.
    The key's last two bits are flags: bit 0, the image was decoded (else only its header was read);
    bit 1, it shows a single colour.
    """

    def __init__(
        self, source: Source, converted: Path, table: pa.Table, n_images: int, pool: Executor
    ):
        self._folder = ImageFolder(source.root)
        self._table = table
        stored = converted / "images.arrow"
        self._stored = open_columns(stored) if source.stores_images else None
        self._decode_each = max(1, -(-n_images // FULLY_DECODED))
        self._pool = pool
        self._memory = converted.parent / f"good_images-{FORMAT}.npy"
        exists = self._memory.exists()
        self._known = np.load(self._memory) if exists else np.zeros((0, 2), np.uint64)
        self._good: list[np.ndarray] = []  # rows of the memory, uint64[n, 2] each
        self._photos: list[np.ndarray] = []  # hashes of the bytes of all images, in order
        self.one_coloured: list[int] = []  # rows with a decoded image of one colour

    def problems(self) -> Iterator[tuple[int, BadListing]]:
        """(row, problem) of every image that can't be used."""
        start = 0
        batches = self._table.to_batches()
        stored = self._stored.to_batches() if self._stored else [None] * len(batches)
        for batch, stored_batch in zip(batches, stored):
            images = batch.column("images")
            rows = start + np.repeat(np.arange(len(batch)), images.value_lengths())
            names = images.flatten().to_pylist()
            data = stored_batch.column("images").flatten() if stored_batch else [None] * len(names)
            looks = _in_chunks(self._pool, self._look, list(zip(names, data)))
            for row, (key, _, problem) in zip(rows.tolist(), looks):
                if problem:
                    yield row, problem
                elif key & 3 == 3:
                    self.one_coloured.append(row)
            good = [(key, photo) for key, photo, problem in looks if not problem]
            self._good.append(np.array(good, np.uint64).reshape(-1, 2))
            self._photos.append(np.array([photo for _, photo, _ in looks], np.uint64))
            start += len(batch)

    def of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of some rows' images, uint64[J], and each row's first index in them,
        int64[N + 1].

        rows: int32[N], ascending. Call it only after the iterator `problems` has ended.
        """
        lengths = pc.list_value_length(self._table["images"]).to_numpy()
        photos = np.concatenate([np.zeros(0, np.uint64), *self._photos])
        in_rows = np.zeros(len(lengths), bool)
        in_rows[rows] = True
        return photos[np.repeat(in_rows, lengths)], np.cumsum([0, *lengths[rows]], dtype=np.int64)

    def remember(self) -> None:
        """Writes the memory of good images for the next run."""
        good = np.unique(np.concatenate([np.zeros((0, 2), np.uint64), *self._good]), axis=0)
        write_atomically(self._memory, good)

    def _look(self, image: tuple[str, pa.Scalar | None]) -> tuple[int, int, BadListing | None]:
        """(key, hash of its bytes, problem) of one image; see the class for the key."""
        name, scalar = image
        data = scalar.as_py() if scalar is not None else None
        try:
            if data is None:
                path, status = self._folder.locate(name)
                key = hash_bytes(json.dumps([name, file_state(status)]).encode())
            else:
                path, key = data, hash_bytes(data)
            photo = None if data is None else key
            decode = (key >> 2) % self._decode_each == 0
            key &= ~3
            for flagged in (key | 1, key | 3) if decode else (key | 1, key | 3, key):
                if (known_photo := self._known_photo(flagged)) is not None:
                    return flagged, known_photo, None
            image = read_image(path, name, decode=decode)
            photo = _hash_of_file(path) if photo is None else photo
        except BadListing as problem:
            return 0, 0, problem
        return key if image is None else key | 1 | 2 * is_one_colour(image), photo, None

    def _known_photo(self, key: int) -> int | None:
        """The hash of an image's bytes if the memory has its key."""
        keys = self._known[:, 0]
        row = np.searchsorted(keys, np.uint64(key))
        return int(self._known[row, 1]) if row < len(keys) and int(keys[row]) == key else None


def _hash_of_file(path: str) -> int:
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    return int.from_bytes(digest.digest())
