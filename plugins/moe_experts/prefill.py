"""The routed experts on many rows on a GPU: launches prefill.cu. Pointers are device addresses as plain ints.

experts = PrefillExperts(Module(cached_kernels(SOURCE, "sm_90", {"NUM_EXPERTS": 256, "TOP_K": 8})), 256, 8)
experts.run(logits=…, x=…, …, scratch=buffer of experts.scratch_bytes(rows, hidden, inner), stream=stream)
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins.linear.cuda import FORMATS, STORE, SWIGLU
from plugins.linear.prefill import SHARED_BYTES, THREADS, row_tiles

SOURCE = Path(__file__).parent / "prefill.cu"
CHUNK_ROWS, TILE_PAIRS, COMBINE_THREADS = 32, 128, 256  # prefill.cu
ALIGNMENT = 256


class Grouping(Structure):
    """Where the rows go; see prefill.cu for the shapes."""

    _fields_ = [
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("counts", c_void_p),
        ("offsets", c_void_p),
        ("sorted_tokens", c_void_p),
        ("slot", c_void_p),
        ("tiles", c_void_p),
        ("tile_count", c_void_p),
    ]


class ExpertsArguments(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("source", c_void_p),
        ("tiles", c_void_p),
        ("tile_count", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("scale_2", c_void_p),
        ("out", c_void_p),
        ("format", c_int),
        ("k", c_int),
        ("n", c_int),
        ("gated", c_int),
    ]


class PrefillExperts:
    """Macros of the module: NUM_EXPERTS and TOP_K."""

    def __init__(self, module: Any, num_experts: int, top_k: int) -> None:
        self.module, self.num_experts, self.top_k = module, num_experts, top_k

    def most_tiles(self, rows: int) -> int:
        """Of any routing: an expert's pairs fill tiles but for the last."""
        pairs = rows * self.top_k
        return min(pairs, self.num_experts) + pairs // TILE_PAIRS

    def _sizes(self, rows: int) -> Iterator[tuple[str, int]]:
        """Field of Grouping -> bytes."""
        pairs, chunks = rows * self.top_k, -(-rows // CHUNK_ROWS)
        words = {"ids": pairs, "weights": pairs, "counts": chunks * self.num_experts, "offsets": self.num_experts + 1}
        words |= {"sorted_tokens": pairs, "slot": pairs, "tiles": 4 * self.most_tiles(rows), "tile_count": 1}
        for name, count in words.items():
            yield name, -(-4 * count // ALIGNMENT) * ALIGNMENT

    def grouping_bytes(self, rows: int) -> int:
        return sum(size for _, size in self._sizes(rows))

    def scratch_bytes(self, rows: int, hidden: int, inner: int) -> int:
        """Of `run` with up to so many rows: the grouping, then float16 [rows * top_k, inner] and [.., hidden]."""
        pairs = rows * self.top_k
        return self.grouping_bytes(rows) + -(-2 * pairs * inner // ALIGNMENT) * ALIGNMENT + 2 * pairs * hidden

    def grouping(self, rows: int, scratch: int) -> Grouping:
        value = Grouping()
        for name, size in self._sizes(rows):
            setattr(value, name, scratch)
            scratch += size
        return value

    def group(self, logits: int, group: Grouping, rows: int, stream: int) -> None:
        """logits float32 [rows, num_experts] -> every part of the grouping."""
        chunks = -(-rows // CHUNK_ROWS)
        grid, kernel = (chunks, 1, 1), self.module.kernel
        kernel("moe_route").launch(grid, (32 * CHUNK_ROWS, 1, 1), [c_void_p(logits), group, c_int(rows)], stream)
        threads = -(-self.num_experts // 32) * 32
        kernel("moe_offsets").launch((1, 1, 1), (threads, 1, 1), [group, c_int(chunks)], stream)
        kernel("moe_scatter").launch(grid, (256, 1, 1), [group, c_int(rows)], stream)

    def product(self, arguments: ExpertsArguments, rows: int, stream: int) -> None:
        """The kernels right before it must not be those that make the list of tiles (moe_route, moe_offsets)."""
        if arguments.format not in (FORMATS["float"], FORMATS["nvfp4"]) or arguments.k % 32:
            raise ValueError("experts are bfloat16 or NVFP4, with multiples of 32 inputs per output")
        tiles = self.most_tiles(rows) * row_tiles(arguments.n, SWIGLU if arguments.gated else STORE)
        kernel = self.module.kernel("experts_prefill")
        kernel.launch((tiles, 1, 1), (THREADS, 1, 1), [arguments], stream, shared=SHARED_BYTES)

    def run(
        self,
        *,
        logits: int,
        x: int,
        gate_up: tuple[int, int, int],
        down: tuple[int, int, int],
        format: int,
        inner: int,
        hidden: int,
        rows: int,
        shared: int,
        shared_gate: int,
        shared_gate_stride: int,
        residual: int,
        scratch: int,
        stream: int,
    ) -> None:
        """residual float32 [rows, hidden] += the routed experts of x float16 [rows, hidden], and sigmoid(shared_gate)
        times `shared` float32 [rows, hidden] unless that is 0. gate_up, down: weight, scale, scale_2."""
        group = self.grouping(rows, scratch)
        act = scratch + self.grouping_bytes(rows)
        terms = act + -(-2 * rows * self.top_k * inner // ALIGNMENT) * ALIGNMENT
        self.group(logits, group, rows, stream)
        lists = (group.tiles, group.tile_count)
        up = ExpertsArguments(x, group.sorted_tokens, *lists, *gate_up, act, format, hidden, inner, 1)
        self.product(up, rows, stream)
        self.product(ExpertsArguments(act, None, *lists, *down, terms, format, inner, hidden, 0), rows, stream)
        args = [c_void_p(residual), c_void_p(terms), group, c_void_p(shared), c_void_p(shared_gate)]
        args += [c_int(shared_gate_stride), c_int(hidden)]
        self.module.kernel("moe_combine").launch((rows, 1, 1), (COMBINE_THREADS, 1, 1), args, stream)
