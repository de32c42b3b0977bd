"""Reads a catalogue's records from folders of JSON lines, Parquet files or TFDS datasets.

A source yields its records in order as plain Python values, each with its number (from 1). For a
record that can't be read it yields a BadListing that says why.
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
    path: Path  # the path or dataset that the user named
    root: Path  # the folder that image paths are relative to
    files: tuple[Path, ...]  # if one of them changes, the cache is outdated
    parts: tuple[str, ...]  # names of files, or of a TFDS dataset's splits
    unit: str  # "line", "row" or "record": the unit of a record's number
    stores_images: bool  # whether the files hold the images' bytes

    def read(self, part: str) -> Iterator[Record]:
        reader = {"line": _read_lines, "row": _read_rows, "record": _read_records}[self.unit]
        return reader(self, part)

    def place(self, part: int, number: int) -> str:
        """A record's place in the source, for messages: "products.jsonl line 412"."""
        return f"{self.parts[part]} {self.unit} {number}"


def find_source(path: str | Path) -> Source:
    """The source at a path: a folder or file of JSON lines or Parquet, a TFDS dataset, tfds:NAME.

    Raises UserError if there is no source, or if there are files of two formats.
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
    """The source of one file of JSON lines. field: the configuration field that names the file, for
    messages. Raises UserError if there is no such file."""
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
    suffix = files[0].suffix
    if suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{files[0]} is no catalogue: expected .jsonl or .parquet")
    return Source(
        name=path.name if path.is_dir() else path.stem,
        path=path,
        root=files[0].parent,
        files=files,
        parts=tuple(file.name for file in files),
        unit="line" if suffix == ".jsonl" else "row",
        stores_images=suffix == ".parquet",
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
        json_type = "a list" if isinstance(value, list) else "a bare value"
        return BadListing("bad JSON", f"is {json_type}; write one JSON object a line")
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
            # The other columns are not read; the records name them so that they are counted.
            unread = dict.fromkeys(set(names).difference(columns), "not read")
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
    """Raises UserError if a missing or repeated column, or a column's type, makes all rows bad."""
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
        dtype = schema.field(field).type
        if pa.types.is_struct(dtype):
            parts = [part.name for part in dtype]
            if twice := [name for name in parts if parts.count(name) > 1]:
                raise UserError(
                    f"{file}: column {field} names {quote(twice[0])} twice; keep one of the two"
                )
        if field in ("attributes", "images"):
            continue
        dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
        if pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype):
            raise UserError(
                f"{file}: column {field} is {dtype}, expected string; cast it to string"
            )


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadListing]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # no row was yielded yet, because to_pylist builds the whole list first
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield BadListing("bad UTF-8", "holds text that is not UTF-8; encode it as UTF-8")


# ---- TensorFlow datasets, read without TensorFlow


def _tfds_folder(name: str) -> Path:
    """The folder of a prepared dataset. name: NAME:VERSION, or NAME for the newest version."""
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
    import tensorflow_datasets as tfds  # here, because the import takes half a second
    from tensorflow_datasets.proto import tf_example_pb2

    # TFDS's reader would decode every image here (without TensorFlow it can't skip decoding for a
    # sequence of images), so the records are read as raw protocol buffers.
    number = 0
    try:
        records = tfds.builder_from_directory(str(source.root)).as_data_source(
            split=part, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        for number, data in enumerate(records, start=1):
            example = tf_example_pb2.Example.FromString(data)
            yield number, _example_record(example.features.feature, part)
    except Exception as error:  # array_record and protobuf raise many types for a broken file
        raise UserError(
            f"{source.root} can't be read as a TFDS dataset after record {number} of {part} "
            f"({type(error).__name__}: {error}); prepare it again"
        ) from None


def _example_record(features: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The record of a tf.train.Example, in which nested features have keys with slashes."""
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
