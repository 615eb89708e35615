"""The emulator's primitives against arithmetic in torch, and the same kernels on a GPU: they must agree on both."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from ctypes import c_int
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.kernels import ROOT, CompileError
from tests.backends import BACKENDS, EMULATOR, Backend, pointer
from tests.emulator import HERE, EmulatedModule, EmulatorError

SOURCE = Path(__file__).parent / "primitives.cu"
ONE = (1, 1, 1)
WARP = (32, 1, 1)


def launch(backend: Backend, name: str, args: list[Any], grid: int = 1, block: int = 32, shared: int = 0) -> None:
    kernel = backend.module(SOURCE).kernel(name)
    values = [pointer(value) if isinstance(value, torch.Tensor) else c_int(value) for value in args]
    kernel.launch((grid, 1, 1), (block, 1, 1), values, backend.stream, shared)
    backend.sync()


def unsigned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().long() & 0xFFFFFFFF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeat", range(4))
def test_barrier(backend: Backend, repeat: int) -> None:
    values = torch.randint(-99, 99, (3, 96)).float()  # sums of whole numbers are exact
    sums = backend.empty((3, 96), torch.float32)
    launch(backend, "block_sums", [sums, backend.tensor(values)], grid=3, block=96, shared=96 * 4)
    assert torch.equal(sums.cpu(), values.sum(1, keepdim=True).expand(3, 96))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shuffles(backend: Backend) -> None:
    values = torch.randint(2**31, (32,), dtype=torch.int32)
    results = backend.empty((32, 8), torch.int32)
    launch(backend, "shuffles", [results, backend.tensor(values)])
    lane = torch.arange(32)
    down = torch.where(lane < 29, lane + 3, lane)
    up = torch.where(lane >= 3, lane - 3, lane)
    down8 = torch.where(lane % 8 < 5, lane + 3, lane)
    up8 = torch.where(lane % 8 >= 3, lane - 3, lane)
    sources = [lane ^ 5, down, up, lane * 0 + 7, (lane + 1) % 32, down8, up8, lane // 8 * 8 + 2]
    assert torch.equal(results.cpu(), values[torch.stack(sources, 1)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [0, 3])
def test_votes(backend: Backend, low: int) -> None:
    values = torch.randint(low, 9, (32,), dtype=torch.int32)
    results, total = backend.empty((32, 6), torch.int32), backend.tensor(torch.tensor([5], dtype=torch.int32))
    launch(backend, "votes", [results, backend.tensor(values), total])
    power = 1 << torch.arange(32)
    halves = values.view(2, 16)
    expected = torch.stack(
        [
            ((values & 1) * power).sum().expand(32),
            (values == 7).any().expand(32).long(),
            (halves > 2).all(1).long().repeat_interleave(16),
            (((values >> 1) & 1) * power).view(2, 16).sum(1).repeat_interleave(16),
            values.max().expand(32).long(),
            halves.sum(1).repeat_interleave(16),
        ],
        1,
    )
    assert torch.equal(unsigned(results), expected)
    assert int(total) == 5 + int(values.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_warp_meet_by_themselves(backend: Backend) -> None:
    results = backend.empty((96,), torch.int32)
    launch(backend, "divergent", [results], block=96)
    for warp in range(3):
        low, high = torch.arange(warp * 32, warp * 32 + 16), torch.arange(warp * 32 + 16, warp * 32 + 32)
        sums = (low + (low ^ 1)) * 2**warp
        assert torch.equal(results.cpu()[low].long(), sums)
        assert torch.equal(results.cpu()[high].long(), high.sum().expand(16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(backend: Backend, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a[3, 4] = 3e-8 if dtype == torch.float16 else 1e-39  # a subnormal
    result = backend.tensor(c)
    name = "multiply_bf16" if dtype == torch.bfloat16 else "multiply_half"
    launch(backend, name, [result, backend.tensor(a), backend.tensor(b)])
    exact = a.double() @ b.double() + c.double()
    # Tensor cores align the terms to the largest one and cut there: a few units of its last place in float32.
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    tolerance = size * (2.0**-24 if backend is EMULATOR else 2.0**-21)
    assert ((result.cpu().double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_load_matrix(backend: Backend) -> None:
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    results = backend.empty((12, 32), torch.int32)
    launch(backend, "load_matrices", [results, backend.tensor(matrices)], shared=512)
    straight = matrices.contiguous().view(torch.int32).view(4, 32)
    turned = matrices.mT.contiguous().view(torch.int32).view(4, 32)
    assert torch.equal(results.cpu(), torch.cat([straight, turned, straight[:2], turned[:2]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeat", range(4))
def test_asynchronous_copies(backend: Backend, repeat: int) -> None:
    x = torch.randn(5, 32, 4)
    y = backend.empty(x.shape, torch.float32)
    launch(backend, "pipeline", [y, backend.tensor(x), 5, 3], shared=1024)
    x[3:] = 0
    assert torch.equal(y.cpu(), x.flip(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_pattern(backend: Backend) -> None:
    results = backend.empty((65536, 3), torch.float32)
    launch(backend, "convert_from", [results], grid=256, block=256)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    half, bf16, e4m3 = results.cpu().unbind(1)
    torch.testing.assert_close(half, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bf16, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float().repeat(256)
    numbers = ~codes.isnan()
    torch.testing.assert_close(e4m3[numbers], codes[numbers], rtol=0, atol=0)
    assert torch.equal(half.signbit() & ~half.isnan(), (bits < 0) & ~half.isnan())  # -0 too


def floats() -> torch.Tensor:
    """65536 floats: any bits, near the numbers of float16 and of bfloat16 and half way between two of them."""
    anything = torch.randint(-(2**31), 2**31, (16384,)).to(torch.int32).view(torch.float32)
    bits = torch.randint(-(2**15), 2**15, (8192, 1)).to(torch.int16)
    steps = torch.tensor([-1, 0, 1], dtype=torch.int32)
    near = []
    for dtype in (torch.float16, torch.bfloat16):
        exact = bits.view(dtype).float()
        between = (exact.double() + (bits + 1).view(dtype).double()).mul(0.5).float()
        near += [(value.view(torch.int32) + steps).view(torch.float32).flatten() for value in (exact, between)]
    moderate = torch.randn(65536) * torch.exp(torch.randn(65536) * 4)
    return torch.cat([anything, *[part[:12288] for part in near[:3]], moderate])[:65536].contiguous()


def same(bits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Whether 16-bit patterns are those of `expected`, any NaN being as good as another."""
    found = bits.to(torch.int16).view(expected.dtype)
    return (found.view(torch.int16) == expected.contiguous().view(torch.int16)) | (found.isnan() & expected.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(backend: Backend, dtype: torch.dtype) -> None:
    x = floats()
    results = backend.empty((65536, 3), torch.int32)
    launch(backend, "convert_to", [results, backend.tensor(x)], grid=256, block=256)
    halves, bf16s, half = unsigned(results).unbind(1)
    pair = halves if dtype == torch.float16 else bf16s
    assert same(pair & 0xFFFF, x.to(dtype)).all()
    assert same(pair >> 16, x.view(-1, 2).flip(1).flatten().to(dtype)).all()
    assert torch.equal(half, halves & 0xFFFF)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_round_once(backend: Backend) -> None:
    a, b = (torch.randint(-(2**15), 2**15, (65536, 2)).to(torch.int16) for _ in range(2))
    results = backend.empty((65536,), torch.int32)
    launch(backend, "products", [results, backend.tensor(a), backend.tensor(b)], grid=256, block=256)
    exact = a.view(torch.float16).double() * b.view(torch.float16).double()
    subnormal = (exact * 2.0**24).round() * 2.0**-24  # a double holds it: torch's own cast would round twice
    expected = torch.where(exact.abs() < 2.0**-14, subnormal, exact).float().half()
    assert same(results.cpu().view(torch.int16), expected.flatten()).all()


# ---- mistakes: the emulator names the kernel ---------------------------------------------------------------------


@pytest.fixture
def y() -> Iterator[torch.Tensor]:
    yield EMULATOR.empty((64,), torch.float32)
    EMULATOR.forget()


def test_a_missed_barrier_is_an_error() -> None:
    with pytest.raises(EmulatorError, match=r"barrier_missed.*block \(0, 0, 0\).*deadlock.*63 at a barrier.*1 have"):
        launch(EMULATOR, "barrier_missed", [], block=64)


def test_a_missing_lane_is_an_error(y: torch.Tensor) -> None:
    with pytest.raises(EmulatorError, match=r"lane_missed.*deadlock.*0xffffffff for the lanes 0x00000020"):
        launch(EMULATOR, "lane_missed", [y])


def test_every_thread_waits_for_the_previous_kernel() -> None:
    with pytest.raises(EmulatorError, match=r"no_wait.*thread.*wait_for_previous"):
        launch(EMULATOR, "no_wait", [])
    EMULATOR.module(SOURCE).kernel("no_wait").launch(ONE, WARP, [], EMULATOR.stream, programmatic=False)


def test_a_block_may_leave_at_once_if_another_one_waits() -> None:
    kernel = EMULATOR.module(SOURCE).kernel("waits_below")
    kernel.launch((2, 1, 1), WARP, [c_int(1), c_int(32)], EMULATOR.stream)
    with pytest.raises(EmulatorError, match=r"1 threads end without wait_for_previous"):
        kernel.launch((2, 1, 1), WARP, [c_int(2), c_int(31)], EMULATOR.stream)
    with pytest.raises(EmulatorError, match=r"no thread calls wait_for_previous"):
        kernel.launch((2, 1, 1), WARP, [c_int(0), c_int(32)], EMULATOR.stream)


def test_a_bad_address_is_an_error(y: torch.Tensor) -> None:
    kernel = EMULATOR.module(SOURCE).kernel("writes_at")
    with pytest.raises(EmulatorError, match=r"writes_at.*thread \(\d+, 0, 0\).*Segmentation fault"):
        kernel.launch(ONE, WARP, [ctypes.c_void_p(64), c_int(0)], EMULATOR.stream)
    with pytest.raises(EmulatorError, match=r"copies_vector_at.*a vector at an address"):
        launch(EMULATOR, "copies_vector_at", [y, 1])
    launch(EMULATOR, "copies_vector_at", [y, 8])
    launch(EMULATOR, "writes_at", [y, 63])
    with pytest.raises(AssertionError, match="outside a tensor of 256 bytes"):
        launch(EMULATOR, "writes_at", [y, 64])


def test_dynamic_shared_memory_has_an_end() -> None:
    launch(EMULATOR, "writes_shared_at", [255], shared=1024)
    with pytest.raises(EmulatorError, match=r"writes_shared_at.*past the dynamic shared memory"):
        launch(EMULATOR, "writes_shared_at", [256], shared=1024)
    with pytest.raises(EmulatorError, match="more than 227 KB"):
        launch(EMULATOR, "writes_shared_at", [0], shared=(227 << 10) + 1)


def test_shared_memory_starts_as_nan(y: torch.Tensor) -> None:
    launch(EMULATOR, "reads_unwritten", [y], shared=16)
    assert torch.equal(y[:31], torch.ones(31)) and bool(y[31].isnan())


def test_a_forgotten_barrier_shows(y: torch.Tensor) -> None:
    for _ in range(2):  # whichever warp runs first
        launch(EMULATOR, "barrier_forgotten", [y], block=64)
        assert bool(y.isnan().any())


def test_every_function_with_assembly_has_a_twin() -> None:
    functions = re.split(r"\n(?=DEVICE|template)", (ROOT / "common.cuh").read_text())
    names = [re.search(r"(\w+)\(", body) for body in functions if "asm" in body]
    twins = (HERE / "common.cuh").read_text()
    assert len(names) > 10
    assert [name[1] for name in names if name and not re.search(rf"\binline \w+ {name[1]}\(", twins)] == []


def test_arguments_and_assembly_are_checked(tmp_path: Path, y: torch.Tensor) -> None:
    with pytest.raises(EmulatorError, match=r"writes_at: takes arguments of \[8, 4\] bytes, got \[8, 8\]"):
        EMULATOR.module(SOURCE).kernel("writes_at").launch(ONE, WARP, [pointer(y), pointer(y)], EMULATOR.stream)
    source = tmp_path / "kernel.cu"
    source.write_text('#include "common.cuh"\nKERNEL nothing() { asm volatile("bar.sync 0;"); }\n')
    with pytest.raises(CompileError, match=r"inline assembly belongs in plugins/common.cuh"):
        EmulatedModule(source, {})
    source.write_text('#include "common.cuh"\nKERNEL wrong() { SIZE[3] = unknown; }\n')
    with pytest.raises(CompileError, match=r"kernel.cu:2:"):
        EmulatedModule(source, {"SIZE": 3})
