"""Launchers of gated attention's kernels: `Decode` for 1..8 rows, `Prefill` for many, and for KvAppend.

Pointers are device addresses as plain ints. All tensors but the KV cache, and prefill's y, are float32; strides are in
elements, and even. See decode.cu and prefill.cu for the shapes.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DECODE_SOURCE = Path(__file__).parent / "decode.cu"
PREFILL_SOURCE = Path(__file__).parent / "prefill.cu"
TILE, GROUP_TILES, SCORE_STRIDE = 64, 4, 68  # as in the sources
MAX_ROWS, MAX_COLUMNS = 8, 64


@dataclass(frozen=True)
class Sizes:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    fp8: bool = False  # the cache holds E4M3, else float16

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def defines(self) -> dict[str, int | str]:
        return {
            "HEAD_DIM": self.head_dim,
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "ROTARY_DIM": self.rotary_dim,
            "KV_FP8": int(self.fp8),
        }

    def cache_bytes(self, capacity: int) -> int:
        return 2 * self.num_kv_heads * capacity * self.head_dim * (1 if self.fp8 else 2)


def _tile_bytes(row_bytes: int) -> int:
    return TILE * (row_bytes + 16 if row_bytes % 128 else row_bytes)


class _DecodeArguments(Structure):
    _fields_ = [
        ("q_gate", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("inverse_frequencies", c_void_p),
        ("position", c_void_p),
        ("query_row", c_void_p),
        ("kv_cache", c_void_p),
        ("partial", c_void_p),
        ("partial_softmax", c_void_p),
        ("y", c_void_p),
        ("q_stride", c_int),
        ("k_stride", c_int),
        ("v_stride", c_int),
        ("position_offset", c_int),
        ("capacity", c_int),
        ("rows", c_int),
        ("short_tiles", c_int),
        ("epsilon", c_float),
        ("late", c_int),
    ]


class Decode:
    """1..8 rows at the end of the cache.

    module: of DECODE_SOURCE, with `sizes.defines`. multiprocessors, shared_limit: of the device; bytes of dynamic
    shared memory that a block may have. No kernel launched since the last late one (common.cuh) may write the cache,
    `position` or `query_row`: they are read while it may still run.
    """

    def __init__(self, module: Any, sizes: Sizes, multiprocessors: int, shared_limit: int) -> None:
        self.module, self.sizes, self.shared_limit = module, sizes, shared_limit
        self.multiprocessors = multiprocessors
        fitting = [
            q for q in range(1, MAX_ROWS + 1) if q * sizes.group <= MAX_COLUMNS and self._shared(q) <= shared_limit
        ]
        assert fitting, f"{sizes} takes {self._shared(1)} bytes of shared memory, there are {shared_limit}"
        self.rows_per_launch = fitting[-1]  # more rows take several launches

    def _shared(self, queries: int) -> int:
        sizes = self.sizes
        columns = -(-queries * sizes.group // 8) * 8
        tiles = 2 * _tile_bytes(sizes.head_dim * (1 if sizes.fp8 else 2))
        fragments = columns * (sizes.head_dim + TILE) * 4
        return tiles + fragments + columns * (2 * SCORE_STRIDE * 4 + 8) + MAX_ROWS * sizes.rotary_dim // 2 * 8

    def _blocks(self, queries: int) -> int:
        """Of each KV head: what the device runs at once."""
        resident = (
            1 if queries * self.sizes.group > 24 else (self.shared_limit + 1024) // (self._shared(queries) + 1024)
        )
        return max(self.multiprocessors * min(resident, 2) // self.sizes.num_kv_heads, 1)

    def _short_tiles(self, queries: int) -> int:
        return 2 * self._blocks(queries)

    def scratch_bytes(self, capacity: int) -> int:
        def entries(queries: int) -> int:
            return max(min(-(-capacity // TILE), self._short_tiles(queries)), -(-capacity // (TILE * GROUP_TILES)))

        row = self.sizes.num_heads * (self.sizes.head_dim + 2) * 4
        return max(entries(queries) * queries for queries in range(1, self.rows_per_launch + 1)) * row

    def launch(
        self,
        *,
        q_gate: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        q_norm: int,
        k_norm: int,
        inverse_frequencies: int,
        position: int,
        kv_cache: int,
        capacity: int,
        rows: int,
        y: int,
        scratch: int,
        epsilon: float,
        stream: int,
        position_offset: int = 0,
        query_row: int = 0,
        short_tiles: int | None = None,
    ) -> None:
        """position, query_row: addresses of an int32; query_row 0: all rows attend. Appends all rows in either case.
        short_tiles: for tests, which show that nothing depends on it."""
        assert 1 <= rows <= MAX_ROWS
        per_launch = rows if query_row else self.rows_per_launch
        width = self.sizes.num_heads * self.sizes.head_dim
        for start in range(0, rows, per_launch):
            count = min(per_launch, rows - start)
            queries = 1 if query_row else count
            short = self._short_tiles(queries) if short_tiles is None else short_tiles
            entries = max(min(-(-capacity // TILE), short), -(-capacity // (TILE * GROUP_TILES)))
            arguments = _DecodeArguments(
                q_gate=q_gate + start * q_stride * 4,
                k=k + start * k_stride * 4,
                v=v + start * v_stride * 4,
                q_norm=q_norm,
                k_norm=k_norm,
                inverse_frequencies=inverse_frequencies,
                position=position,
                query_row=query_row or None,
                kv_cache=kv_cache,
                partial=scratch,
                partial_softmax=scratch + entries * queries * width * 4,
                y=y + start * width * 4,
                q_stride=q_stride,
                k_stride=k_stride,
                v_stride=v_stride,
                position_offset=position_offset + start,
                capacity=capacity,
                rows=count,
                short_tiles=short,
                epsilon=epsilon,
                late=start + count < rows,
            )
            grid = (self._blocks(queries), self.sizes.num_kv_heads, 1)
            kernel = self.module.kernel(f"attention_decode_{queries}")
            kernel.launch(grid, (256, 1, 1), [arguments], stream, shared=self._shared(queries))
            grid = (-(-self.sizes.head_dim // 64), self.sizes.num_heads, queries)
            self.module.kernel("attention_combine").launch(grid, (256, 1, 1), [arguments], stream)


class _AppendArguments(Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("k_norm", c_void_p),
        ("inverse_frequencies", c_void_p),
        ("position", c_void_p),
        ("kv_cache", c_void_p),
        ("k_stride", c_int),
        ("v_stride", c_int),
        ("position_offset", c_int),
        ("capacity", c_int),
        ("epsilon", c_float),
        ("padding", c_int),
    ]


class _PrefillArguments(Structure):
    _fields_ = [
        ("q_gate", c_void_p),
        ("q_norm", c_void_p),
        ("inverse_frequencies", c_void_p),
        ("position", c_void_p),
        ("kv_cache", c_void_p),
        ("y", c_void_p),
        ("q_stride", c_int),
        ("position_offset", c_int),
        ("capacity", c_int),
        ("rows", c_int),
        ("epsilon", c_float),
        ("padding", c_int),
    ]


class Prefill:
    """Any number of rows: `append` their keys and values, then `attend`. module: of PREFILL_SOURCE."""

    def __init__(self, module: Any, sizes: Sizes) -> None:
        self.module, self.sizes = module, sizes

    def append(
        self,
        *,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        k_norm: int,
        inverse_frequencies: int,
        position: int,
        kv_cache: int,
        capacity: int,
        rows: int,
        epsilon: float,
        stream: int,
        position_offset: int = 0,
    ) -> None:
        arguments = _AppendArguments(
            k=k,
            v=v,
            k_norm=k_norm,
            inverse_frequencies=inverse_frequencies,
            position=position,
            kv_cache=kv_cache,
            k_stride=k_stride,
            v_stride=v_stride,
            position_offset=position_offset,
            capacity=capacity,
            epsilon=epsilon,
        )
        block = (32 * self.sizes.num_kv_heads, 1, 1)
        self.module.kernel("attention_append").launch((rows, 1, 1), block, [arguments], stream)

    def attend(
        self,
        *,
        q_gate: int,
        q_stride: int,
        q_norm: int,
        inverse_frequencies: int,
        position: int,
        kv_cache: int,
        capacity: int,
        rows: int,
        y: int,
        epsilon: float,
        stream: int,
        position_offset: int = 0,
    ) -> None:
        """y: float16 [T, Hq D]."""
        arguments = _PrefillArguments(
            q_gate=q_gate,
            q_norm=q_norm,
            inverse_frequencies=inverse_frequencies,
            position=position,
            kv_cache=kv_cache,
            y=y,
            q_stride=q_stride,
            position_offset=position_offset,
            capacity=capacity,
            rows=rows,
            epsilon=epsilon,
        )
        tokens = 64 // self.sizes.group
        grid = (self.sizes.num_kv_heads, -(-rows // tokens), 1)
        shared = 3 * _tile_bytes(2 * self.sizes.head_dim)
        self.module.kernel("attention_prefill").launch(grid, (128, 1, 1), [arguments], stream, shared=shared)
