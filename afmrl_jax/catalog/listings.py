"""Catalogues: the listings that all programs read.

`open_catalog` opens the user's products; `catalog/synthetic.py` renders built-in ones. See
conversion.py and checking.py for the conversion, the checks and their cache.

Axes: N listings · P products.
"""

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from afmrl_jax.catalog.checking import (
    SharedProducts,
    check,
    describe_shared,
    split_of_product,
    watches_every_image,
)
from afmrl_jax.catalog.conversion import bad_row, convert, open_columns
from afmrl_jax.catalog.identity import Content
from afmrl_jax.catalog.names import SPLITS, may_hold_images, split_name
from afmrl_jax.catalog.sources import Source, find_source
from afmrl_jax.catalog.validation import BadListing, ImageFolder, quote, read_image
from afmrl_jax.core.errors import UserError

__all__ = [
    "ArrowCatalog",
    "Catalog",
    "Listing",
    "Overlay",
    "open_catalog",
    "split_name",
    "split_of_product",
]
REPORTED = 20  # bad listings that a report describes; the rest are only counted
SKIP_HINT = 'set data.on_bad_listing="skip"'
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """One offer of a product. Listings with the same product_id are the identical product."""

    listing_id: str
    product_id: str
    title: str
    description: str
    category: str
    attributes: dict[str, str]
    n_images: int
    split: str | None  # the source's split, as `split_name` reads it; None: `split_of_product`


class Catalog(Protocol):
    """The interface of every catalogue, real or rendered. Picklable, for worker processes."""

    name: str
    fingerprint: str  # hex digits that change if and only if a text or an image file changes
    products: np.ndarray  # int32[N]: each listing's product as a dense code 0..P-1

    def __len__(self) -> int: ...

    @property
    def identities(self) -> np.ndarray:
        """int32[N]: the number of the first listing that is the same; see identity.py."""

    @property
    def listing_ids(self) -> pa.Array:
        """large_string[N]."""

    @property
    def product_ids(self) -> pa.Array:
        """large_string[P], in the order of their codes."""

    def content(self, index: int) -> Content:
        """The hashes of the listing's text and photos."""

    def listing(self, index: int, draw: int = 0) -> Listing:
        """The listing's text. draw > 0 asks a rendered catalogue for a fresh rendering."""

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image | None:
        """The listing's image number `which`, RGB; None if the image is bad and is skipped."""

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split ("train", "validation", "test", "all"), ascending."""


def open_catalog(
    path: str | Path,
    *,
    cache_dir: str | Path,
    on_bad_listing: Literal["error", "skip"] = "error",
    report_dir: str | Path | None = None,
    workers: int | None = None,
) -> "ArrowCatalog":
    """Opens a catalogue; converts and checks it first if the cache does not have it.

    path: a folder with products.jsonl, products-*.jsonl, *.jsonl or the same in .parquet; one such
    file; the folder of a TFDS dataset in the array_record format, or "tfds:NAME[:VERSION]".
    on_bad_listing: "error" refuses a catalogue with any bad listing; "skip" leaves bad listings
    out and writes each to report_dir/bad_listings.jsonl. The same rule holds for an image that
    becomes unreadable later. workers: threads that decode images, by default one per core.
    Listings keep the source's order. Raises UserError with a report of the bad listings.
    """
    if on_bad_listing not in ("error", "skip"):
        raise UserError(f'data.on_bad_listing is {on_bad_listing!r}; write "error" or "skip"')
    source = find_source(path)
    workers = workers or os.cpu_count() or 1
    try:
        converted = convert(source, Path(cache_dir).expanduser().absolute())
        checked = check(source, converted, workers=workers)
        bad = sum(_bad_counts(converted, checked).values())
        if bad and on_bad_listing == "error" and not watches_every_image(converted):
            # An image that is not watched may have been mended since the last check, so a catalogue
            # is refused only after every image's state was checked again.
            checked = check(source, converted, workers=workers, anew=True)
    except OSError as error:  # a file that may not be read, a full disk
        raise UserError(
            f"{source.path} could not be converted into {cache_dir} ({error}); mend that and "
            "start again"
        ) from error
    report_path = Path(report_dir) / "bad_listings.jsonl" if report_dir else None
    catalog = ArrowCatalog(source, converted, checked, on_bad_listing, report_path)
    counts = _bad_counts(converted, checked)
    if counts:
        report = report_bad(source, [converted, checked], counts, len(catalog))
        if on_bad_listing == "error":
            raise UserError(report)
        if report_path:
            for folder in (converted, checked):
                with (folder / "bad.jsonl").open() as lines:
                    append_new(report_path, lines)
        log.warning("%s\nThey are left out.", report)
    if not len(catalog):
        left = ", none of its listings is good" if counts else ""
        raise UserError(
            f"the catalogue {source.path} is empty{left}; it needs at least one listing"
        )
    for level, notice in _notices(catalog, converted, checked):
        log.log(level, "%s: %s", catalog.name, notice)
    return catalog


def _notices(catalog: "ArrowCatalog", converted: Path, checked: Path) -> Iterator[tuple[int, str]]:
    """(log level, sentence) for everything in the source that is not read, or changed when read,
    and for splits that training or evaluation can't use as they are."""
    source = json.loads((converted / "summary.json").read_text())
    checks = json.loads((checked / "summary.json").read_text())
    readings, sizes = source["readings"], checks["split_sizes"]
    if unread := readings["unread"]:
        yield logging.INFO, f"fields that are not read: {_counted(unread)}"
    pictures = [quote(name) for name in unread if may_hold_images(name)]
    if pictures and not source["n_images"]:
        yield (
            logging.WARNING,
            f"no listing has an image, though {pictures[0]} may tell of some: put the files into "
            'the folder and name them in "images"',
        )
    for field, (count, text, value) in readings["cleaned"].items():
        yield (
            logging.WARNING,
            f"{field}s are read without blanks at their ends and invisible characters, as NFC: "
            f"in {_listings(count)} that changes them, as {quote(text)} to {quote(value)}",
        )
    n_twins, twins = checks["case_twins"]
    if n_twins:
        yield (
            logging.WARNING,
            f"{n_twins:,} product_ids differ by upper and lower case alone, as {quote(twins[0])} "
            f"and {quote(twins[1])}: they stay different products",
        )
    n_plain, plain = checks["one_coloured"]
    if n_plain:
        yield (
            logging.WARNING,
            f"{n_plain:,} images of the {source['n_images']:,} show one colour and nothing else, "
            f"as of listing {quote(plain[0])}",
        )
    renamed = {f"{text} = {value}": n for text, (n, value) in readings["splits_read"].items()}
    if renamed:
        yield logging.INFO, f"names of splits: {_counted(renamed)}"
    if 0 < (count := readings["without_split"]) < source["n_rows"]:
        yield (
            logging.WARNING,
            f"{_listings(count)} of {source['n_rows']:,} name no split: of their products 1 in 20 "
            "is validation, the rest train",
        )
    if others := {name: size for name, size in sizes.items() if name not in SPLITS and size}:
        yield (
            logging.WARNING,
            f"it has other splits, {_counted(others)}: nothing trains on them, nor is judged by "
            "them unless eval.query_split or eval.gallery_split names one",
        )
    if sizes["train"] and not sizes["validation"] + sizes.get("test", 0):
        yield (
            logging.WARNING,
            "it has no listing of validation or test, by which a model could be judged",
        )
    if shared := [SharedProducts(*row) for row in checks["shared_products"]]:
        yield (
            logging.WARNING,
            describe_shared(shared, lambda index: catalog.listing(index).product_id),
        )


