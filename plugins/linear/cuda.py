"""Linear layers of 1..8 rows on a GPU: the ctypes mirrors of the kernels' structures, and their launcher.

kernels = LinearDecode(Module(cached_kernels(SOURCE, "sm_90", {"NUM_EXPERTS": 256, "TOP_K": 8})), multiprocessors=132)
kernels.linear(Input(x=…, k=2048, rows=3, …), [Segment(weight=…, n=8192, …)], stream)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from export.errors import UserError

SOURCE = Path(__file__).parent / "decode.cu"
FORMATS = {"float": 0, "fp8": 1, "nvfp4": 2}  # enum Format; "float" is bfloat16 on a GPU
BYTES = {0: 2.0, 1: 1.0, 2: 0.5}  # per weight
STORE, ADD, SWIGLU = range(3)  # enum Epilogue
PACK, PACK_NVFP4 = 1, 2  # Segment.pack
MAX_SEGMENTS, MAX_ROWS, TILE = 4, 8, 16
WARPS, RESIDENT, DEPTH = 8, 2, 4  # of a block; blocks that a multiprocessor holds; passes under way (stage.cuh)
PASS = 128  # bytes of a weight row that a warp fetches at a time
PIPELINE = PASS * TILE + 16 * TILE  # bytes of one pass of a warp (tile.cuh)


class Segment(Structure):
    """One weight matrix of a launch. Pointers are device addresses; see segment.cuh for the fields."""

    _fields_ = [
        ("weight", c_void_p),
        ("weight_up", c_void_p),
        ("scale", c_void_p),
        ("scale_up", c_void_p),
        ("scale_2", c_void_p),
        ("scale_2_up", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int),
        ("n", c_int),
        ("format", c_int),
        ("epilogue", c_int),
        ("ring_mask", c_int),
        ("precise", c_int),
        ("pack", c_int),
        ("padding", c_int),
    ]

    @property
    def tiles(self) -> int:
        return -(-self.n // (TILE // 2 if self.epilogue == SWIGLU else TILE))


class Segments(Structure):
    _fields_ = [("segment", Segment * MAX_SEGMENTS), ("count", c_int), ("padding", c_int)]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Segments:
        assert 1 <= len(segments) <= MAX_SEGMENTS
        value = cls(count=len(segments))
        for i, segment in enumerate(segments):
            ctypes.memmove(ctypes.addressof(value.segment[i]), ctypes.addressof(segment), ctypes.sizeof(Segment))
        return value


class Input(Structure):
    """The rows that a launch multiplies and what stands before the product; see stage.cuh."""

    _fields_ = [
        ("x", c_void_p),
        ("norm_weight", c_void_p),
        ("head_squares", c_void_p),
        ("position", c_void_p),
        ("epsilon", c_float),
        ("x_stride", c_int),
        ("head_dim", c_int),
        ("head_parts", c_int),
        ("k", c_int),
        ("rows", c_int),
        ("groups", c_int),
        ("padding", c_int),
    ]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a launch: the warps' pipelines, the staged rows, the sums of two turns."""
        return WARPS * DEPTH * PIPELINE + int(self.rows) * (entries_bytes(self.k) + 2 * WARPS * TILE * 4)


class Routing(Structure):
    _fields_ = [("logits", c_void_p), ("routing", c_void_p), ("counter", c_void_p)]


class LinearArguments(Structure):
    _fields_ = [
        ("segments", Segments),
        ("input", Input),
        ("residual", c_void_p),
        ("residual_row", c_void_p),
        ("normed", c_void_p),
        ("routing", Routing),
    ]


def entries_bytes(k: int) -> int:
    """Shared memory of one staged row of k values: bfloat16 high and low parts."""
    return 4 * k


def routing_bytes(top_k: int) -> int:
    """Size of `struct Routing` (plugins/moe_routing/routing.cuh)."""
    items = MAX_ROWS * top_k
    return 4 * (1 + items + items * MAX_ROWS + 2 * MAX_ROWS * top_k)


def check_k(k: int, format: str, name: str) -> None:
    """Raises UserError: rows, and their scales, must start at addresses that vector loads can take."""
    multiple = 64 if format == "nvfp4" else 32
    if k % multiple:
        raise UserError(f"{name}: {k} inputs; the cuda target takes multiples of {multiple} in this format; use cpu")


def best_groups(tiles: int, row_bytes: int, multiprocessors: int) -> int:
    """How many tiles a block works on side by side: many leave a warp more to do between tiles, few keep all warps
    busy. Not a matter of the rows, since the sums of a tile are added in another order."""

    def cost(groups: int) -> int:
        turns = -(-tiles // (RESIDENT * multiprocessors * groups))
        return turns * (5 + 2 * -(-row_bytes // (WARPS // groups * PASS)))  # a turn costs as much as 2.5 passes

    return min((1, 2, 4, 8), key=cost)


class LinearDecode:
    """Macros of the module: NUM_EXPERTS and TOP_K, for the launches that route."""

    def __init__(self, module: Any, multiprocessors: int) -> None:
        self.module, self.multiprocessors = module, multiprocessors

    def linear(
        self,
        given: Input,
        segments: Sequence[Segment],
        stream: int,
        residual: int | None = None,
        residual_row: int | None = None,
        normed: int | None = None,
        routing: Routing | None = None,
    ) -> None:
        """Multiplies the rows with every segment. residual: what ADD adds to, read from row *residual_row on.
        normed: where the normed rows go, float32 [T, K]. routing: segment 0 holds router logits; choose experts."""
        assert 1 <= given.rows <= MAX_ROWS
        arguments = LinearArguments(Segments.of(segments), given, residual, residual_row, normed, routing or Routing())
        tiles = sum(s.tiles for s in segments)
        largest = max(segments, key=lambda s: s.n * BYTES[s.format])
        # Blocks stage their rows for one format at a time: groups of tiles must not straddle segments that differ.
        mixed = len({s.format == FORMATS["nvfp4"] for s in segments}) > 1
        row_bytes = int(given.k * BYTES[largest.format])
        arguments.input.groups = groups = 1 if mixed else best_groups(tiles, row_bytes, self.multiprocessors)
        grid = min(-(-tiles // groups), RESIDENT * self.multiprocessors)
        kernel = self.module.kernel("linear")
        kernel.launch((grid, 1, 1), (32 * WARPS, 1, 1), [arguments], stream, shared=given.shared_bytes)
