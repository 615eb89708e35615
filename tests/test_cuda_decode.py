"""Linear layers and experts of 1..8 rows on a GPU (or emulated) against float64.

Tolerance 2e-5 of the largest output: activations enter as two bfloat16 of 16 bits together (2^-17), sums are float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu

from engines.cuda_model import Gpu
from plugins import nvfp4
from plugins.linear import cuda as linear
from plugins.linear.cuda import ADD, FORMATS, STORE, SWIGLU, BestArguments, Input, LinearDecode, Segment, parts_of
from plugins.moe_experts import cuda as experts
from plugins.moe_experts.cuda import DownArguments, ExpertsDecode, UpArguments
from plugins.sampling import cuda as sampling
from tests.backends import BACKENDS, Backend

RTOL = 2e-5
SHARED = 200 << 10
MULTIPROCESSORS = 3  # few, so that blocks go through several tiles


class Matrix:
    """Random weights [*shape] of a format on the device, and the float64 matrix that they stand for."""

    def __init__(self, backend: Backend, format: str, *shape: int) -> None:
        self.format = FORMATS[format]
        lead = shape[:-2]
        if format == "float":
            weight = torch.randn(*shape).bfloat16()
            self.exact = weight.double()
            stored = [weight.view(torch.int16)]
        elif format == "fp8":
            weight = (torch.randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond 464 lies NaN
            scale_2 = torch.rand((*lead, 1)) / 100
            self.exact = weight.double() * scale_2.double()
            stored = [weight.view(torch.uint8), torch.zeros(1), scale_2]
        else:
            codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
            scale = (torch.rand(*shape[:-1], shape[-1] // 16) ** 8 * 448).to(torch.float8_e4m3fn).view(torch.uint8)
            scale_2 = torch.rand(lead) / 100
            self.exact = nvfp4.dequantize(codes, scale, scale_2[..., None].expand(shape[:-1])).double()
            stored = [codes, scale, scale_2.reshape(-1)]
        self.tensors = [backend.tensor(t) for t in stored]
        self.pointers = [t.data_ptr() for t in self.tensors] + [None] * (3 - len(stored))


def segment(matrix: Matrix, out: torch.Tensor, up: Matrix | None = None, **fields: Any) -> Segment:
    weight, scale, scale_2 = matrix.pointers
    others = dict(zip(("weight_up", "scale_up", "scale_2_up"), up.pointers, strict=True)) if up else {}
    fields = {"out": out.data_ptr(), "out_stride": out.shape[-1], "n": len(matrix.exact), **others, **fields}
    return Segment(weight=weight, scale=scale, scale_2=scale_2, format=matrix.format, **fields)


def kernels(backend: Backend, shared_limit: int = SHARED, multiprocessors: int = MULTIPROCESSORS) -> LinearDecode:
    return LinearDecode(backend.module(linear.SOURCE, {}), multiprocessors, shared_limit)


def assert_close(out: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL, least: Any = 0.0) -> None:
    difference = (out.cpu().double() - expected).abs()
    scale = max(expected.abs().max(), least)
    assert not difference.isnan().any()
    assert difference.max() <= rtol * scale, (
        f"largest {difference.max() / scale:.2e}, mean {difference.mean() / scale:.2e}"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["float", "fp8", "nvfp4"])
@pytest.mark.parametrize(("k", "n"), [(64, 48), (192, 33), (640, 17), (2112, 1)])
def test_a_product(backend: Backend, format: str, k: int, n: int) -> None:
    matrix, rows = Matrix(backend, format, n, k), int(torch.randint(1, 9, ()))
    x = torch.randn(rows, k)
    out, given = backend.empty((rows, n), torch.float32), backend.tensor(x)
    arguments = Input(x=given.data_ptr(), x_stride=k, k=k, rows=rows)
    kernels(backend).linear(arguments, [segment(matrix, out)], backend.stream)
    backend.sync()
    # Of sums with a single output the largest may be small by chance: the sizes of the summands count.
    summands = (x.double().abs() @ matrix.exact.T.abs()).max() / k**0.5
    assert_close(out, x.double() @ matrix.exact.T, least=summands)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (1 + weight.double())


@given(st.lists(st.tuples(st.sampled_from(sorted(FORMATS.values())), st.integers(1, 5000)), min_size=1, max_size=4))
def test_a_launch_s_blocks_are_divided_by_format(sizes: list[tuple[int, int]]) -> None:
    """Every tile is some part's, every part has blocks of its own, and no block could be spared by another."""
    segments = [Segment(format=format, n=n) for format, n in sorted(sizes)]
    parts = parts_of(segments, 132)
    assert [int(part.tiles) for part in parts] == [
        sum(s.tiles for s in segments if s.format == format) for format in sorted({s.format for s in segments})
    ]
    assert all(1 <= part.blocks <= part.tiles for part in parts)
    firsts = [int(part.first_block) for part in parts]
    assert firsts == [sum(int(part.blocks) for part in parts[:i]) for i in range(len(parts))]
    assert sum(int(part.blocks) for part in parts) == min(132, sum(int(part.tiles) for part in parts))
    assert [i for part in parts for i in range(part.first_segment, part.end_segment)] == list(range(len(segments)))


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    st.integers(0, 3000),
    st.integers(0, 1500),
    st.integers(1, 3),
)
def test_what_is_fetched_ahead(lengths: list[int], skip: int, size: int, launches: int) -> None:
    """Launches that share regions fetch each byte after the first `skip` once, in order, and none beyond."""
    regions = [(10_000 * i, length) for i, length in enumerate(lengths, 1)]
    fetched = []
    for launch in range(launches):
        ahead = linear.Ahead.of(regions, skip + launch * size, size)
        fetched += [start + at for start, count in zip(ahead.start, ahead.bytes, strict=True) for at in range(count)]
    everything = [start + at for start, length in regions for at in range(length)]
    assert fetched == everything[skip : skip + launches * size]


