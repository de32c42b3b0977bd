"""Attributes that somebody else wrote: a JSONL laid over a catalogue.

Each line is {"listing_id": ..., "attributes": {name: value}}, from any model or person
(`programs/annotate.py` writes one); other fields are ignored.

Axes: N listings of the catalogue · L good lines of the file.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.catalog import Catalog, Listing, Overlay, append_new, report_bad
from afmrl_jax.data.conversion import BATCH_ROWS, BadListings, new_folder, open_columns
from afmrl_jax.data.sources import Source, line_source
from afmrl_jax.data.validation import BadListing, check_annotation, identify, quote

FORMAT = 1  # of what the cache holds; raise it with any change of `_convert`
COLUMNS = pa.schema([("attributes", pa.large_string())])
log = logging.getLogger(__name__)


def open_attributes(
    catalog: Catalog,
    path: str | Path,
    *,
    cache_dir: str | Path,
    on_bad_listing: Literal["error", "skip"] = "error",
    report_dir: str | Path | None = None,
) -> "WithAttributes":
    """The catalogue with the attributes of a JSONL instead of its own.

    A listing without a line has no attributes: its own would pass for the writer's. Lines of no
    listing are counted and told. Bad lines, and second ones of a listing, follow on_bad_listing
    as in `open_catalog`. The file is read once for each of its contents and kept in the cache.
    Raises UserError, with a report of the bad lines, or where no line is of this catalogue.
    """
    source = line_source(path, "data.attributes")
    with source.path.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").hexdigest()
    key = f"{FORMAT} {catalog.fingerprint} {content}"
    fingerprint = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    cache = Path(cache_dir).expanduser().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"attributes-{fingerprint}"
    if not folder.exists():
        with new_folder(folder) as temporary:
            _convert(catalog, source, temporary)
    summary = json.loads((folder / "summary.json").read_text())
    if summary["bad"]:
        report = report_bad(source, [folder], summary["bad"], summary["lines"])
        if on_bad_listing == "error":
            raise UserError(report)
        if report_dir:
            with (folder / "bad.jsonl").open() as lines:
                append_new(Path(report_dir) / "bad_listings.jsonl", lines)
        log.warning("%s\nThey are left out.", report)
    if not summary["listings"]:
        raise UserError(
            f"{source.path} has attributes of none of the {len(catalog):,} listings of "
            f"{catalog.name} (as {catalog.listing(0).listing_id!r}): point data.attributes at a "
            "file that was written for this catalogue"
        )
    log.info(
        "%s: attributes of %d of %d listings from %s%s",
        catalog.name,
        summary["listings"],
        len(catalog),
        source.path,
        f"; {summary['unknown']} of its lines are of no listing" if summary["unknown"] else "",
    )
    return WithAttributes(catalog, folder)


class WithAttributes(Overlay):
    """A catalogue with other attributes. `open_attributes` makes it.

    Memory-mapped: beside the catalogue it holds nothing.
    """

    def __init__(self, catalog: Catalog, folder: Path):
        super().__init__(catalog, folder.name.removeprefix("attributes-"))
        self._folder = folder
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        self._attributes = open_columns(folder / "attributes.arrow")["attributes"]

    def __reduce__(self):
        return type(self), (self._catalog, self._folder)

    def listing(self, index: int, draw: int = 0) -> Listing:
        listing = super().listing(index, draw)
        row = int(self._rows[index])
        attributes = json.loads(self._attributes[row].as_py()) if row >= 0 else {}
        return dataclasses.replace(listing, attributes=attributes)


def _convert(catalog: Catalog, source: Source, folder: Path) -> None:
    """Writes attributes.arrow (L rows of JSON), rows.npy int32[N] (each listing's row, -1 where it
    has none), bad.jsonl and summary.json."""
    row_of: dict[str, int] = {}
    bad = BadListings(folder / "bad.jsonl", source)
    with (
        contextlib.closing(bad),
        pa.ipc.new_file(str(folder / "attributes.arrow"), COLUMNS) as writer,
    ):
        batch: list[str] = []
        for listing_id, attributes in _good_lines(source, bad):
            row_of[listing_id] = len(row_of)
            batch.append(attributes)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.record_batch([batch], schema=COLUMNS))
                batch = []
        writer.write_batch(pa.record_batch([batch], schema=COLUMNS))
    ids = (catalog.listing(index).listing_id for index in range(len(catalog)))
    rows = np.fromiter((row_of.get(i, -1) for i in ids), np.int32, len(catalog))
    np.save(folder / "rows.npy", rows)
    found = rows[rows >= 0]
    summary = {
        "lines": len(row_of),
        "listings": len(found),
        "unknown": len(row_of) - len(np.unique(found)),
        "bad": bad.counts,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def _good_lines(source: Source, bad: BadListings) -> Iterator[tuple[str, str]]:
    """(listing_id, attributes as JSON) of each good line, the first of each listing."""
    line_of: dict[str, int] = {}
    for number, record in source.read(source.parts[0]):
        try:
            if isinstance(record, BadListing):
                raise record
            listing_id, attributes = check_annotation(record)
            if listing_id in line_of:
                raise BadListing(
                    "duplicate listing_id",
                    f"listing_id {quote(listing_id)} stands already in line "
                    f"{line_of[listing_id]}; keep one of the two",
                )
            line_of[listing_id] = number
            yield listing_id, attributes
        except BadListing as problem:
            bad.add(identify(record), 0, number, problem)
