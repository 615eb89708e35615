"""Linear layers of many rows on a GPU: launches prefill.cu. Pointers are device addresses as plain ints.

kernels = PrefillLinear(Module(cached_kernels(SOURCE, "sm_90", {})))
kernels.norm(x, weight, hi, rows, 2048, 1e-6, stream, lo=lo)
kernels.linear(hi, lo, [Segment(weight=…, n=8192, …)], rows, 2048, stream)
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins.linear.cuda import SWIGLU, Segment, Segments

SOURCE = Path(__file__).parent / "prefill.cu"
THREADS, TILE_ROWS, SHARED_BYTES, NORM_THREADS = 128, 128, 96 << 10, 256  # prefill.cuh, prefill.cu
TILE_TOKENS = (128, 96, 64, 32)
UNPACKING = 32  # what a tile costs whatever its tokens, in tokens


def row_tiles(n: int, epilogue: int) -> int:
    """Blocks over the n features of a product."""
    return -(-n // (TILE_ROWS // 2 if epilogue == SWIGLU else TILE_ROWS))


class PrefillLinear:
    def __init__(self, module: Any, multiprocessors: int = 132) -> None:
        self.module, self.multiprocessors = module, multiprocessors

    def norm(
        self,
        x: int,
        weight: int,
        hi: int,
        rows: int,
        hidden: int,
        epsilon: float,
        stream: int,
        lo: int = 0,
        exact: int = 0,
        x_stride: int | None = None,
    ) -> None:
        """Zero-centred RMS norm of x float32 [rows, hidden] -> hi float16, lo float16 (what hi's rounding lost) and
        exact float32, of which the last two may be 0."""
        stride = hidden if x_stride is None else x_stride
        if hidden % 4 or stride % 4:
            raise ValueError(f"rows of {hidden} values, {stride} apart; the kernel reads four at a time")
        args = [*map(c_void_p, (x, weight, hi, lo, exact)), c_int(stride), c_int(hidden), c_float(epsilon)]
        self.module.kernel("rms_norm_rows").launch((rows, 1, 1), (NORM_THREADS, 1, 1), args, stream)

    def linear(
        self,
        x: int,
        x_lo: int,
        segments: Sequence[Segment],
        rows: int,
        k: int,
        stream: int,
        tile_tokens: int | None = None,
    ) -> None:
        """x float16 [rows, k] times every segment's weight. STORE and ADD write float32, SWIGLU float16. x_lo: the rest
        of x, for segments that are `precise`, or 0. tile_tokens: rows of x in a block; no result depends on it."""
        if k % 32:
            raise ValueError(f"{k} inputs per output; the kernel needs a multiple of 32")
        tiles = sum(row_tiles(s.n, s.epilogue) for s in segments)
        tokens = tile_tokens or self._tile_tokens(tiles, rows)
        args = [c_void_p(x), c_void_p(x_lo), Segments.of(segments), c_int(rows), c_int(k), c_int(tokens)]
        grid = (tiles * -(-rows // tokens), 1, 1)
        self.module.kernel("linear_prefill").launch(grid, (THREADS, 1, 1), args, stream, shared=SHARED_BYTES)

    def _tile_tokens(self, tiles: int, rows: int) -> int:
        """The size that leaves the busiest multiprocessor the least to do."""

        def cost(tokens: int) -> int:
            blocks = tiles * -(-rows // tokens)
            return -(-blocks // self.multiprocessors) * (min(tokens, rows) + UNPACKING)

        return min(TILE_TOKENS, key=cost)