class Asked:
    """A module whose kernels note the shared memory that they are launched with."""

    def __init__(self) -> None:
        self.shared: list[int] = []

    def kernel(self, name: str) -> Any:
        return self

    def launch(self, *args: Any, shared: int) -> None:
        self.shared.append(shared)


@given(
    st.sampled_from([99, 163, 227]),
    st.integers(1, 8),
    st.sampled_from([128, 256, 512]),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(0, 2),
)
def test_no_launch_takes_more_shared_memory_than_there_is(
    kilobytes: int, rows: int, num_experts: int, inner: int, shared_inner: int, which: int
) -> None:
    room = (0, *Gpu("sm_90", 132, kilobytes << 10, 1 << 20).rooms)[which]
    device, inner, shared_inner = kilobytes << 10, 64 * inner, 64 * shared_inner
    layer, mixture = LinearDecode(Asked(), 132, device), ExpertsDecode(Asked(), 132, device, num_experts, 8)
    if linear.shared_bytes(rows, inner) <= layer.shared_limit:
        layer.linear(Input(k=inner, rows=rows), [Segment(n=4096, format=2)], 0, room=room)
        assert layer.module.shared[0] + linear.STATIC <= device
        mixture.up(UpArguments(Input(k=inner, rows=rows), format=2, inner=512), 0, room=room)
        assert mixture.module.shared[0] + mixture.up_static <= device
    if mixture.fits(rows, inner, shared_inner):
        mixture.module.shared.clear()
        arguments = DownArguments(inner=inner, shared_inner=shared_inner, hidden=2048, rows=rows)
        mixture.down(arguments, 0, room=room)
        assert mixture.module.shared[0] + mixture.down_static <= device and arguments.depth >= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_residual_swiglu_ring_and_mixed_formats(backend: Backend) -> None:
    k, rows, position = 320, 5, 14
    x, weight = torch.randn(rows, k) * 30, torch.randn(k)
    matrices = [Matrix(backend, f, n, k) for f, n in (("float", 19), ("fp8", 40), ("nvfp4", 24), ("nvfp4", 24))]
    residual = torch.randn(rows, 40)
    ring = backend.tensor(torch.full((16, 19), 7.0))
    added, act = backend.tensor(residual), backend.empty((rows, 24), torch.float32)
    tensors = [backend.tensor(t) for t in (x, weight, torch.tensor([position], dtype=torch.int32))]
    normed = backend.empty((rows, k), torch.float32)
    arguments = Input(
        x=tensors[0].data_ptr(), norm_weight=tensors[1].data_ptr(), position=tensors[2].data_ptr(), epsilon=1e-6
    )
    arguments.x_stride = arguments.k = k
    arguments.rows = rows
    segments = [
        segment(matrices[0], ring, ring_mask=15),
        segment(matrices[1], added, epilogue=ADD),
        segment(matrices[2], act, up=matrices[3], epilogue=SWIGLU),
    ]
    kernels(backend).linear(arguments, segments, backend.stream, residual=added.data_ptr(), normed=normed.data_ptr())
    backend.sync()
    y = norm(x, weight, 1e-6)
    slots = [(position + t) % 16 for t in range(rows)]
    assert_close(ring[slots], y @ matrices[0].exact.T)
    assert (ring.cpu()[[s for s in range(16) if s not in slots]] == 7).all()
    assert_close(added, residual.double() + y @ matrices[1].exact.T)
    assert_close(act, silu(y @ matrices[2].exact.T) * (y @ matrices[3].exact.T))
    assert_close(normed, y, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (3, 128), (2, 64)])
