"""Replaces a catalogue's attributes by those of a JSONL file.

Each line is {"listing_id": ..., "attributes": {name: value}}, from any model or person. Lines of
`programs/annotate.py` also have "content", the `Content.key` of the listing that the model was
shown. It distinguishes listings with equal ids, and answers about an earlier state of a listing.
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

FORMAT = 3  # version of the cache's contents; raise it with any change of `_convert`
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
    """The catalogue with its attributes replaced by those of a JSONL file.

    A listing without a line has no attributes: the catalogue's attributes would be mistaken for the
    file's. A line with a content belongs to the listing of that id and content. If only one listing
    has the id, it is enough that its text or its photos are still those of the line's content.
    Lines that belong to no listing, and lines about an earlier state of a listing, are counted and
    logged. Bad lines, and second lines of the same listing and content, follow on_bad_listing as in
    `open_catalog`. The cache keeps the converted file by a hash of its bytes.

    Raises UserError with a report of the bad lines; if no line belongs to this catalogue; or if a
    line without content has an id that several listings have.
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
    _log_coverage(catalog, source, summary)
    return WithAttributes(catalog, folder)


def _log_coverage(catalog: Catalog, source: Source, summary: dict[str, Any]) -> None:
    """Logs how many listings and lines were matched. Raises UserError if no line was, or if a line
    fits several listings."""
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
    """A catalogue with replaced attributes, made by `open_attributes`.

    The attributes are memory-mapped, so it takes no more memory than the catalogue.
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
    """A good line of the file."""

    row: int  # its number among the good lines
    content: str  # the `Content.key` that it names; "" if none


def _convert(catalog: Catalog, source: Source, folder: Path) -> None:
    """Writes attributes.arrow (L rows of JSON), rows.npy int32[N] (each listing's row of it, -1 for
    none), bad.jsonl and summary.json."""
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
    """Each listing's row of the file, int32[N] (-1 for none), and counts of lines and listings."""
    ids = catalog.listing_ids.to_pylist()
    is_first = catalog.identities == np.arange(len(ids))
    # listing_id -> number of different listings with it; only ids of the file.
    listings_of = Counter(i for i, first in zip(ids, is_first) if first and i in lines)
    rows = np.full(len(ids), -1, np.int32)
    changed, ambiguous = 0, {}
    for index, listing_id in enumerate(ids):
        for line in reversed(lines.get(listing_id, ())):  # the last matching answer counts
            is_unique = listings_of[listing_id] == 1
            if not line.content:
                if not is_unique:
                    ambiguous[listing_id] = None
                rows[index] = line.row
                break
            match = match_keys(line.content, catalog.content(index).key)
            if match == "whole" or (is_unique and match == "part"):
                rows[index] = line.row
                changed += match == "part"
                break
    used = set(rows.tolist())
    known_lines = [line for listing_id in listings_of for line in lines[listing_id]]
    return rows, {
        "listings": int((rows >= 0).sum()),
        "changed": changed,
        "outdated": sum(line.row not in used for line in known_lines),
        "unknown": sum(len(id_lines) for i, id_lines in lines.items() if i not in listings_of),
        "ambiguous": list(ambiguous),
    }


def _good_lines(source: Source, bad: BadListings) -> Iterator[tuple[str, str, str]]:
    """(listing_id, content or "", attributes as JSON) of each good line. Only the first line of a
    listing and content is good."""
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
