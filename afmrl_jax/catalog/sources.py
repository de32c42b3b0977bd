"""Where listings come from: folders of JSON lines, Parquet files, TFDS datasets.

A source yields its records in order, each with its number (from 1), as plain Python values; what
can't even be read as a record is yielded as the BadListing that says why.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afmrl_jax.catalog.names import FIELDS, similar_field
from afmrl_jax.catalog.validation import BadListing, quote, read_object
from afmrl_jax.core.errors import UserError

MAX_LINE_BYTES = 16 << 20
Record = tuple[int, dict[str, Any] | BadListing]


@dataclass(frozen=True)
class Source:
    """The files of one catalogue. `parts` are read in order, each by `read(part)`."""

    name: str
    path: Path  # what the user named
    root: Path  # image paths are relative to it
    files: tuple[Path, ...]  # what the cache's freshness hangs on
    parts: tuple[str, ...]
    unit: str  # what a record's number counts: "line", "row" or "record"
    stores_images: bool  # image bytes lie in the files themselves

    def read(self, part: str) -> Iterator[Record]:
        reader = {"line": _read_lines, "row": _read_rows, "record": _read_records}[self.unit]
        return reader(self, part)

    def place(self, part: int, number: int) -> str:
        """Where a record stands, for messages: "products.jsonl line 412"."""
        return f"{self.parts[part]} {self.unit} {number}"


def find_source(path: str | Path) -> Source:
    """The source at a path: a folder or file of JSON lines or Parquet, a TFDS dataset, tfds:NAME.

    Raises UserError where there is none, or two of them.
    """
    if str(path).startswith("tfds:"):
        return _tfds_source(_tfds_folder(str(path)[len("tfds:") :]))
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise UserError(f"there is no catalogue at {path}{_suggestion(path)}")
    if path.is_file():
        return _file_source(path, (path,))
    if (path / "dataset_info.json").exists() and (path / "features.json").exists():
        return _tfds_source(path)
    for pattern in ("products*", "*"):
        jsonl, parquet = (tuple(sorted(path.glob(pattern + end))) for end in (".jsonl", ".parquet"))
        if jsonl and parquet:
            raise UserError(
                f"{path} holds both {jsonl[0].name} and {parquet[0].name}; point data.path at "
                "one of them"
            )
        if jsonl or parquet:
            return _file_source(path, jsonl or parquet)
    raise UserError(
        f"{path} holds no catalogue: expected products.jsonl, products*.parquet or a TFDS dataset"
    )


def line_source(path: str | Path, field: str) -> Source:
    """One file of JSON lines that `field` of the configuration names. Raises UserError."""
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}{_suggestion(path, field)}")
    return Source(path.stem, path, path.parent, (path,), (path.name,), "line", False)


def _suggestion(path: Path, field: str = "data.path") -> str:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}?" if close else f"; check {field}"


def _file_source(path: Path, files: tuple[Path, ...]) -> Source:
    kind = files[0].suffix
    if kind not in (".jsonl", ".parquet"):
        raise UserError(f"{files[0]} is no catalogue: expected .jsonl or .parquet")
    return Source(
        name=path.name if path.is_dir() else path.stem,
        path=path,
        root=files[0].parent,
        files=files,
        parts=tuple(file.name for file in files),
        unit="line" if kind == ".jsonl" else "row",
        stores_images=kind == ".parquet",
    )


# ---- JSON lines


def _read_lines(source: Source, part: str) -> Iterator[Record]:
    with (source.root / part).open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield (
                    number,
                    BadListing(
                        "bad JSON",
                        f"is longer than {MAX_LINE_BYTES:,} bytes; write one listing a line",
                    ),
                )
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BadListing:
    try:
        value = json.loads(
            line.decode(), parse_constant=_refuse_constant, object_pairs_hook=read_object
        )
    except BadListing as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadListing(
            "bad UTF-8",
            f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); save the "
            "file as UTF-8",
        )
    except RecursionError:
        return BadListing("bad JSON", "is nested too deeply; a listing is one flat object")
    except json.JSONDecodeError as error:
        hint = "write one object a line" if line.strip() in b"[{" else "correct it"
        return BadListing("bad JSON", f"is not JSON ({error.msg} at column {error.colno}); {hint}")
    except ValueError as error:  # a number of thousands of digits, NaN
        return BadListing("bad JSON", f"is not JSON ({error}); correct it")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a bare value"
        return BadListing("bad JSON", f"is {kind}; write one JSON object a line")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# ---- Parquet


def _read_rows(source: Source, part: str) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(source.root / part) as file:
            _check_columns(file.schema_arrow, source.root / part)
            names = file.schema_arrow.names
            columns = [name for name in names if name in FIELDS or similar_field(name)]
            unread = dict.fromkeys(set(names).difference(columns), "not read")  # to be counted
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in _rows_of(batch):
                    number += 1
                    yield number, record if isinstance(record, BadListing) else unread | record
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{source.root / part} can't be read as Parquet after row {number} ({error}); write it "
            "again"
        ) from None


def _check_columns(schema: pa.Schema, file: Path) -> None:
    """Raises UserError where a column's type makes every row wrong."""
    for field in ("listing_id", "product_id"):
        if field not in schema.names:
            near = [quote(name) for name in schema.names if similar_field(name) == field]
            hint = f"; did you mean {near[0]}? Rename it to {field}" if near else ""
            raise UserError(f"{file} has no column {field}; it has {', '.join(schema.names)}{hint}")
    for field in schema.names:
        if field not in FIELDS:
            continue
        if schema.names.count(field) > 1:
            raise UserError(f"{file} has two columns {field}; keep one of the two")
        kind = schema.field(field).type
        if pa.types.is_struct(kind):
            parts = [part.name for part in kind]
            if twice := [name for name in parts if parts.count(name) > 1]:
                raise UserError(
                    f"{file}: column {field} names {quote(twice[0])} twice; keep one of the two"
                )
        if field in ("attributes", "images"):
            continue
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            raise UserError(f"{file}: column {field} is {kind}, expected string; cast it to string")


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadListing]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # nothing was yielded yet: to_pylist builds the whole list first
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield BadListing("bad UTF-8", "holds text that is not UTF-8; encode it as UTF-8")


