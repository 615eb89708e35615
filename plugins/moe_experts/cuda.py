"""The routed experts and the shared one on 1..8 rows on a GPU: structures and launcher of decode.cu."""

from __future__ import annotations

from ctypes import Structure, c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins.linear.cuda import (
    MAX_DEPTH,
    MAX_EXPERTS,
    SET_ROWS,
    SLOT,
    STATIC,
    TILE,
    WARPS,
    Ahead,
    Input,
    Segment,
    row_bytes,
)

SOURCE = Path(__file__).parent / "decode.cu"
DOWN_WARPS = 8
ACT_ROWS = TILE // 2  # of the gate's rows, and of the up projection's, in a tile
PASS_BYTES = DOWN_WARPS * SLOT
UP_STATIC, DOWN_STATIC = STATIC + 1344, 10368  # bytes of shared memory that the kernels declare, and 4 for each expert
UP_DEPTH = 2  # passes that a warp has under way, at most: more come no sooner, and later the first ones


class UpArguments(Structure):
    _fields_ = [
        ("input", Input),
        ("router_logits", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("scale_2", c_void_p),
        ("act", c_void_p),
        ("format", c_int),
        ("inner", c_int),
        ("depth", c_int),
        ("padding", c_int),
        ("ahead", Ahead),
    ]


class DownArguments(Structure):
    _fields_ = [
        ("router_logits", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("scale_2", c_void_p),
        ("act", c_void_p),
        ("shared", Segment),
        ("shared_act", c_void_p),
        ("shared_gate", c_void_p),
        ("x", c_void_p),
        ("format", c_int),
        ("inner", c_int),
        ("shared_inner", c_int),
        ("hidden", c_int),
        ("rows", c_int),
        ("depth", c_int),
    ]


class ExpertsDecode:
    """Macros of the module: NUM_EXPERTS and TOP_K. device_shared: bytes of shared memory that a block may have."""

    def __init__(self, module: Any, multiprocessors: int, device_shared: int, num_experts: int, top_k: int) -> None:
        assert num_experts <= MAX_EXPERTS
        self.module, self.multiprocessors, self.device_shared = module, multiprocessors, device_shared
        self.num_experts, self.top_k = num_experts, top_k
        self.up_static, self.down_static = (static + 4 * num_experts for static in (UP_STATIC, DOWN_STATIC))

    def up(self, arguments: UpArguments, stream: int, room: int = 0) -> None:
        """room: see LinearDecode.linear."""
        assert arguments.inner % ACT_ROWS == 0
        given = arguments.input
        most = min(int(given.rows) * self.top_k, self.num_experts) * (arguments.inner // ACT_ROWS)
        own, blocks = max(room - self.up_static, 0), min(most, self.multiprocessors)
        shared = given.fit(-(-most // blocks), own, self.device_shared - self.up_static)
        arguments.depth = min(given.depth(int(arguments.format)), UP_DEPTH)
        kernel = self.module.kernel("experts_up_4" if given.rows <= SET_ROWS else "experts_up_8")
        kernel.launch((blocks, 1, 1), (32 * WARPS, 1, 1), [arguments], stream, shared=shared)

    def down(self, arguments: DownArguments, stream: int, room: int = 0) -> None:
        assert arguments.hidden % TILE == 0
        rows = int(arguments.rows)
        staged = self.staged_bytes(rows, int(arguments.inner), int(arguments.shared_inner))
        own = max(room - self.down_static, 0)
        depth = min(max((own - staged) // PASS_BYTES, 2), MAX_DEPTH)
        arguments.depth = min(depth, (self.device_shared - self.down_static - staged) // PASS_BYTES)
        shared = max(staged + int(arguments.depth) * PASS_BYTES, own)
        kernel = self.module.kernel("experts_down_4" if rows <= SET_ROWS else "experts_down_8")
        kernel.launch((arguments.hidden // TILE, 1, 1), (32 * DOWN_WARPS, 1, 1), [arguments], stream, shared=shared)

    def staged_bytes(self, rows: int, inner: int, shared_inner: int) -> int:
        """Shared memory of `down` for what its rows' experts made; passes of its warps come on top."""
        return rows * (self.top_k * row_bytes(inner) + row_bytes(shared_inner))

    def fits(self, rows: int, inner: int, shared_inner: int) -> bool:
        """Whether a block of `down` has the shared memory that it needs."""
        return self.down_static + self.staged_bytes(rows, inner, shared_inner) + PASS_BYTES <= self.device_shared
