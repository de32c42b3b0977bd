"""One safetensors file: its tensors memory-mapped in, or streamed out one at a time.

The format (https://huggingface.co/docs/safetensors): the header's length as a little-endian u64,
the header as JSON of name -> dtype, shape and place, the bytes. The library `safetensors` (0.8.0)
writes a file only from all of its tensors at once, and keeps what it read in memory until the file
is closed: of a file of 480 MB read by halves 370 MB, of which this keeps 10.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from afmrl_jax.core.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """One tensor of a mapped file."""

    name: str
    file: mmap.mmap
    start: int  # bytes from the file's beginning
    stop: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The numbers, read as they are touched."""
        data = np.frombuffer(self.file, np.uint8, self.stop - self.start, self.start)
        return data.view(self.dtype).reshape(self.shape)

    def release(self) -> None:
        """Gives back the memory of the pages read; touching them again reads them again."""
        start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.madvise(mmap.MADV_DONTNEED, start, self.stop - start)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises UserError where it is missing, foreign or cut off."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        raise UserError(
            f"{path}: not found or empty; expected the weights of a Hugging Face checkpoint"
        ) from None
    if data[:24] == b"version https://git-lfs.":
        raise UserError(f"{path}: a Git LFS pointer instead of the weights; run `git lfs pull`")
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise UserError(
            f"{path}: not a whole safetensors file: its first 8 bytes promise a header of "
            f"{start - 8} bytes, and it has {len(data)} in all; download it again"
        )
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: _tensor(name, entry, data, start) for name, entry in header.items()}
    except _Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(
            f"{path}: not a safetensors file: its header is no table of tensors; download it again"
        ) from None


class _Unreadable(Exception):
    """What a header says of a tensor is not so, or not for us."""


def _tensor(name: str, entry: Mapping[str, Any], data: mmap.mmap, start: int) -> Tensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    code = entry["dtype"]
    if code not in DTYPES:
        raise _Unreadable(
            f"{name} has dtype {code}, and only {', '.join(DTYPES)} are read; use the checkpoint "
            "that is not quantised"
        )
    if not 0 <= begin <= end <= len(data) - start:
        raise _Unreadable(
            f"not a whole safetensors file: {name} should lie at bytes {start + begin} to "
            f"{start + end}, and the file has {len(data)}; download it again"
        )
    dtype = DTYPES[code]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise _Unreadable(
            f"not a safetensors file: {name} has {end - begin} bytes, which {code} "
            f"{list(shape)} does not; download it again"
        )
    return Tensor(name, data, start + begin, start + end, dtype, shape)


def write_file(
    path: Path,
    header: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes a file of the header's names, dtypes and shapes, and the tensors in its order."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for name, (dtype, shape) in header.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": codes[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