def test_the_norm_per_head_in_front(backend: Backend, heads: int, dim: int) -> None:
    """As after Gated DeltaNet: x comes gated, with the squares of what it was before, in two parts a head."""
    k, rows = heads * dim, 3
    matrix = Matrix(backend, "fp8", 24, k)
    x, squares = torch.randn(rows, k), torch.rand(rows, heads, 2) * dim
    tensors = [backend.tensor(t) for t in (x, squares)]
    out = backend.empty((rows, 24), torch.float32)
    arguments = Input(x=tensors[0].data_ptr(), head_squares=tensors[1].data_ptr(), epsilon=1e-6, x_stride=k)
    arguments.head_dim, arguments.head_parts, arguments.k, arguments.rows = dim, 2, k, rows
    kernels(backend).linear(arguments, [segment(matrix, out)], backend.stream)
    backend.sync()
    factor = torch.rsqrt(squares.double().sum(-1) / dim + 1e-6)
    normed = x.double().unflatten(-1, (heads, dim)) * factor[..., None]
    assert_close(out, normed.flatten(1) @ matrix.exact.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["nvfp4", "float"])
@pytest.mark.parametrize(("n", "multiprocessors"), [(5, 3), (333, 3), (1999, 1)])
def test_the_largest_output_of_a_row(backend: Backend, format: str, n: int, multiprocessors: int) -> None:
    """The first of equals, as torch.argmax of the very outputs; a row that is not finite is token 0 and an error.

    1999 outputs are 32 groups of tiles: two blocks claim most of them."""
    k, rows = 64, int(torch.randint(1, 9, ()))
    matrix, x = Matrix(backend, format, n, k), torch.randn(rows, k)
    weight = matrix.tensors[0]
    weight[n // 2] = weight[0]
    if format == "nvfp4":
        matrix.tensors[1][n // 2] = matrix.tensors[1][0]
    kernel = kernels(backend, multiprocessors=multiprocessors)
    scratch = backend.tensor(torch.zeros(rows * (sampling.ROW_BYTES + 8 * n), dtype=torch.uint8))

    def run(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        given, error = backend.tensor(x), backend.tensor(torch.zeros(1, dtype=torch.int32))
        out, tokens = backend.empty((rows, n), torch.float32), [backend.empty((rows,), torch.int32) for _ in range(2)]
        outputs = sampling.Tokens.of([t.data_ptr() for t in tokens])
        best = BestArguments(scratch.data_ptr(), error.data_ptr(), outputs, n)
        arguments = Input(x=given.data_ptr(), x_stride=k, k=k, rows=rows)
        kernel.linear(arguments, [segment(matrix, out)], backend.stream, best=best)
        backend.sync()
        return out.cpu(), [t.cpu() for t in tokens], int(error)

    for _ in range(2):  # the scratch is zeros again
        out, tokens, error = run(x)
        assert_close(out, x.double() @ matrix.exact.index_copy(0, torch.tensor([n // 2]), matrix.exact[:1]).T)
        assert all(torch.equal(t.long(), out.argmax(-1)) for t in tokens) and not error
        assert not scratch[: sampling.ROW_BYTES].any()
    x[0, 3] = float("nan")
    _, tokens, error = run(x)
    assert tokens[0][0] == 0 and error
    assert torch.equal(tokens[0][1:].long(), out.argmax(-1)[1:])


class Mixture:
    """The weights of a layer's experts, and their launches: routing and shared expert, experts up, experts down."""

    def __init__(self, backend: Backend, format: str, shared_format: str, inner: int, shared_inner: int) -> None:
        self.backend, self.hidden, self.experts, self.top_k = backend, 128, 16, 4
        self.inner, self.shared_inner = inner, shared_inner
        h, e = self.hidden, self.experts
        self.router, self.gate = Matrix(backend, "float", e, h), Matrix(backend, "float", 1, h)
        self.gate_proj, self.up_proj = (Matrix(backend, shared_format, self.shared_inner, h) for _ in range(2))
        self.down_proj = Matrix(backend, shared_format, h, self.shared_inner)
        self.halves = [Matrix(backend, format, e, self.inner, h) for _ in range(2)]
        self.down = Matrix(backend, format, e, h, self.inner)
        self.gate_up = [
            backend.tensor(
                torch.stack([a.cpu(), b.cpu()], 1).flatten(1, 2) if a.dim() > 1 else torch.stack([a.cpu(), b.cpu()], 1)
            )
            for a, b in zip(self.halves[0].tensors, self.halves[1].tensors, strict=True)
        ]
        self.norm = torch.randn(h)

    def run(self, x: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> x with the experts added, router logits."""
        b, rows, h = self.backend, len(x), self.hidden
        out, norm_weight = b.tensor(x), b.tensor(self.norm)
        logits, gate = b.empty((rows, self.experts), torch.float32), b.empty((rows, 1), torch.float32)
        act = b.empty((rows * self.top_k, self.inner), torch.float32)
        shared_act = b.empty((rows, self.shared_inner), torch.float32)
        given = Input(x=out.data_ptr(), norm_weight=norm_weight.data_ptr(), epsilon=1e-6, x_stride=h, k=h, rows=rows)
        segments = [
            segment(self.router, logits),
            segment(self.gate_proj, shared_act, up=self.up_proj, epilogue=SWIGLU),
            segment(self.gate, gate, epilogue=STORE),
        ]
        kernels(b).linear(given, segments, b.stream)
        module = b.module(experts.SOURCE, {"NUM_EXPERTS": self.experts, "TOP_K": self.top_k})
        launcher = ExpertsDecode(module, MULTIPROCESSORS, SHARED, self.experts, self.top_k)
        pointers = [t.data_ptr() for t in self.gate_up] + [None] * (3 - len(self.gate_up))
        launcher.up(
            UpArguments(given, logits.data_ptr(), *pointers, act.data_ptr(), self.down.format, self.inner),
            b.stream,
            room=room,
        )
        launcher.down(
            DownArguments(
                logits.data_ptr(),
                *self.down.pointers,
                act.data_ptr(),
                segment(self.down_proj, out),
                shared_act.data_ptr(),
                gate.data_ptr(),
                out.data_ptr(),
                self.down.format,
                self.inner,
                self.shared_inner,
                h,
                rows,
            ),
            b.stream,
            room=room,
        )
        b.sync()
        return out.cpu(), logits.cpu()

    def expected(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        y = norm(x, self.norm, 1e-6)
        top, ids = logits.double().topk(self.top_k)
        weights = top.softmax(-1)
        out = x.double() + (y @ self.gate.exact.T).sigmoid() * (
            (silu(y @ self.gate_proj.exact.T) * (y @ self.up_proj.exact.T)) @ self.down_proj.exact.T
        )
        for t in range(len(x)):
            for j, e in enumerate(ids[t].tolist()):
                gate, up = (half.exact[e] @ y[t] for half in self.halves)
                out[t] += weights[t, j] * (self.down.exact[e] @ (silu(gate) * up))
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("format", "shared"), [("nvfp4", "nvfp4"), ("nvfp4", "fp8"), ("float", "float")])
@pytest.mark.parametrize(("inner", "shared_inner"), [(64, 64), (320, 1152), (640, 448)])
def test_a_mixture_of_experts(backend: Backend, format: str, shared: str, inner: int, shared_inner: int) -> None:
    """A room of 100 KB lets experts_down's warps have two to four passes under way."""
    mixture = Mixture(backend, format, shared, inner, shared_inner)
    x = torch.randn(8, mixture.hidden)
    x[3] = x[1]  # two rows with the same experts
    for rows in (1, 2, 5, 8):
        out, logits = mixture.run(x[:rows], room=100 << 10)
        assert_close(logits, norm(x[:rows], mixture.norm, 1e-6) @ mixture.router.exact.T)
        assert_close(out, mixture.expected(x[:rows], logits), 1e-4)  # two products, one after the other
        if rows == 1:
            alone = out
        assert torch.equal(out[0], alone[0]), "a row's bits depend on the rows beside it"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["float", "fp8", "nvfp4"])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(backend: Backend, format: str) -> None:
    k, n = 320, 40
    matrix, x, weight = Matrix(backend, format, n, k), torch.randn(8, k), torch.randn(k)
    given, norm_weight = backend.tensor(x), backend.tensor(weight)

    def run(first: int, rows: int) -> torch.Tensor:
        out = backend.empty((rows, n), torch.float32)
        at = given[first:].data_ptr()
        arguments = Input(x=at, norm_weight=norm_weight.data_ptr(), epsilon=1e-6, x_stride=k, k=k, rows=rows)
        kernels(backend).linear(arguments, [segment(matrix, out)], backend.stream)
        backend.sync()
        return out.cpu()

    every = run(0, 8)
    assert torch.equal(every, run(0, 8))
    for t in range(8):
        assert torch.equal(run(t, 1)[0], every[t])
    assert torch.equal(run(2, 3), every[2:5])