# ---- TensorFlow datasets, read without TensorFlow


def _tfds_folder(name: str) -> Path:
    """The folder of a dataset already prepared: NAME or NAME:VERSION, by default the newest."""
    name, _, version = name.partition(":")
    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = Path(home).expanduser() / name
    versions = sorted(
        (entry.parent for entry in folder.glob(f"{version or '*'}/dataset_info.json")),
        key=lambda entry: [int(n) for n in entry.name.split(".") if n.isdigit()],
    )
    if not versions:
        raise UserError(
            f"there is no prepared TFDS dataset at {folder / (version or 'VERSION')}; prepare it "
            'with file_format="array_record", or set TFDS_DATA_DIR'
        )
    return versions[-1]


def _tfds_source(folder: Path) -> Source:
    info = json.loads((folder / "dataset_info.json").read_text())
    files = tuple(sorted(file for file in folder.iterdir() if file.is_file()))
    if not any(".array_record" in file.name for file in files):
        raise UserError(
            f"{folder} is not in the array_record format; prepare the dataset again with "
            'file_format="array_record"'
        )
    return Source(
        name=info["name"],
        path=folder,
        root=folder,
        files=files,
        parts=tuple(split["name"] for split in info.get("splits", ())),
        unit="record",
        stores_images=True,
    )


def _read_records(source: Source, part: str) -> Iterator[Record]:
    import tensorflow_datasets as tfds  # half a second that other sources need not pay
    from tensorflow_datasets.proto import tf_example_pb2

    # TFDS's own reader would decode every image here (without TensorFlow it can't skip that for a
    # sequence of images), so the records are taken as the protocol buffers that they are.
    number = 0
    try:
        records = tfds.builder_from_directory(str(source.root)).as_data_source(
            split=part, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        for number, data in enumerate(records, start=1):
            example = tf_example_pb2.Example.FromString(data)
            yield number, _example_record(example.features.feature, part)
    except Exception as error:  # array_record and protobuf raise many kinds for a broken file
        raise UserError(
            f"{source.root} can't be read as a TFDS dataset after record {number} of {part} "
            f"({type(error).__name__}: {error}); prepare it again"
        ) from None


def _example_record(features: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A tf.train.Example, whose nested features are keys with slashes, as a record."""
    record: dict[str, Any] = {"split": split, "attributes": {}}
    for key, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        field, _, attribute = key.partition("/")
        if field == "images":
            record["images"] = values
        elif attribute and field == "attributes":
            record["attributes"][attribute] = values[0] if values else None
        elif key in FIELDS and values:
            record[key] = values[0]
        elif field not in FIELDS:
            record[field] = values
    return record
