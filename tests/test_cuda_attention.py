"""The kernels of gated attention against the op's reference in float64, on the emulator and on a GPU.

The products take the cache's rounded keys and values, so `y` is held against a reference over what the kernels put into
the cache, and the cache itself against the reference's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from plugins import rms_norm
from plugins.gated_attention import append_reference, attention_reference, inverse_frequencies, rotate
from plugins.gated_attention.cuda import DECODE_SOURCE, PREFILL_SOURCE, Decode, Prefill, Sizes
from tests.backends import BACKENDS, GPU, Backend

ROPE_THETA, EPSILON = 1e7, 1e-6
DEMO = Sizes(4, 2, 64, 16)
GROUPS = [DEMO, Sizes(2, 2, 32, 8), Sizes(3, 1, 48, 48), Sizes(8, 1, 16, 4), Sizes(16, 1, 128, 32)]
SIZES = [*GROUPS, Sizes(4, 2, 64, 16, fp8=True), Sizes(3, 1, 48, 12, fp8=True)]
REAL = [Sizes(16, 2, 256, 64), Sizes(16, 2, 256, 64, fp8=True)]
SHARED_LIMIT = 99 << 10


def name(sizes: Sizes) -> str:
    return f"{sizes.num_heads}-{sizes.num_kv_heads}-{sizes.head_dim}" + "-fp8" * sizes.fp8


@dataclass
class Inputs:
    q_gate: torch.Tensor  # [T, Hq 2D]
    k: torch.Tensor  # [T, Hkv D]
    v: torch.Tensor

    def rows(self, start: int, stop: int) -> Inputs:
        return Inputs(self.q_gate[start:stop], self.k[start:stop], self.v[start:stop])


class Layer:
    """One layer's weights and its cache on the device, poisoned behind `length` slots."""

    def __init__(self, backend: Backend, sizes: Sizes, length: int, capacity: int, multiprocessors: int = 3) -> None:
        self.backend, self.sizes, self.capacity = backend, sizes, capacity
        self.decode = Decode(backend.module(DECODE_SOURCE, sizes.defines), sizes, multiprocessors, SHARED_LIMIT)
        self.prefill = Prefill(backend.module(PREFILL_SOURCE, sizes.defines), sizes)
        self.q_norm, self.k_norm = torch.randn(sizes.head_dim) * 0.5, torch.randn(sizes.head_dim) * 0.5
        dtype = torch.float8_e4m3fn if sizes.fp8 else torch.float16
        cache = torch.randn(2, sizes.num_kv_heads, capacity, sizes.head_dim).to(dtype)
        cache.view(torch.uint8)[:, :, length:] = 0x7F  # NaN
        self.cache = backend.tensor(cache.view(torch.uint8)).view(dtype)
        self.constants = {
            "q_norm": backend.tensor(self.q_norm),
            "k_norm": backend.tensor(self.k_norm),
            "inverse_frequencies": backend.tensor(inverse_frequencies(sizes.rotary_dim, ROPE_THETA)),
        }
        self.scratch = backend.empty((self.decode.scratch_bytes(capacity) // 4,), torch.float32)

    def inputs(self, rows: int) -> Inputs:
        heads, kv_heads, dim = self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.head_dim
        return Inputs(*(torch.randn(rows, width * dim) for width in (2 * heads, kv_heads, kv_heads)))

    def _launch(self, launch: Any, position: int, constants: tuple[str, ...], **arguments: Any) -> None:
        held = [self.backend.tensor(torch.tensor([position - 5], dtype=torch.int32))]
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor):
                held.append(value)
                arguments[key] = value.data_ptr()
        launch(
            **{key: self.constants[key].data_ptr() for key in constants},
            position=held[0].data_ptr(),
            position_offset=5,
            kv_cache=self.cache.data_ptr(),
            capacity=self.capacity,
            epsilon=EPSILON,
            stream=self.backend.stream,
            **arguments,
        )
        self.backend.sync()

    def _strided(self, rows: torch.Tensor) -> torch.Tensor:
        """On the device, each row followed by NaN: the stride is not the width."""
        padded = torch.full((len(rows), rows.shape[1] + 8), float("nan"))
        padded[:, : rows.shape[1]] = rows
        return self.backend.tensor(padded)

    def run_decode(
        self, inputs: Inputs, position: int, query_row: int | None = None, short_tiles: int | None = None
    ) -> torch.Tensor:
        q_gate, k, v = self._strided(inputs.q_gate), self._strided(inputs.k), self._strided(inputs.v)
        count = len(k) if query_row is None else 1
        y = self.backend.empty((count, self.sizes.num_heads * self.sizes.head_dim), torch.float32)
        row = 0 if query_row is None else self.backend.tensor(torch.tensor([query_row], dtype=torch.int32))
        arguments = {"q_gate": q_gate, "q_stride": q_gate.shape[1], "query_row": row, "scratch": self.scratch, "y": y}
        arguments |= {"k": k, "k_stride": k.shape[1], "v": v, "v_stride": v.shape[1], "rows": len(k)}
        constants = ("q_norm", "k_norm", "inverse_frequencies")
        self._launch(self.decode.launch, position, constants, short_tiles=short_tiles, **arguments)
        return y.cpu()

    def run_append(self, inputs: Inputs, position: int) -> None:
        k, v = self._strided(inputs.k), self._strided(inputs.v)
        arguments = {"k": k, "k_stride": k.shape[1], "v": v, "v_stride": v.shape[1], "rows": len(k)}
        self._launch(self.prefill.append, position, ("k_norm", "inverse_frequencies"), **arguments)

    def run_prefill(self, inputs: Inputs, position: int) -> torch.Tensor:
        self.run_append(inputs, position)
        q_gate = self._strided(inputs.q_gate)
        y = self.backend.empty((len(q_gate), self.sizes.num_heads * self.sizes.head_dim), torch.float16)
        arguments = {"q_gate": q_gate, "q_stride": q_gate.shape[1], "rows": len(q_gate), "y": y}
        self._launch(self.prefill.attend, position, ("q_norm", "inverse_frequencies"), **arguments)
        return y.cpu()

    @property
    def attributes(self) -> dict[str, Any]:
        sizes = self.sizes
        return {
            "num_heads": sizes.num_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
            "rotary_dim": sizes.rotary_dim,
            "rope_theta": ROPE_THETA,
            "epsilon": EPSILON,
        }

    def expected(self, inputs: Inputs, position: int) -> torch.Tensor:
        """float64 [T, Hq D], over the cache as it is now."""
        heads, dim, rows = self.sizes.num_heads, self.sizes.head_dim, len(inputs.k)
        q, gate = inputs.q_gate.double().unflatten(-1, (heads, 2 * dim)).chunk(2, dim=-1)
        q = rms_norm.reference(q, self.q_norm.double(), epsilon=EPSILON)
        q = rotate(q, torch.tensor([position]), self.sizes.rotary_dim, ROPE_THETA)
        slots = self.cache.cpu()[:, :, : position + rows].double()
        keys, values = slots.repeat_interleave(self.sizes.group, dim=1)
        scores = torch.einsum("thd,hsd->ths", q, keys) * dim**-0.5
        hidden = torch.arange(position + rows)[None] > (position + torch.arange(rows))[:, None]
        weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        return (torch.einsum("ths,hsd->thd", weights, values) * gate.sigmoid()).flatten(1)

    def bytes(self) -> torch.Tensor:
        return self.cache.view(torch.uint8).cpu()

    def check_cache(self, before: torch.Tensor, inputs: Inputs, position: int) -> None:
        """The new rows as the reference has them, rounded; all other slots untouched."""
        rows, cache = len(inputs.k), self.cache.cpu()
        after = self.bytes()
        after[:, :, position : position + rows] = before[:, :, position : position + rows]
        assert torch.equal(after, before), "slots of other positions changed"
        old = torch.zeros(cache.shape, dtype=torch.float64)
        k, v, norm = inputs.k.double(), inputs.v.double(), self.k_norm.double()
        attributes = {key: value for key, value in self.attributes.items() if key != "num_heads"}
        expected = append_reference(k, v, norm, torch.tensor([position]), old, **attributes)
        new, expected = cache[:, :, position : position + rows], expected[:, :, position : position + rows]
        largest = 448.0 if self.sizes.fp8 else 65504.0
        values = expected[1].float().clamp(-largest, largest).to(cache.dtype)
        assert torch.equal(new[1].view(torch.uint8), values.view(torch.uint8)), "values are rounded, nothing else"
        # Half a step of the format, and a little for the key's own float32 arithmetic.
        step, least = (2**-4, 2**-10) if self.sizes.fp8 else (2**-11, 2**-25)
        error = (new[0].double() - expected[0]).abs() - expected[0].abs().clamp(max=largest) * (step + 1e-5) - least
        assert error.max() <= 1e-6


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"largest error {error:.2e} of the largest value"


# Decode: sums in float32, queries and weights as two halves. 2^x and a score's sum have a few units in the last place
# of a score (up to about 30), which is a relative error of the weight.
DECODE_TOLERANCE = 1e-5
# Prefill: queries, weights and y are rounded to float16. 2^-11 of each of the products in a score that cancel in part,
# a few parts in a thousand of a single weight.
PREFILL_TOLERANCE = 2e-3


@pytest.mark.parametrize("sizes", SIZES, ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode(backend: Backend, sizes: Sizes) -> None:
    for rows, position in [(1, 0), (2, 63), (3, 64), (8, 61), (1, 127), (5, 126), (4, 333)]:
        layer = Layer(backend, sizes, position, 384)
        inputs, before = layer.inputs(rows), layer.bytes()
        y = layer.run_decode(inputs, position)
        layer.check_cache(before, inputs, position)
        close(y, layer.expected(inputs, position), DECODE_TOLERANCE)
        cache = layer.bytes()
        layer.run_append(inputs, position)
        assert torch.equal(layer.bytes(), cache), "append and decode write the same keys and values"
        assert torch.equal(layer.run_decode(inputs, position), y)  # the emulator now runs the threads in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_is_the_op(backend: Backend) -> None:
    """Against the op's own reference, whose new rows are not rounded: what float16 makes of keys and values."""
    layer, position = Layer(backend, DEMO, 70, 128), 70
    inputs, old = layer.inputs(3), layer.cache.cpu().double().nan_to_num()
    q_gate, k, v = inputs.q_gate.double(), inputs.k.double(), inputs.v.double()
    norms = layer.q_norm.double(), layer.k_norm.double()
    expected, _ = attention_reference(q_gate, k, v, *norms, torch.tensor([position]), old, **layer.attributes)
    close(layer.run_decode(inputs, position), expected, 1e-3)


@pytest.mark.parametrize("sizes", [DEMO, Sizes(16, 1, 32, 8), Sizes(4, 2, 64, 16, fp8=True)], ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_depend_on_position_alone(backend: Backend, sizes: Sizes) -> None:
    """Eight rows at once, one by one, over groups of tiles, in pieces of fewer rows, on another grid."""
    position, rows = 59, 8
    layer = Layer(backend, sizes, position, 640)
    for start in (position, 508):  # a row's last tile is the first or the last of a group of four
        inputs, before = layer.inputs(rows), layer.cache.clone()
        if start != position:
            before[:, :, position:start] = torch.randn(*before[:, :, position:start].shape).to(before.dtype)
            layer.cache.copy_(before)
        y, cache = layer.run_decode(inputs, start), layer.bytes()
        assert y.isfinite().all()

        layer.cache.copy_(before)
        assert torch.equal(layer.run_decode(inputs, start, short_tiles=0), y)

        for pieces in ([1] * 8, [3, 5]):
            layer.cache.copy_(before)
            ends = torch.tensor(pieces).cumsum(0).tolist()
            parts = [(inputs.rows(end - n, end), start + end - n) for n, end in zip(pieces, ends, strict=True)]
            for short in (None, 0):
                assert torch.equal(torch.cat([layer.run_decode(*part, short_tiles=short) for part in parts]), y)
            assert torch.equal(layer.bytes(), cache)

        layer.cache.copy_(before)
        layer.decode.multiprocessors, layer.decode.rows_per_launch = 1, 3
        layer.scratch = backend.empty((layer.decode.scratch_bytes(640) // 4,), torch.float32)
        assert torch.equal(layer.run_decode(inputs, start), y)
        assert torch.equal(layer.bytes(), cache)
        layer.decode.multiprocessors, layer.decode.rows_per_launch = 3, min(8, 64 // sizes.group)
        layer.scratch = backend.empty((layer.decode.scratch_bytes(640) // 4,), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_row(backend: Backend) -> None:
    """One row attends, as among all; the keys and values of all rows are appended."""
    for position, rows in [(0, 3), (62, 5), (250, 8)]:
        layer = Layer(backend, DEMO, position, 320)
        inputs, before = layer.inputs(rows), layer.cache.clone()
        y, cache = layer.run_decode(inputs, position), layer.bytes()
        for row in {0, rows // 2, rows - 1}:
            layer.cache.copy_(before)
            for short in (None, 0):
                only = layer.run_decode(inputs, position, query_row=row, short_tiles=short)
                assert torch.equal(only, y[row : row + 1])
            assert torch.equal(layer.bytes(), cache)


@pytest.mark.parametrize("sizes", SIZES, ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_in_chunks_then_decode(backend: Backend, sizes: Sizes) -> None:
    layer = Layer(backend, sizes, 0, 192)
    inputs = layer.inputs(140)
    ends = [0, 70, 71, 137]
    parts = []
    for start, end in pairwise(ends):
        chunk, before = inputs.rows(start, end), layer.bytes()
        parts.append(layer.run_prefill(chunk, start))
        layer.check_cache(before, chunk, start)
    close(torch.cat(parts), layer.expected(inputs.rows(0, 137), 0), PREFILL_TOLERANCE)

    chunk, before = inputs.rows(137, 140), layer.cache.clone()
    y = layer.run_decode(chunk, 137)
    close(y, layer.expected(chunk, 137), DECODE_TOLERANCE)
    cache = layer.bytes()
    layer.cache.copy_(before)
    close(layer.run_prefill(chunk, 137), y.double(), PREFILL_TOLERANCE)
    assert torch.equal(layer.bytes(), cache), "decode and prefill write the same keys and values"

    whole = Layer(backend, sizes, 0, 192)
    whole.constants = layer.constants
    y = whole.run_prefill(inputs.rows(0, 137), 0)
    assert torch.equal(y, torch.cat(parts)), "a row's bits do not depend on its chunk"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_e4m3_code(backend: Backend) -> None:
    """Values on, between and beyond the codes are rounded to nearest even, with saturation."""
    sizes = Sizes(2, 1, 256, 8, fp8=True)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    steps = codes.abs().clamp(min=2**-6).log2().floor().exp2() / 8
    inputs = Inputs(torch.randn(5, 1024), torch.randn(5, 256), torch.stack([codes + steps * x for x in (0, 0.5, 0.49)]))
    inputs.v = torch.cat([inputs.v, codes[None] - steps / 2, codes[None] * 1e6])
    layer = Layer(backend, sizes, 0, 64)
    before = layer.bytes()
    layer.run_append(inputs, 3)
    layer.check_cache(before, inputs, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sizes", REAL, ids=name)
def test_real_sizes(sizes: Sizes) -> None:
    properties: Any = torch.cuda.get_device_properties(0)
    shared_limit = properties.shared_memory_per_block_optin
    for rows, position in [(1, 4095), (5, 4094), (8, 8191), (3, 40000)]:
        layer = Layer(GPU, sizes, position, 40960, properties.multi_processor_count)
        layer.decode = Decode(layer.decode.module, sizes, properties.multi_processor_count, shared_limit)
        layer.scratch = GPU.empty((layer.decode.scratch_bytes(40960) // 4,), torch.float32)
        inputs, before = layer.inputs(rows), layer.cache.clone()
        y = layer.run_decode(inputs, position)
        close(y, layer.expected(inputs, position), DECODE_TOLERANCE)
        layer.cache.copy_(before)
        single = [layer.run_decode(inputs.rows(t, t + 1), position + t) for t in range(rows)]
        assert torch.equal(torch.cat(single), y)
    layer = Layer(GPU, sizes, 1000, 4096)
    inputs = layer.inputs(1500)
    close(layer.run_prefill(inputs, 1000), layer.expected(inputs, 1000), PREFILL_TOLERANCE)
