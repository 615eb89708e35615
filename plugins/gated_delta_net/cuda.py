"""Launches the CUDA kernels of the Gated DeltaNet mixer, decode with deferred commit and prefill.

A layer's memory on the GPU is its recurrent_state, float32 [Hv, Dk, Dv], and a ring of projection rows, float32
[RING, row_stride]: the row of absolute position p, [qkv_in | z | b | a], lies in slot p % RING, so the pending rows
are the `commit` rows before `position`, and a rejected row is simply overwritten. Both begin as zeros.

    sizes = Sizes(num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128)
    mixer = GatedDeltaNet(Module(cached_kernels(SOURCE, "sm_90", sizes.macros())), sizes)
    mixer.decode(memory, weights, position, commit, rows=3, o=o, stream=stream)

Pointers are device addresses as plain ints, aligned to 128 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_float, c_int, c_void_p
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parent / "kernel.cu"
RING = 32  # slots: eight pending rows, the convolution's three before them, eight new ones, to a power of two
MAX_ROWS = 8  # of a decode call, and of its pending rows
HEADS_PER_BLOCK = 8  # a warp each, in the kernels of a prefill that are no recurrence
ROWS_PER_BLOCK = 8  # of gdn_prefill_conv


@dataclass(frozen=True)
class Sizes:
    """Of a layer. A row holds qkv_in from 0, z from z_offset, b from b_offset, a from a_offset (in floats)."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Sizes:
        """Of the ops' attributes."""
        return cls(*(attributes[field.name] for field in fields(cls)))

    @property
    def key_width(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def value_width(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def z_offset(self) -> int:
        return 2 * self.key_width + self.value_width

    @property
    def b_offset(self) -> int:
        return self.z_offset + self.value_width

    @property
    def a_offset(self) -> int:
        return self.b_offset + self.num_v_heads

    @property
    def places(self) -> dict[str, int]:
        """Where the outputs of in_proj_<name> stand in a row."""
        return {"qkv": 0, "z": self.z_offset, "b": self.b_offset, "a": self.a_offset}

    @property
    def row_stride(self) -> int:
        """Floats from one row to the next, whole cache lines."""
        return -(-(self.a_offset + self.num_v_heads) // 32) * 32

    def macros(self) -> dict[str, int | str]:
        return {"RING": RING, **{name.upper(): value for name, value in asdict(self).items()}}


class Memory(NamedTuple):
    """Of one layer: ring float32 [RING, row_stride], recurrent_state float32 [Hv, Dk, Dv]."""

    ring: int
    recurrent_state: int


WEIGHT_NAMES = ("conv1d.weight", "A_log", "dt_bias", "norm.weight")  # in a checkpoint


class Weights(NamedTuple):
    """Of one layer, float32: conv_weight [C, 4], A_log and dt_bias [Hv], norm_weight [Dv]."""

    conv_weight: int
    A_log: int
    dt_bias: int
    norm_weight: int


class GatedDeltaNet:
    def __init__(self, module: Any, sizes: Sizes) -> None:
        self.module, self.sizes = module, sizes
        columns = 16 if sizes.head_v_dim % 32 else 32  # of the state, for a block
        lanes = 4 if sizes.head_k_dim % 32 else 8
        self._grid = (sizes.head_v_dim // columns, sizes.num_v_heads, 1)
        self._block = (columns * lanes, 1, 1)
        slot = 2 * sizes.head_k_dim + columns + 4  # floats of a prepared row (recurrence.cuh)
        # Bytes of shared memory that gdn_decode declares.
        self._static = 4 * (sizes.head_k_dim * columns + MAX_ROWS * (slot + columns))

    def decode(
        self,
        memory: Memory,
        weights: Weights,
        position: int,
        commit: int,
        rows: int,
        y: int,
        squares: int,
        stream: int,
        room: int = 0,
    ) -> None:
        """Applies the pending rows to the state, then runs `rows` rows on top of it: y float32 [rows, Hv Dv], gated but
        not yet divided by the root mean square of its head; squares float32 [rows, Hv, head_parts], whose sums over
        the last dimension are the sums of squares that go into that. Kernels launched since the last late one
        (common.cuh) may write the rows' slots of the ring, but neither the scalars `position` (of row 0) and `commit`
        (int32, 0..8) nor an older row, and may not touch the state. room: see LinearDecode.linear."""
        assert 0 <= rows <= MAX_ROWS
        given = (memory.ring, *weights[:3], memory.recurrent_state, position, commit, weights.norm_weight)
        args = [*map(c_void_p, given), c_int(rows), c_void_p(y), c_void_p(squares)]
        shared = max(room - self._static, 0)
        self.module.kernel("gdn_decode").launch(self._grid, self._block, args, stream, shared=shared)

    @property
    def head_parts(self) -> int:
        return self._grid[0]

    def scratch_bytes(self, rows: int) -> int:
        """Of a prefill of so many rows: keys [rows, Hk, 2, Dk], values [rows, Hv Dv], gates [rows, Hv, 4]."""
        sizes = self.sizes
        return 4 * rows * (2 * sizes.key_width + sizes.value_width + 4 * sizes.num_v_heads)

    def prefill(
        self,
        projections: int,
        memory: Memory,
        weights: Weights,
        position: int,
        commit: int,
        rows: int,
        y: int,
        epsilon: float,
        scratch: int,
        stream: int,
    ) -> None:
        """Commits the pending rows, then the chunk's own: projections float32 [rows, row_stride] from `position` on ->
        y float16 [rows, Hv Dv], normed and gated. The ring then holds the chunk's last rows as history; nothing is
        pending: the caller's `commit` is for it to clear. As for `decode`, kernels since the last late one may
        write projections only."""
        sizes, kernel = self.sizes, self.module.kernel
        keys = c_void_p(scratch)
        values = c_void_p(scratch + 4 * rows * 2 * sizes.key_width)  # o takes their place
        gates = c_void_p(scratch + 4 * rows * (2 * sizes.key_width + sizes.value_width))
        warps = (32 * HEADS_PER_BLOCK, 1, 1)

        self.decode(memory, weights, position, commit, rows=0, y=0, squares=0, stream=stream)
        args = [projections, memory.ring, *weights[:3], position]
        grid = (-(-rows // ROWS_PER_BLOCK), -(-(sizes.num_k_heads + sizes.num_v_heads) // HEADS_PER_BLOCK), 1)
        kernel("gdn_prefill_conv").launch(grid, warps, [*map(c_void_p, args), c_int(rows), keys, values, gates], stream)
        recur = [keys, values, gates, c_int(rows), c_void_p(memory.recurrent_state), values]
        kernel("gdn_prefill_recur").launch(self._grid, self._block, recur, stream)
        gate = [values, c_void_p(projections), c_void_p(weights.norm_weight), c_float(epsilon), c_void_p(position)]
        grid = (rows, -(-sizes.num_v_heads // HEADS_PER_BLOCK), 1)
        ring = c_void_p(memory.ring)
        kernel("gdn_prefill_gate").launch(grid, warps, [*gate, c_int(rows), c_void_p(y), ring], stream)
