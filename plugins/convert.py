"""Launches convert.cu: activations to float16 for the prefill kernels, and back. Pointers are device addresses.

to_halves(module(SOURCE, {}), x, hi, lo, rows * k, stream)
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "convert.cu"
THREADS, TOGETHER = 256, 4  # of a block; values of a thread


def to_halves(module: Any, x: int, hi: int, lo: int, count: int, stream: int) -> None:
    """x float32 [count] -> hi float16, the nearest, and lo float16, what that rounded off; lo may be 0."""
    _launch(module, "to_halves", [x, hi, lo], count, stream)


def to_floats(module: Any, x: int, y: int, count: int, stream: int) -> None:
    """x float16 [count] -> y float32 [count]."""
    _launch(module, "to_floats", [x, y], count, stream)


def _launch(module: Any, name: str, pointers: list[int], count: int, stream: int) -> None:
    assert count % TOGETHER == 0
    fours = count // TOGETHER
    args = [*map(c_void_p, pointers), c_int64(fours)]
    module.kernel(name).launch((-(-fours // THREADS), 1, 1), (THREADS, 1, 1), args, stream)
