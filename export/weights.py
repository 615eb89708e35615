"""Safetensors files, read and written in bounded pieces: the header parser, `pread`, a streaming writer.

Contract: `read_header` checks everything the format promises (sizes, offsets, no overlap, no hole) before
a byte of data is used, and names file and tensor in a `UserError` otherwise. Data moves in pieces of at
most 16 MiB by plain reads, never through a memory map, so that peak memory does not grow with the file.

    python -m export.weights model.safetensors
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from export.cli import run
from export.errors import UserError

PIECE = 16 << 20  # bytes in memory at a time
ALIGNMENT = 256  # bytes, which TensorRT asks of what it is given
_MAX_HEADER = 100_000_000  # the format's own limit

# Safetensors dtype -> (bytes per element, torch dtype). Types beyond these are not in any supported layout.
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "BOOL": (1, torch.bool),
    "U8": (1, torch.uint8),
    "I8": (1, torch.int8),
    "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2),
    "F8_E8M0": (1, torch.float8_e8m0fnu),
    "I16": (2, torch.int16),
    "U16": (2, torch.uint16),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I32": (4, torch.int32),
    "U32": (4, torch.uint32),
    "F32": (4, torch.float32),
    "I64": (8, torch.int64),
    "U64": (8, torch.uint64),
    "F64": (8, torch.float64),
}


class Entry(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # absolute, in bytes
    length: int


class Run(NamedTuple):
    """Bytes of a source file, copied as they are."""

    path: Path
    offset: int
    length: int


class Scalar(NamedTuple):
    """One float of a source file, converted to F32; the reciprocal of it where a layout stores 1 / scale."""

    path: Path
    name: str
    dtype: str
    offset: int
    reciprocal: bool


class Output(NamedTuple):
    """One tensor to write: the parts follow each other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[Run | Scalar]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


class Reader:
    """Open source files, for `pread`; close it (a context manager) when done."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; a shorter file or a failing disk is a UserError."""
        try:
            if path not in self._files:
                self._files[path] = _open(path)
                self._stack.callback(os.close, self._files[path])
            pieces = []
            while length:
                piece = os.pread(self._files[path], length, offset)
                if not piece:
                    raise UserError(f"{path}: ends at byte {offset}, amid a tensor; download it again")
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _open(path: Path) -> int:
    """A descriptor of a regular file; a FIFO or a device must not hang the export."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path}: not a regular file; put the checkpoint's file there")
    return file


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of its data."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download it again") from None
    with Reader() as reader:
        if size < 8:
            raise UserError(f"{path}: truncated: {size} bytes, less than a header; download it again")
        (length,) = struct.unpack("<Q", reader.read(path, 0, 8))
        if length > min(_MAX_HEADER, size - 8):
            raise UserError(
                f"{path}: truncated or corrupt: the header claims {length} bytes in a file of {size}; download it again"
            )
        raw = reader.read(path, 8, length)
    document = _parse(path, raw)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in document.items()}
    return _check_offsets(path, entries, 8 + length, size)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """The header without its metadata: name -> dtype, shape and offsets, not yet checked."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} appears twice")
            values[name] = value
        return values

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: corrupt header: not JSON ({error}); download it again") from None
    if not isinstance(document, dict) or not raw.startswith(b"{"):
        raise UserError(f"{path}: corrupt header: not a JSON object; download it again")
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise UserError(f"{path}: corrupt header: __metadata__ maps to more than strings; download it again")
    return document


def _sizes(value: Any, count: int | None) -> bool:
    """A list of (`count`) non-negative integers that a 64-bit file offset can hold."""
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in value)
    )


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    def bad(why: str) -> UserError:
        return UserError(f"{path}: corrupt header: tensor {name!r} {why}; download it again")

    if not isinstance(value, dict):
        raise bad("is not described by an object")
    dtype = value.get("dtype")
    shape: Any = value.get("shape")
    span: Any = value.get("data_offsets")
    if not isinstance(dtype, str):
        raise bad("has no dtype")
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    if not _sizes(shape, None):
        raise bad("has no valid shape")
    if not _sizes(span, 2) or span[0] > span[1]:
        raise bad("has no valid data_offsets")
    expected = math.prod(shape) * DTYPES[dtype][0]
    if span[1] - span[0] != expected:
        found = f"{span[1] - span[0]} bytes of data"
        raise bad(f"has {found} where {dtype} {shape} takes {expected}")
    return Entry(dtype, tuple(shape), start + span[0], expected)


