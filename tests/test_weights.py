"""`export.weights`: the header parser against corruption and against safetensors; the streaming writer.

python -m pytest tests/test_weights.py
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from export.errors import UserError
from export.weights import (
    ALIGNMENT,
    DTYPES,
    Output,
    Reader,
    Run,
    Scalar,
    load_weights,
    read_header,
    read_scalar,
    read_tensor,
    write_file,
)

STATE = {
    "matrix": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "scale": torch.tensor(0.25),
    "codes": torch.arange(16, dtype=torch.uint8),
    "blocks": torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn).reshape(2, 3),
    "none": torch.empty(0, 3, dtype=torch.float16),
}
FILE = save(STATE, {"format": "pt"})


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FILE)
    assert all(same(read_tensor(path, name), tensor) for name, tensor in STATE.items())
    loaded = load_weights(path)
    assert loaded.keys() == STATE.keys() and all(same(loaded[name], STATE[name]) for name in STATE)
    entry = read_header(path)["matrix"]
    assert entry[:2] == ("BF16", (3, 4))
    raw = path.read_bytes()[entry.offset : entry.offset + entry.length]
    assert same(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(3, 4), STATE["matrix"])


def test_no_such_tensor(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors.*'nought'"):
        read_tensor(tmp_path / "x.safetensors", "nought")


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: list[tuple[str, Any, bytes]] = [
    ("not JSON", b"{", b""),
    ("not JSON", b"\xff\xfe{}", b""),
    ("not JSON", b"[" * 100_000, b""),
    ("appears twice", b'{"t":1,"t":2}', b""),
    ("not a JSON object", [], b""),
    ("__metadata__", {"__metadata__": {"a": 1}}, b""),
    ("'t' is not described", {"t": 3}, b""),
    ("'t' has no dtype", {"t": entry(dtype=None)}, b"1234"),
    ("'t' has dtype 'F4'", {"t": entry(dtype="F4")}, b"1234"),
    ("'t' has no valid shape", {"t": entry(shape=[-4])}, b"1234"),
    ("'t' has no valid shape", {"t": entry(shape=[4.0])}, b"1234"),
    ("'t' has no valid data_offsets", {"t": entry(offsets=[4, 0])}, b"1234"),
    ("'t' has no valid data_offsets", {"t": entry(offsets=[0])}, b"1234"),
    ("'t' has 4 bytes of data where F32", {"t": entry(dtype="F32")}, b"1234"),
    ("truncated: tensor 't' ends at byte", {"t": entry()}, b"123"),
    ("4 bytes follow", {"t": entry()}, b"12345678"),
    ("'u' overlaps 't'", {"t": entry(), "u": entry(offsets=[2, 6])}, b"123456"),
    ("'t' leaves a hole after the header", {"t": entry(offsets=[1, 5])}, b"12345"),
]


@pytest.mark.parametrize(("message", "header", "data"), BAD_HEADERS)
def test_bad_headers(tmp_path: Path, message: str, header: Any, data: bytes) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 60), struct.pack("<Q", 9)])
def test_too_short(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: truncated"):
        read_header(path)


def test_a_name_with_a_line_break_stays_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a\nb": 3})
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").mkdir()
    with pytest.raises(UserError, match=r"y\.safetensors"):
        read_header(tmp_path / "y.safetensors")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_corruption_is_a_user_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever we accept, safetensors accepts, with the same tensors in the same places."""
    content = bytearray(FILE)
    header_end = 8 + struct.unpack("<Q", FILE[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789{}[]",:-. aFUBd') | st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    try:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(ours)
            for name, found in ours.items():
                assert tuple(theirs.get_slice(name).get_shape()) == found.shape
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")


def outputs_of(path: Path) -> list[Output]:
    return [
        Output(name, found.dtype, found.shape, [Run(path, found.offset, found.length)])
        for name, found in read_header(path).items()
    ]


def test_writes_an_aligned_file(tmp_path: Path) -> None:
    state = {
        f"{name}.{i}": torch.randn(size).to(DTYPES[dtype][1])
        for i, size in enumerate((1, 3, 32, 64, 100, 4096))
        for name, dtype in (("a", "F32"), ("b", "BF16"), ("c", "U8"))
    }
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file(state, source)
    seen: list[tuple[int, int]] = []
    write_file(target, outputs_of(source), lambda done, total: seen.append((done, total)))
    assert all(same(load_file(target)[name], tensor) for name, tensor in state.items())
    for name, found in read_header(target).items():
        aligned = ALIGNMENT if found.length % ALIGNMENT == 0 else DTYPES[found.dtype][0]
        assert found.offset % aligned == 0, name
    total = sum(tensor.nbytes for tensor in state.values())
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_scalars(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = {"three": torch.tensor(3.0), "half": torch.tensor([0.5], dtype=torch.bfloat16)}
    bad = {"nan": torch.tensor(torch.nan), "zero": torch.tensor(0.0), "inf": torch.tensor(torch.inf)}
    save_file(values | bad | {"minus": torch.tensor(-1.0)}, path)
    header = read_header(path)

    def read(name: str, reciprocal: bool) -> float:
        with Reader() as reader:
            return read_scalar(reader, Scalar(path, name, header[name].dtype, header[name].offset, reciprocal))

    assert read("half", False) == 0.5 and read("half", True) == 2.0
    assert read("three", True) == torch.tensor(1 / 3).item()  # rounded once, in float32
    assert read("zero", False) == 0.0  # an expert of zeros
    for name, reciprocal in [("nan", False), ("minus", False), ("inf", False), ("inf", True), ("zero", True)]:
        with pytest.raises(UserError, match=f"'{name}' holds"):
            read(name, reciprocal)


def test_a_source_that_shrank_in_between(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(1000)}, tmp_path / "x.safetensors")
    outputs = outputs_of(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 500)
    with pytest.raises(UserError, match=r"x\.safetensors: ends at byte 500"):
        write_file(tmp_path / "y.safetensors", outputs, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_disk_full(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(1000)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="/dev/full: cannot be written"):
        write_file(Path("/dev/full"), outputs_of(tmp_path / "x.safetensors"), None)
