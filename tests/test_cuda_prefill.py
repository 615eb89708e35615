"""Linear layers and experts of many rows on a GPU (or emulated) against float64.

Tolerances, of the largest output. float32 results 2e-5: rows and weights are exact in float16 (bfloat16 ones of the
tests but for a few subnormals), and a tensor core cuts off, rather than rounds, each sum of sixteen products. float16
results 7e-4: their own rounding is 2^-11 of the value. Experts 2e-3: float16 between the products and after them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from plugins import moe_experts, rms_norm
from plugins.linear import prefill as linear
from plugins.linear.cuda import ADD, FORMATS, STORE, SWIGLU, Segment
from plugins.linear.prefill import PrefillLinear
from plugins.moe_experts import prefill as experts
from plugins.moe_experts.prefill import Grouping, PrefillExperts
from tests.backends import BACKENDS, Backend
from tests.test_cuda_decode import Matrix, assert_close, segment

HALF_RTOL, EXPERTS_RTOL = 7e-4, 2e-3


def kernels(backend: Backend) -> PrefillLinear:
    return PrefillLinear(backend.module(linear.SOURCE, {}))


def multiply(backend: Backend, x: Tensor, segments: list[Segment], **options: Any) -> None:
    given, (rows, k) = backend.tensor(x), x.shape
    kernels(backend).linear(given.data_ptr(), 0, segments, rows, k, backend.stream, **options)
    backend.sync()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["float", "fp8", "nvfp4"])
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 32, 1), (5, 64, 48), (33, 96, 33), (130, 256, 17), (17, 544, 131), (2, 2112, 40)]
)
def test_a_product(backend: Backend, format: str, rows: int, k: int, n: int) -> None:
    matrix, x = Matrix(backend, format, n, k), torch.randn(rows, k).half()
    out = backend.empty((rows, n), torch.float32)
    multiply(backend, x, [segment(matrix, out)])
    assert_close(out, x.double() @ matrix.exact.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_and_scale_is_exact(backend: Backend) -> None:
    """NVFP4 with scales of both signs, and FP8, times rows of the identity."""
    codes = torch.randint(0, 256, (256, 32), dtype=torch.uint8)
    codes[:, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 4)
    scale[scale & 0x7F == 0x7F] = 0  # NaN
    nvfp4, fp8 = Matrix(backend, "nvfp4", 256, 64), Matrix(backend, "fp8", 256, 64)
    bytes8 = scale.repeat(1, 16)
    for matrix, stored in ((nvfp4, (codes, scale)), (fp8, (bytes8,))):
        for tensor, values in zip(matrix.tensors, stored, strict=False):
            tensor.copy_(values)
        matrix.tensors[-1].fill_(1.0)
    outs = [backend.empty((64, 256), torch.float32) for _ in range(2)]
    multiply(backend, torch.eye(64).half(), [segment(m, o) for m, o in zip((nvfp4, fp8), outs, strict=True)])
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=2).view(256, 64)
    expected = values * scale.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=1)
    assert torch.equal(outs[0].cpu().T, expected)
    assert torch.equal(outs[1].cpu().T, bytes8.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_segments(backend: Backend) -> None:
    """STORE into wider rows, ADD, SWIGLU of an odd size, and formats that differ, in one launch."""
    rows, k = 37, 320
    x, residual = torch.randn(rows, k).half() * 0.3, torch.randn(rows, 140)
    matrices = [Matrix(backend, f, n, k) for f, n in (("float", 19), ("fp8", 140), *[("nvfp4", 71)] * 2, ("fp8", 64))]
    matrices += [Matrix(backend, "fp8", 64, k)]
    wide, added = backend.tensor(torch.full((rows, 29), 7.0)), backend.tensor(residual)
    acts = [backend.empty((rows, n), torch.float16) for n in (71, 64)]
    segments = [
        segment(matrices[0], wide),
        segment(matrices[1], added, epilogue=ADD),
        segment(matrices[2], acts[0], up=matrices[3], epilogue=SWIGLU),
        segment(matrices[4], acts[1], up=matrices[5], epilogue=SWIGLU),
    ]
    multiply(backend, x, segments)
    y = x.double()
    assert_close(wide[:, :19], y @ matrices[0].exact.T)
    assert (wide[:, 19:] == 7).all()
    assert_close(added, residual.double() + y @ matrices[1].exact.T)
    for act, gate, up in zip(acts, matrices[2::2], matrices[3::2], strict=True):
        assert_close(act, silu(y @ gate.exact.T) * (y @ up.exact.T), HALF_RTOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "hidden"), [(9, 576), (70, 1280)])
def test_norm_and_precise_products(backend: Backend, rows: int, hidden: int) -> None:
    """What float16 rounds off the normed rows counts where a segment is precise, and only there."""
    x, weight = torch.randn(rows, hidden + 4) * 30, torch.randn(hidden)
    matrices = [Matrix(backend, format, 40, hidden) for format in ("float", "nvfp4", "fp8")]
    x_device, weight_device = backend.tensor(x), backend.tensor(weight)
    halves = [backend.empty((rows, hidden), torch.float16) for _ in range(3)]
    exact = backend.empty((rows, hidden), torch.float32)
    outs = [backend.empty((rows, 40), torch.float32) for _ in range(3)]
    hi, lo, alone = (t.data_ptr() for t in halves)
    launch, stream = kernels(backend), backend.stream
    launch.norm(
        *(x_device.data_ptr(), weight_device.data_ptr(), hi, rows, hidden, 1e-6, stream),
        lo=lo,
        exact=exact.data_ptr(),
        x_stride=hidden + 4,
    )
    launch.norm(x_device.data_ptr(), weight_device.data_ptr(), alone, rows, hidden, 1e-6, stream, x_stride=hidden + 4)
    segments = [segment(m, o, precise=int(m.format != FORMATS["fp8"])) for m, o in zip(matrices, outs, strict=True)]
    launch.linear(hi, lo, segments, rows, hidden, stream)
    backend.sync()
    y = rms_norm.reference(x[:, :hidden].double(), weight.double(), epsilon=1e-6)
    assert_close(exact, y, 1e-6)
    assert torch.equal(halves[0].cpu(), exact.cpu().half())
    assert torch.equal(halves[1].cpu(), (exact.cpu() - halves[0].cpu().float()).half())
    assert torch.equal(halves[0].cpu(), halves[2].cpu())
    for matrix, out in zip(matrices[:2], outs, strict=False):
        assert_close(out, y @ matrix.exact.T, 1e-5)  # twice as many sums as one product, but none of the rounding
    assert_close(outs[2], halves[0].cpu().double() @ matrices[2].exact.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["float", "fp8", "nvfp4"])
def test_a_row_does_not_depend_on_the_others(backend: Backend, format: str) -> None:
    matrix, x = Matrix(backend, format, 20, 192), torch.randn(129, 192).half()
    outs = []
    for chosen, tile in ((x, 128), (x, 96), (x, 64), (x[:50], 32), (x[:1], 128)):
        outs.append(backend.empty((len(chosen), 20), torch.float32))
        multiply(backend, chosen, [segment(matrix, outs[-1])], tile_tokens=tile)
    for out in outs[1:]:
        assert torch.equal(out, outs[0][: len(out)])


# ---- experts ---------------------------------------------------------------------------------------------------------


def read(backend: Backend, scratch: Tensor, address: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    assert address is not None
    at = address - scratch.data_ptr()
    count = torch.Size(shape).numel() * dtype.itemsize
    return scratch[at : at + count].view(dtype).view(*shape).cpu()


def check_grouping(backend: Backend, scratch: Tensor, group: Grouping, logits: Tensor, top_k: int) -> None:
    rows, num_experts = logits.shape
    ids = read(backend, scratch, group.ids, (rows, top_k), torch.int32).long()
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids, order)
    weights = read(backend, scratch, group.weights, (rows, top_k), torch.float32)
    assert_close(weights, torch.softmax(logits.double().gather(1, order), dim=-1), 1e-6)
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    offsets = read(backend, scratch, group.offsets, (num_experts + 1,), torch.int32)
    assert torch.equal(offsets.long(), torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]))
    places = torch.argsort(ids.flatten(), stable=True)
    assert torch.equal(
        read(backend, scratch, group.sorted_tokens, (rows * top_k,), torch.int32).long(), places // top_k
    )
    slot = read(backend, scratch, group.slot, (rows * top_k,), torch.int32).long()
    assert torch.equal(slot[places], torch.arange(rows * top_k))
    count = int(read(backend, scratch, group.tile_count, (1,), torch.int32))
    covered: list[int] = []
    for expert, first, size, _ in read(backend, scratch, group.tiles, (count, 4), torch.int32).tolist():
        assert 0 < size <= 128 and offsets[expert] <= first and first + size <= offsets[expert + 1]
        covered += range(first, first + size)
    assert covered == list(range(rows * top_k))


def routing(kind: str, rows: int, num_experts: int) -> Tensor:
    logits = torch.randn(rows, num_experts)
    if kind == "one":
        logits[:, 3] += 20
    elif kind == "few":  # most experts get no row
        logits[:, 2:6] += 20
    else:  # ties, also of zeros of both signs
        logits = logits.round() * torch.tensor([1.0, -1.0]).repeat(num_experts)[:num_experts]
        logits[logits == 0] = 0.0
    return logits


class Experts:
    """Random experts, and `run` on rows of x with a shared expert's output."""

    def __init__(self, backend: Backend, format: str, num_experts: int, top_k: int, hidden: int, inner: int) -> None:
        self.backend, self.format, self.hidden, self.inner = backend, FORMATS[format], hidden, inner
        self.gate_up = Matrix(backend, format, num_experts, 2 * inner, hidden)
        self.down = Matrix(backend, format, num_experts, hidden, inner)
        if format == "nvfp4":
            pairs = torch.rand(num_experts, 2) / 100
            factors = (pairs / self.gate_up.tensors[2].cpu()[:, None]).double().repeat_interleave(inner, dim=1)
            self.gate_up.exact = self.gate_up.exact * factors[..., None]
            self.gate_up.tensors[2] = backend.tensor(pairs)
            self.gate_up.pointers[2] = self.gate_up.tensors[2].data_ptr()
        module = backend.module(experts.SOURCE, {"NUM_EXPERTS": num_experts, "TOP_K": top_k})
        self.kernels = PrefillExperts(module, num_experts, top_k)

    def run(self, logits: Tensor, x: Tensor, shared: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        backend, rows = self.backend, len(x)
        given = [backend.tensor(t) for t in (logits, x, shared, gate, residual)]
        size = self.kernels.scratch_bytes(rows, self.hidden, self.inner)
        self.scratch = backend.empty((size,), torch.uint8)
        logits_at, x_at, shared_at, gate_at, residual_at = (t.data_ptr() for t in given)
        gate_up, down = ((p[0] or 0, p[1] or 0, p[2] or 0) for p in (self.gate_up.pointers, self.down.pointers))
        self.kernels.run(
            logits=logits_at,
            x=x_at,
            gate_up=gate_up,
            down=down,
            format=self.format,
            inner=self.inner,
            hidden=self.hidden,
            rows=rows,
            shared=shared_at,
            shared_gate=gate_at,
            shared_gate_stride=gate.shape[1],
            residual=residual_at,
            scratch=self.scratch.data_ptr(),
            stream=backend.stream,
        )
        backend.sync()
        return given[4].cpu()

    def expected(self, logits: Tensor, x: Tensor, shared: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        top, ids = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
        k = self.kernels.top_k
        routed = moe_experts.mixture(
            *(x.double(), torch.softmax(top[:, :k], dim=-1), ids[:, :k]),
            lambda e: (self.gate_up.exact[e], self.down.exact[e]),
        )
        return residual.double() + routed + torch.sigmoid(gate[:, :1].double()) * shared.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["float", "nvfp4"])
@pytest.mark.parametrize(
    ("kind", "rows", "num_experts", "top_k", "hidden", "inner"),
    [
        ("one", 150, 5, 1, 96, 32),
        *[("one", rows, 5, 1, 64, 32) for rows in (45, 90, 128)],
        ("few", 70, 40, 3, 160, 96),
        ("ties", 33, 16, 4, 256, 64),
        ("ties", 1, 8, 8, 32, 32),
    ],
)
def test_experts(
    backend: Backend, format: str, kind: str, rows: int, num_experts: int, top_k: int, hidden: int, inner: int
) -> None:
    model = Experts(backend, format, num_experts, top_k, hidden, inner)
    logits, x = routing(kind, rows, num_experts), torch.randn(rows, hidden).half() * 0.1
    inputs = (logits, x, torch.randn(rows, hidden), torch.randn(rows, 3), torch.randn(rows, hidden))
    out = model.run(*inputs)
    assert_close(out, model.expected(*inputs), EXPERTS_RTOL)
    check_grouping(backend, model.scratch, model.kernels.grouping(rows, model.scratch.data_ptr()), logits, top_k)
    few = max(1, rows // 4)
    assert torch.equal(model.run(*(t[:few] for t in inputs)), out[:few]), "a row depends on the others"


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouping_of_many_rows(backend: Backend) -> None:
    rows, num_experts, top_k = 611, 256, 8
    kernels = PrefillExperts(
        backend.module(experts.SOURCE, {"NUM_EXPERTS": num_experts, "TOP_K": top_k}), num_experts, top_k
    )
    logits = torch.randn(rows, num_experts)
    given, scratch = backend.tensor(logits), backend.empty((kernels.grouping_bytes(rows),), torch.uint8)
    group = kernels.grouping(rows, scratch.data_ptr())
    kernels.group(given.data_ptr(), group, rows, backend.stream)
    backend.sync()
    check_grouping(backend, scratch, group, logits, top_k)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    launch = PrefillLinear(None)
    with pytest.raises(ValueError, match="multiple of 32"):
        launch.linear(0, 0, [Segment(n=8, epilogue=STORE)], 4, 48, 0)
    with pytest.raises(ValueError, match="four at a time"):
        launch.norm(0, 0, 0, 1, 30, 1e-6, 0)
