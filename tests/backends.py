"""Where the tests of a kernel run: on the CPU through tests/emulator.py, and on the GPU where there is one.

@pytest.mark.parametrize("backend", BACKENDS)
def test_it(backend: Backend) -> None:
    x, y = backend.tensor(torch.randn(8, 64)), backend.empty((8, 64), torch.float32)
    kernel = backend.module(SOURCE, {"SIZE": 64}).kernel("double_it")
    kernel.launch((8, 1, 1), (64, 1, 1), [pointer(x), pointer(y), c_int(8)], backend.stream)
    backend.sync()
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from plugins.kernels import Dim, Module, cached_kernels
from tests.emulator import EmulatedModule

GUARD = 256  # bytes before and after every tensor that no kernel may change
WATCHED = 16 << 20  # bytes of the largest tensor whose guards are looked at: they keep it alive
POISON = 0x7F  # as a byte: a NaN as E4M3, 3.4e38 as float32, and no index that is in range


class AnyKernel(Protocol):
    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Any],
        stream: int,
        shared: int = 0,
        programmatic: bool = True,
    ) -> None: ...


class AnyModule(Protocol):
    def kernel(self, name: str) -> AnyKernel: ...


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """A tensor as a kernel's argument. It must be contiguous, and outlive the launch."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _module(name: str, source: Path, defines: tuple[tuple[str, int | str], ...]) -> AnyModule:
    if name == "emulator":
        return EmulatedModule(source, dict(defines))
    major, minor = torch.cuda.get_device_capability()
    return Module(cached_kernels(source, f"sm_{major}{minor}", dict(defines)))


class Backend:
    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if name == "gpu" else "cpu")
        self._guarded: deque[torch.Tensor] = deque(maxlen=64)

    def module(self, source: Path, defines: Mapping[str, int | str] | None = None) -> AnyModule:
        if self.name == "gpu":
            torch.zeros(1, device=self.device)  # makes the primary context current
        return _module(self.name, source, tuple(sorted((defines or {}).items())))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Floats are NaN, integers 0x7f7f..., so that an element which a kernel forgets shows."""
        size = torch.Size(shape).numel() * dtype.itemsize
        base = torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8, device=self.device)
        if size <= WATCHED:
            self._guarded.append(base)
        tensor = base[GUARD : GUARD + size].view(dtype).view(*shape)
        if dtype.is_floating_point:
            tensor.copy_(torch.full(tuple(shape), float("nan")))
        return tensor

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy on the device."""
        copy = self.empty(tensor.shape, tensor.dtype)
        copy.copy_(tensor)
        return copy

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.name == "gpu" else 0

    def sync(self) -> None:
        """Waits for the kernels, then checks that none wrote just before or after a tensor."""
        if self.name == "gpu":
            torch.cuda.synchronize()
        for base in self._guarded:
            edges = torch.cat([base[:GUARD], base[-GUARD:]])
            assert bool((edges == POISON).all()), f"a kernel wrote outside a tensor of {len(base) - 2 * GUARD} bytes"

    def forget(self) -> None:
        """No longer watches the tensors made so far."""
        self._guarded.clear()


EMULATOR, GPU = Backend("emulator"), Backend("gpu")
BACKENDS = [
    pytest.param(EMULATOR, id="emulator"),
    pytest.param(
        GPU,
        id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]
