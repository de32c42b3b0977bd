"""Attributes that somebody else wrote: a JSONL laid over a catalogue.

Each line is {"listing_id": ..., "attributes": {name: value}}, from any model or person. Lines of
`programs/annotate.py` have "content" as well, the `Content.key` of the listing that the model was
shown: it tells listings of equal ids apart, and old answers from those to the listing of today.
Other fields are ignored.

Axes: N listings of the catalogue · L good lines of the file.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from afmrl_jax.catalog.conversion import BATCH_ROWS, BadListings, open_columns
from afmrl_jax.catalog.identity import match_keys
from afmrl_jax.catalog.listings import Catalog, Listing, Overlay, append_new, report_bad
from afmrl_jax.catalog.sources import Source, line_source
from afmrl_jax.catalog.validation import BadListing, check_annotation, identify, quote
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import whole_folder

FORMAT = 3  # of what the cache holds; raise it with any change of `_convert`
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

    A listing without a line has no attributes: its own would pass for the writer's. A line that
    names a content goes to the listing of that id and content; where only one listing has the id,
    its text or its photos, whichever it has, must still be those of the line. Lines of no listing,
    and of what a listing was before it changed, are counted and told. Bad lines, and second ones of
    one listing and content, follow on_bad_listing as in `open_catalog`. The file is read once for
    each of its contents and kept in the cache. Raises UserError, with a report of the bad lines,
    where no line is of this catalogue, or where a line without content has an id of several
    listings.
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
        with whole_folder(folder) as temporary:
            _convert(catalog, source, temporary)
    summary = json.loads((folder / "summary.json").read_text())
    if summary["bad"]:
        report = report_bad(source, [folder], Counter(summary["bad"]), summary["lines"])
        if on_bad_listing == "error":
            raise UserError(report)
        if report_dir:
            with (folder / "bad.jsonl").open() as lines:
                append_new(Path(report_dir) / "bad_listings.jsonl", lines)
        log.warning("%s\nThey are left out.", report)
    _tell(catalog, source, summary)
    return WithAttributes(catalog, folder)


def _tell(catalog: Catalog, source: Source, summary: dict[str, Any]) -> None:
    """What of a file was laid over the catalogue. Raises UserError where that is nothing, or not
    certain."""
    if summary["ambiguous"]:
        example = summary["ambiguous"][0]
        raise UserError(
            f"{len(summary['ambiguous']):,} listing_ids of {source.path} name several listings of "
            f"{catalog.name} (as {example!r}), and their lines do not say which: give each listing "
            "an id of its own, or let annotate write the file for these catalogues together"
        )
    counts = {name: summary[name] for name in ("listings", "unknown", "outdated", "changed")}
    if not counts["listings"]:
        raise UserError(
            f"{source.path} has attributes of none of the {len(catalog):,} listings of "
            f"{catalog.name} (as {catalog.listing(0).listing_id!r}"
            + (
                f"; {counts['outdated']:,} lines have their ids, but were written for others"
                if counts["outdated"]
                else ""
            )
            + "): point data.attributes at a file that was written for this catalogue"
        )
    parts = [
        f"{catalog.name}: attributes of {counts['listings']:,} of {len(catalog):,} listings from "
        f"{source.path}"
    ]
    if counts["unknown"]:
        parts.append(f"{counts['unknown']:,} of its lines are of no listing")
    if counts["outdated"]:
        parts.append(
            f"{counts['outdated']:,} lines were written for other texts and photos under the same "
            "listing_id and are left out"
        )
    if counts["changed"]:
        parts.append(
            f"{counts['changed']:,} listings have other photos, or another text, than when they "
            "were described"
        )
    odd = counts["outdated"] or counts["changed"]
    log.log(logging.WARNING if odd else logging.INFO, "; ".join(parts))


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


class _Line(NamedTuple):
    """A good line of the file: its row among these, and the content that it names, if any."""

    row: int
    content: str


def _convert(catalog: Catalog, source: Source, folder: Path) -> None:
    """Writes attributes.arrow (L rows of JSON), rows.npy int32[N] (each listing's row, -1 where it
    has none), bad.jsonl and summary.json."""
    lines: dict[str, list[_Line]] = {}
    count = 0
    bad = BadListings(folder / "bad.jsonl", source)
    with (
        contextlib.closing(bad),
        pa.ipc.new_file(str(folder / "attributes.arrow"), COLUMNS) as writer,
    ):
        batch: list[str] = []
        for listing_id, content, attributes in _good_lines(source, bad):
            lines.setdefault(listing_id, []).append(_Line(count, content))
            count += 1
            batch.append(attributes)
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.record_batch([batch], schema=COLUMNS))
                batch = []
        writer.write_batch(pa.record_batch([batch], schema=COLUMNS))
    rows, summary = _assign(catalog, lines)
    np.save(folder / "rows.npy", rows)
    summary |= {"lines": count, "bad": bad.counts}
    (folder / "summary.json").write_text(json.dumps(summary))


def _assign(catalog: Catalog, lines: dict[str, list[_Line]]) -> tuple[np.ndarray, dict[str, Any]]:
    """Each listing's row, int32[N], -1 where it has none, and what came of the lines."""
    ids = catalog.listing_ids.to_pylist()
    first_only = catalog.identities == np.arange(len(ids))
    listings_of = Counter(i for i, first in zip(ids, first_only) if first and i in lines)
    rows = np.full(len(ids), -1, np.int32)
    changed, ambiguous = 0, {}
    for index, listing_id in enumerate(ids):
        for line in reversed(lines.get(listing_id, ())):  # of several, the last answer
            alone = listings_of[listing_id] == 1
            if not line.content:
                if not alone:
                    ambiguous[listing_id] = None
                rows[index] = line.row
                break
            match = match_keys(line.content, catalog.content(index).key)
            if match == "whole" or (alone and match == "part"):
                rows[index] = line.row
                changed += match == "part"
                break
    used = set(rows.tolist())
    waiting = [line for listing_id in listings_of for line in lines[listing_id]]
    return rows, {
        "listings": int((rows >= 0).sum()),
        "changed": changed,
        "outdated": sum(line.row not in used for line in waiting),
        "unknown": sum(len(of_id) for i, of_id in lines.items() if i not in listings_of),
        "ambiguous": list(ambiguous),
    }


def _good_lines(source: Source, bad: BadListings) -> Iterator[tuple[str, str, str]]:
    """(listing_id, content or "", attributes as JSON) of each good line, the first of each listing
    and content."""
    line_of: dict[tuple[str, str], int] = {}
    for number, record in source.read(source.parts[0]):
        try:
            if isinstance(record, BadListing):
                raise record
            listing_id, attributes = check_annotation(record)
            content = record.get("content") or ""
            if not isinstance(content, str):
                raise BadListing("wrong type", "content is no string; leave it out")
            first = line_of.setdefault((listing_id, content), number)
            if first != number:
                raise BadListing(
                    "duplicate listing_id",
                    f"listing_id {quote(listing_id)} stands already in line {first}; keep one of "
                    "the two",
                )
            yield listing_id, content, attributes
        except BadListing as problem:
            bad.add(identify(record), 0, number, problem)
