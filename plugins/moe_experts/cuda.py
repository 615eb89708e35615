"""The routed experts and the shared one on 1..8 rows on a GPU: structures and launcher of decode.cu."""

from __future__ import annotations

from ctypes import Structure, c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins.linear.cuda import (
    BYTES,
    MAX_ROWS,
    PIPELINE,
    RESIDENT,
    TILE,
    WARPS,
    Input,
    Segment,
    best_groups,
    entries_bytes,
)

SOURCE = Path(__file__).parent / "decode.cu"
DOWN_WARPS, DOWN_DEPTH = 16, 2


class UpArguments(Structure):
    _fields_ = [
        ("input", Input),
        ("routing", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("scale_2", c_void_p),
        ("act", c_void_p),
        ("format", c_int),
        ("inner", c_int),
    ]


class DownArguments(Structure):
    _fields_ = [
        ("routing", c_void_p),
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
        ("padding", c_int),
    ]


class ExpertsDecode:
    """Macros of the module: NUM_EXPERTS and TOP_K."""

    def __init__(self, module: Any, multiprocessors: int, num_experts: int, top_k: int) -> None:
        self.module, self.multiprocessors = module, multiprocessors
        self.num_experts, self.top_k = num_experts, top_k

    def up(self, arguments: UpArguments, stream: int) -> None:
        given = arguments.input
        tiles = -(-arguments.inner // 8)
        row_bytes = int(given.k * BYTES[arguments.format])
        given.groups = groups = best_groups(self.top_k * tiles, row_bytes, self.multiprocessors)
        most = min(given.rows * self.top_k, self.num_experts) * tiles
        grid = min(-(-most // groups), RESIDENT * self.multiprocessors)
        kernel = self.module.kernel("experts_up")
        kernel.launch((grid, 1, 1), (32 * WARPS, 1, 1), [arguments], stream, shared=given.shared_bytes)

    def down(self, arguments: DownArguments, stream: int) -> None:
        rows, pairs = arguments.rows, arguments.rows * self.top_k
        entries = pairs * entries_bytes(arguments.inner) + rows * entries_bytes(arguments.shared_inner)
        parts = 4 * TILE * MAX_ROWS * (min(pairs, self.num_experts) + 1)
        grid = -(-arguments.hidden // TILE)
        kernel = self.module.kernel("experts_down")
        kernel.launch(
            (grid, 1, 1),
            (32 * DOWN_WARPS, 1, 1),
            [arguments],
            stream,
            shared=DOWN_WARPS * DOWN_DEPTH * PIPELINE + entries + parts,
        )