def _listings(count: int) -> str:
    return f"{count:,} listing{'' if count == 1 else 's'}"


def _counted(counts: dict[str, int]) -> str:
    """A list of names with their numbers of listings; only the first REPORTED names are written."""
    named = [f"{quote(name)} ({_listings(count)})" for name, count in counts.items()]
    more = [f"{len(named) - REPORTED:,} more"] if len(named) > REPORTED else []
    return ", ".join(named[:REPORTED] + more)


def _bad_counts(*folders: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for folder in folders:
        counts.update(json.loads((folder / "summary.json").read_text())["bad"])
    return counts


def report_bad(source: Source, folders: Sequence[Path], counts: Counter[str], n_good: int) -> str:
    """A report of bad listings: the first REPORTED are described, and all are counted."""
    rows: list[dict[str, Any]] = []
    for folder in folders:
        with (folder / "bad.jsonl").open() as file:
            rows += [json.loads(line) for line, _ in zip(file, range(REPORTED))]
    places = {str(source.root / part): number for number, part in enumerate(source.parts)}
    rows.sort(key=lambda row: (places[row["file"]], row["line"]))
    n_bad = sum(counts.values())
    if n_bad == 1:
        return f"{rows[0]['problem']} or {SKIP_HINT}"
    lines = [f"{source.path}: {n_bad:,} of {n_bad + n_good:,} listings can't be used:"]
    lines += [f"  {row['problem']}" for row in rows[:REPORTED]]
    if n_bad > REPORTED:
        lines.append(f"  ... and {n_bad - REPORTED:,} more")
    kinds = ", ".join(f"{count:,} x {kind}" for kind, count in counts.most_common())
    return "\n".join([*lines, f"In all {kinds}. Mend them or {SKIP_HINT}."])


def append_new(report: Path, lines: Iterable[str]) -> None:
    """Adds the lines that the report does not have yet. It may have some, because runs resume, and
    because catalogues and processes share a report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one process reads and adds at a time
        file.seek(0)
        old = set(file)
        file.writelines(line for line in lines if line not in old)


class ArrowCatalog:
    """A converted catalogue, memory-mapped: see Catalog. `open_catalog` makes it."""

    def __init__(
        self,
        source: Source,
        converted: Path,
        checked: Path,
        on_bad_listing: str,
        report: Path | None,
    ):
        summary = json.loads((checked / "summary.json").read_text())
        self.name = source.name
        self.fingerprint: str = summary["fingerprint"]
        self._arguments = (source, converted, checked, on_bad_listing, report)
        self._source = source
        self._split_names: list[str] = summary["splits"]
        self._skip = on_bad_listing == "skip"
        self._report = report
        self._reported: set[int] = set()
        self._folder = ImageFolder(source.root)
        self._rows, self.products, self._splits = (
            np.load(checked / f"{name}.npy", mmap_mode="r")
            for name in ("kept", "products", "splits")
        )
        self._texts, self._photos, self._photo_starts = (
            np.load(checked / f"{name}.npy", mmap_mode="r")
            for name in ("texts", "photos", "photo_starts")
        )
        self._table = open_columns(converted / "listings.arrow")
        stored = converted / "images.arrow"
        self._stored = open_columns(stored)["images"] if source.stores_images else None

    def __reduce__(self):
        return type(self), self._arguments

    def __repr__(self) -> str:
        return f"ArrowCatalog({self.name!r}, {len(self)} listings, {self.fingerprint[:8]})"

    def __len__(self) -> int:
        return len(self._rows)

    def _get(self, column: str, index: int) -> Any:
        return self._table[column][int(self._rows[index])].as_py()

    @property
    def identities(self) -> np.ndarray:
        """int32[N]: no two listings of one catalogue have one id."""
        return np.arange(len(self), dtype=np.int32)

    @property
    def listing_ids(self) -> pa.Array:
        """large_string[N]."""
        return self._column("listing_id", self._rows)

    @property
    def product_ids(self) -> pa.Array:
        """large_string[P], in the order of their codes."""
        _, first = np.unique(self.products, return_index=True)
        return self._column("product_id", self._rows[first])

    def _column(self, name: str, rows: np.ndarray) -> pa.Array:
        return self._table[name].take(pa.array(rows)).combine_chunks()

    def content(self, index: int) -> Content:
        """The hashes of the listing's text and of its image files."""
        start, end = self._photo_starts[index : index + 2]
        photos = frozenset(map(int, self._photos[start:end]))
        return Content(int(self._texts[index]), photos)

    def listing(self, index: int, draw: int = 0) -> Listing:
        """The listing's text; `draw` is for rendered catalogues."""
        return Listing(
            listing_id=self._get("listing_id", index),
            product_id=self._get("product_id", index),
            title=self._get("title", index),
            description=self._get("description", index),
            category=self._get("category", index),
            attributes=json.loads(self._get("attributes", index)),
            n_images=len(self._table["images"][int(self._rows[index])]),
            split=self._get("split", index),
        )

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image | None:
        """The image, RGB, upright, transparency on white; `draw` is for rendered catalogues.

        An image that has become unreadable gives None if bad listings are skipped (the report then
        gets one line about it); otherwise it raises UserError. Raises IndexError if the listing has
        no image of this number.
        """
        name = self._get("images", index)[which]
        stored = self._stored[int(self._rows[index])][which].as_py() if self._stored else None
        try:
            return read_image(stored or self._folder.locate(name)[0], name)
        except BadListing as bad:
            listing_id, part, number = (
                self._get(c, index) for c in ("listing_id", "part", "number")
            )
            row = bad_row(self._source, listing_id, part, number, bad)
            if not self._skip:
                raise UserError(
                    f"{row['problem']} or {SKIP_HINT} (listing {listing_id!r}; the image was good "
                    "when the catalogue was opened)"
                ) from None
            if self._report and index not in self._reported:
                self._reported.add(index)
                append_new(self._report, [json.dumps(row) + "\n"])
            return None

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of a split's listings, ascending; "all" gives all listings.

        Raises UserError for a split that is neither one of the standard three nor in the source.
        """
        split = split_name(split)
        if split == "all":
            return np.arange(len(self), dtype=np.int64)
        if split not in self._split_names:
            if split == "test":
                return np.zeros(0, np.int64)
            known = ", ".join([*self._split_names, "all"])
            raise UserError(f"{self.name} has no split {split!r}; it has {known}")
        return np.flatnonzero(self._splits == self._split_names.index(split))


class Overlay:
    """A Catalog that forwards everything to another catalogue; subclasses override parts of it."""

    def __init__(self, catalog: Catalog, fingerprint: str):
        self._catalog, self.fingerprint = catalog, fingerprint

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._catalog!r}, {self.fingerprint[:8]})"

    def __len__(self) -> int:
        return len(self._catalog)

    @property
    def name(self) -> str:
        return self._catalog.name

    @property
    def products(self) -> np.ndarray:
        return self._catalog.products

    @property
    def identities(self) -> np.ndarray:
        return self._catalog.identities

    @property
    def listing_ids(self) -> pa.Array:
        return self._catalog.listing_ids

    @property
    def product_ids(self) -> pa.Array:
        return self._catalog.product_ids

    def content(self, index: int) -> Content:
        return self._catalog.content(index)

    def listing(self, index: int, draw: int = 0) -> Listing:
        return self._catalog.listing(index, draw)

    def image(self, index: int, which: int = 0, draw: int = 0) -> Image.Image | None:
        return self._catalog.image(index, which, draw)

    def indices(self, split: str) -> np.ndarray:
        return self._catalog.indices(split)