def _check_offsets(path: Path, entries: dict[str, Entry], start: int, size: int) -> dict[str, Entry]:
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].length))
    end, before = start, "the header"
    for name, entry in ordered:
        if entry.offset + entry.length > size:
            raise UserError(
                f"{path}: truncated: tensor {name!r} ends at byte {entry.offset + entry.length} "
                f"of a file of {size}; download it again"
            )
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a hole after"
            raise UserError(f"{path}: corrupt header: tensor {name!r} {what} {before}; download it again")
        end, before = entry.offset + entry.length, repr(name)
    if end != size:
        raise UserError(f"{path}: {size - end} bytes follow the last tensor; download it again")
    return dict(ordered)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor, whole: for tests and small things."""
    header = read_header(path)
    if name not in header:
        raise UserError(f"{path}: no tensor {name!r}; export the checkpoint again")
    return _load(path, header[name])


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, whole: for tests and the eager engine."""
    return {name: _load(path, entry) for name, entry in read_header(path).items()}


def _load(path: Path, entry: Entry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype][1]
    if not entry.length:
        return torch.empty(entry.shape, dtype=dtype)
    data = torch.empty(entry.length, dtype=torch.uint8)
    with Reader() as reader:
        for at in range(0, entry.length, PIECE):
            piece = reader.read(path, entry.offset + at, min(PIECE, entry.length - at))
            data[at : at + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
    return data.view(dtype).reshape(entry.shape)


def order_for_alignment(outputs: Sequence[Output]) -> list[Output]:
    """Whole multiples of ALIGNMENT first, so that each of them starts on one; then wide types before narrow.

    Safetensors allows no padding between tensors. Within the two groups the order is kept.
    """
    even = [output for output in outputs if output.length % ALIGNMENT == 0]
    odd = [output for output in outputs if output.length % ALIGNMENT]
    return even + sorted(odd, key=lambda output: -DTYPES[output.dtype][0])


def write_file(path: Path, outputs: Sequence[Output], progress: Callable[[int, int], None] | None) -> None:
    """Stream `outputs`, in `order_for_alignment`, into one safetensors file."""
    outputs = order_for_alignment(outputs)
    total = sum(output.length for output in outputs)
    done = 0
    with Reader() as reader:
        try:
            with open(path, "wb", buffering=1 << 20) as file:
                file.write(_header(outputs))
                for output in outputs:
                    before = done
                    for data in _pieces(reader, output):
                        file.write(data)
                        done += len(data)
                        if progress and (len(data) > 1 << 20 or done - before == output.length):
                            progress(done, total)
                    assert done - before == output.length, output.name
        except OSError as error:
            mend = "free some space or choose another directory"
            raise UserError(f"{path}: cannot be written ({error.strerror}); {mend}") from error


def write_hole(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """A safetensors file of these names, dtypes and shapes whose data is a hole: no space on disk, all zeros."""
    outputs = [Output(name, dtype, shape, ()) for name, dtype, shape in tensors]
    header = _header(outputs)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(output.length for output in outputs))


def _header(outputs: Sequence[Output]) -> bytes:
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        span = [at, at + output.length]
        document[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": span}
        at += output.length
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _pieces(reader: Reader, output: Output) -> Iterator[bytes]:
    for part in output.parts:
        if isinstance(part, Scalar):
            yield struct.pack("<f", read_scalar(reader, part))
            continue
        for at in range(0, part.length, PIECE):
            piece = reader.read(part.path, part.offset + at, min(PIECE, part.length - at))
            # E4M3's two codes that are no number: no quantizer writes them, and one would spread to every logit.
            if output.dtype == "F8_E4M3" and (b"\x7f" in piece or b"\xff" in piece):
                raise UserError(f"{part.path}: {output.name!r} holds an FP8 value that is no number; download it again")
            yield piece


def read_scalar(reader: Reader, scalar: Scalar) -> float:
    """The F32 value; a scale that is negative, infinite or not a number is a UserError."""
    width, dtype = DTYPES[scalar.dtype]
    raw = bytearray(reader.read(scalar.path, scalar.offset, width))
    value = torch.frombuffer(raw, dtype=dtype).float()
    result = 1 / value if scalar.reciprocal else value
    if not (torch.isfinite(value) & torch.isfinite(result) & (result >= 0)).item():
        where = f"{scalar.path}: tensor {scalar.name!r}"
        raise UserError(f"{where} holds {value.item()}, which is no scale; download or quantize it again")
    return result.item()


def _main() -> None:
    for name, found in read_header(Path(sys.argv[1])).items():
        print(f"{found.dtype:8} {found.shape!s:24} {name}")


if __name__ == "__main__":
    run(_main)
