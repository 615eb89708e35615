"""Linear layers of 1..8 rows on a GPU: the ctypes mirrors of the kernels' structures, and their launcher.

module = Module(cached_kernels(SOURCE, "sm_90", {}))
kernels = LinearDecode(module, multiprocessors=132, device_shared=227 << 10)
kernels.linear(Input(x=…, k=2048, rows=3, …), [Segment(weight=…, n=8192, …)], stream)
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Sequence
from ctypes import Structure, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from export.errors import UserError
from plugins.sampling.cuda import Tokens

SOURCE = Path(__file__).parent / "decode.cu"
FORMATS = {"float": 0, "fp8": 1, "nvfp4": 2}  # enum Format; "float" is bfloat16 on a GPU
STORE, ADD, SWIGLU = range(3)  # enum Epilogue
MAX_SEGMENTS, MAX_ROWS, TILE = 4, 8, 16
SET_ROWS = 4  # rows that a tensor core multiplies at a time; kernels of more are their own
WARPS = 8  # of a block (stage.cuh)
PASS = 128  # bytes of a weight row that a warp fetches at a time
SLOT = PASS * TILE + 16 * TILE  # bytes of one pass of a warp (tile.cuh), scales included
MAX_DEPTH = 4  # passes that a warp has under way: more delay what the kernel before still needs
CLAIM = 4  # tiles that a block of an lm_head claims at a time, at least MAX_DEPTH (stage.cuh)
RESERVED = 1024  # bytes of shared memory that every block takes on top
EXCHANGE = 4 * TILE * WARPS  # bytes of a row's products with a tile, by shares of k (stage.cuh)
MAX_EXPERTS = 512
MAX_TOP_K = 8  # a warp has two lanes' turns for the pairs of eight rows (routing.cuh)
MAX_HEADS = 64  # that a norm in front is over
STATIC = 1040 + 4 * MAX_ROWS * MAX_HEADS  # bytes of shared memory that the kernels declare, at most


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
        ("pool", c_int),
        ("late", c_int),
    ]

    def fit(self, tiles: int, room: int, shared_limit: int, passes: int = 2) -> int:
        """Sets `pool`: as much as a room has space for, so many passes a warp at least, if the device has that much. ->
        bytes of dynamic shared memory, of the whole room if there is one. tiles: of a block, at most."""
        staged = int(self.rows) * (row_bytes(self.k) + min(tiles, WARPS) * EXCHANGE)
        least, most = passes * WARPS * SLOT, MAX_DEPTH * WARPS * SLOT
        self.pool = min(max(room - staged, least), most, shared_limit - staged) // 16 * 16
        return max(staged + int(self.pool), room)

    def depth(self, format: int) -> int:
        """Passes that a warp has under way."""
        return min(int(self.pool) // WARPS // (SLOT if format == FORMATS["nvfp4"] else PASS * TILE), MAX_DEPTH)


class Part(Structure):
    """The segments of one format, and the blocks that share their tiles; see decode.cu."""

    _fields_ = [
        ("format", c_int),
        ("first_segment", c_int),
        ("end_segment", c_int),
        ("first_block", c_int),
        ("blocks", c_int),
        ("tiles", c_int),
        ("depth", c_int),
    ]


class Ahead(Structure):
    """Memory that a launch fetches into the second-level cache for a later one; see common.cuh."""

    _fields_ = [("start", c_void_p * MAX_SEGMENTS), ("bytes", c_int * MAX_SEGMENTS)]

    @classmethod
    def of(cls, regions: Iterable[tuple[int, int]], skip: int, size: int) -> Ahead:
        """`size` bytes, as far as there are, after the first `skip` of the regions: up to four addresses and sizes."""
        value = cls()
        for i, (address, length) in enumerate(regions):
            begin, end = (min(max(at, 0), length) for at in (skip, skip + size))
            value.start[i], value.bytes[i] = address + begin, end - begin
            skip -= length
        return value


class LinearArguments(Structure):
    _fields_ = [
        ("segments", Segments),
        ("parts", Part * len(FORMATS)),
        ("input", Input),
        ("residual", c_void_p),
        ("residual_row", c_void_p),
        ("normed", c_void_p),
        ("ahead", Ahead),
    ]


class BestArguments(Structure):
    """Where the tokens of the rows' largest outputs go, of a launch that is an lm_head; see decode.cu. scratch: as of
    SamplingKernels.sample, for `vocab` entries. error: int32 [1], set where a row is not finite."""

    _fields_ = [
        ("scratch", c_void_p),
        ("error", c_void_p),
        ("tokens", Tokens),
        ("vocab", c_int),
        ("padding", c_int),
    ]


def parts_of(segments: Sequence[Segment], most_blocks: int) -> list[Part]:
    """A launch's blocks, divided such that the one with the most bytes has as few as can be. segments: by format."""
    parts: list[Part] = []
    for i, segment in enumerate(segments):
        if not parts or parts[-1].format != segment.format:
            parts.append(Part(format=segment.format, first_segment=i, blocks=1))
        parts[-1].end_segment = i + 1
        parts[-1].tiles += segment.tiles

    def bytes_of_block(part: Part) -> int:
        return -(-part.tiles // part.blocks) * (4, 2, 1)[part.format]

    for _ in range(len(parts), min(most_blocks, sum(part.tiles for part in parts))):
        max((part for part in parts if part.blocks < part.tiles), key=bytes_of_block).blocks += 1
    for part, following in itertools.pairwise(parts):
        following.first_block = part.first_block + part.blocks
    return parts


def shared_bytes(rows: int, k: int) -> int:
    """The least that a block needs: the staged rows, a pass of each of its warps."""
    return rows * (row_bytes(k) + WARPS * EXCHANGE) + WARPS * SLOT


def row_bytes(k: int) -> int:
    """Shared memory of one staged row of k values: 16 bits of high and low parts (tile.cuh)."""
    return 2 * (2 * k + 16)


def check_k(k: int, format: str, name: str) -> None:
    """Raises UserError: rows, and their scales, must start at addresses that vector loads can take."""
    multiple = 64 if format == "nvfp4" else 32
    if k % multiple:
        raise UserError(f"{name}: {k} inputs; the cuda target takes multiples of {multiple} in this format; use cpu")


class LinearDecode:
    """device_shared: bytes of shared memory that a block may have. shared_limit: of those, what is left for
    `shared_bytes`."""

    def __init__(self, module: Any, multiprocessors: int, device_shared: int) -> None:
        self.module, self.multiprocessors, self.shared_limit = module, multiprocessors, device_shared - STATIC
        self.under_way = multiprocessors * WARPS * MAX_DEPTH * PASS * TILE  # bytes, of a launch in a room

    def linear(
        self,
        given: Input,
        segments: Sequence[Segment],
        stream: int,
        residual: int | None = None,
        residual_row: int | None = None,
        normed: int | None = None,
        room: int = 0,
        best: BestArguments | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Multiplies the rows with every segment. residual: what ADD adds to, read from row *residual_row on.
        normed: where the normed rows go, float32 [T, K]. best: of a single segment without a room, also the argmax of
        its rows. room: bytes of shared memory that the kernel's only block on a multiprocessor takes at least; 0: two
        blocks, for very many tiles. ahead: what it fetches for a later launch."""
        assert 1 <= given.rows <= MAX_ROWS
        assert not best or (len(segments) == 1 and not room)
        segments = sorted(segments, key=lambda segment: int(segment.format))
        most = self.multiprocessors * (1 if room else 2)
        if best:  # whose blocks take so many tiles at a time, more than a warp has passes under way
            most = min(most, -(-segments[0].tiles // CLAIM))
        parts = parts_of(segments, most)
        arguments = LinearArguments(Segments.of(segments), input=given)
        arguments.residual, arguments.residual_row, arguments.normed = residual, residual_row, normed
        arguments.ahead = ahead or Ahead()
        own = room - STATIC if room else (self.shared_limit - STATIC) // 2 - RESERVED
        tiles = CLAIM if best else max(-(-part.tiles // part.blocks) for part in parts)
        shared = arguments.input.fit(tiles, own, self.shared_limit, passes=2 if room else 1)
        for i, part in enumerate(parts):
            part.depth = arguments.input.depth(int(part.format))
            arguments.parts[i] = part
        blocks = self.multiprocessors if room else sum(part.blocks for part in parts)
        assert len(parts) <= self.multiprocessors or not room  # a block for each format
        sets = "4" if given.rows <= SET_ROWS else "8"
        kernel = self.module.kernel(f"linear_best_{sets}" if best else f"linear_{sets}")
        all_arguments = [arguments, best] if best else [arguments]
        kernel.launch((blocks, 1, 1), (32 * WARPS, 1, 1), all_arguments, stream, shared=shared)
