"""Times the kernels of many rows on a GPU at the sizes of Qwen3.6-35B-A3B: python -m tests.bench_prefill

Medians of replays of a CUDA graph of several launches, random weights and rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from plugins.kernels import Module, cached_kernels
from plugins.linear import prefill as linear
from plugins.linear.cuda import FORMATS, STORE, SWIGLU, Segment
from plugins.linear.prefill import PrefillLinear
from plugins.moe_experts import prefill as experts
from plugins.moe_experts.prefill import ExpertsArguments, PrefillExperts

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 512, 256, 8
DENSE = [  # format, rows, outputs, inputs
    *(("fp8", 2048, 12288, 2048), ("fp8", 2048, 8192, 2048), ("fp8", 2048, 2048, 4096), ("fp8", 512, 12288, 2048)),
    *(("nvfp4", 2048, 12288, 2048), ("nvfp4", 2048, 2048, 4096), ("float", 2048, 12288, 2048)),
]
BYTES = {"float": 2.0, "fp8": 1.0, "nvfp4": 0.5625}  # per weight
LAUNCHES, REPLAYS = 10, 20


def median_us(call: Callable[[], None]) -> float:
    """Microseconds of one of several calls in a row, so that the host is not what is timed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def report(name: str, us: float, products: float, moved: float = 0.0) -> None:
    """products: multiplications and additions in pairs; moved: bytes that device memory must deliver or take."""
    rate = f"{2e-6 * products / us:7.0f} TFLOP/s" if products else " " * 15
    print(f"{name:44} {us:9.1f} us {rate} {moved / us / 1e3:7.0f} GB/s", flush=True)


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def octets(*shape: int, below: int = 256) -> torch.Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, device="cuda")


class Matrix:
    """Random weights on the GPU: `pointers` to them, their scales, their scale_2 (`factors` of them)."""

    def __init__(self, format: str, *shape: int, factors: int = 1) -> None:
        lead, k = shape[:-1], shape[-1]
        if format == "float":
            weight = (torch.randn(*shape, device="cuda") / k**0.5).bfloat16()
        elif format == "fp8":
            weight = torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)
        else:
            weight = octets(*lead, k // 2)
        self.tensors = [weight, octets(*lead, k // 16, below=120), torch.full((factors,), 1e-4, device="cuda")]
        weight_at, scale, scale_2 = (t.data_ptr() for t in self.tensors)
        self.pointers = (weight_at, scale, scale_2)


def dense(kernels: PrefillLinear, format: str, rows: int, n: int, k: int) -> None:
    matrix, x = Matrix(format, n, k), torch.randn(rows, k, device="cuda").half()
    out = torch.empty(rows, n, device="cuda")
    weight, scale, scale_2 = matrix.pointers
    segment = Segment(weight=weight, scale=scale, scale_2=scale_2, out=out.data_ptr(), out_stride=n, n=n)
    segment.format, segment.epilogue = FORMATS[format], STORE
    us = {
        tile: median_us(lambda: kernels.linear(x.data_ptr(), 0, [segment], rows, k, stream(), tile_tokens=tile))  # noqa: B023
        for tile in (None, *linear.TILE_TOKENS)
    }
    moved = n * k * BYTES[format] + rows * (2 * k + 4 * n)
    report(f"{format} {rows} x {n} x {k}", us[None], rows * n * k, moved)
    print("    by tile:", ", ".join(f"{tile}: {us[tile]:.1f} us" for tile in linear.TILE_TOKENS))


def small(kernels: PrefillLinear, rows: int) -> None:
    """The norm, and the router with the shared expert's gate and up products."""
    x, weight = torch.randn(rows, HIDDEN, device="cuda"), torch.randn(HIDDEN, device="cuda")
    hi, lo = (torch.empty(rows, HIDDEN, dtype=torch.float16, device="cuda") for _ in range(2))
    at = (x.data_ptr(), weight.data_ptr(), hi.data_ptr(), rows, HIDDEN, 1e-6)
    us = median_us(lambda: kernels.norm(*at, stream(), lo=lo.data_ptr()))
    report(f"norm {rows}", us, 0, rows * HIDDEN * 8)
    router, gate = Matrix("float", EXPERTS, HIDDEN), Matrix("float", 1, HIDDEN)
    pair = [Matrix("fp8", INNER, HIDDEN) for _ in range(2)]
    outs = [torch.empty(rows, n, device="cuda") for n in (EXPERTS, 1)]
    act = torch.empty(rows, INNER, dtype=torch.float16, device="cuda")
    (first, _, factor), (up, _, up_factor) = (matrix.pointers for matrix in pair)
    segments = [Segment(weight=first, weight_up=up, scale_2=factor, scale_2_up=up_factor, out=act.data_ptr())]
    segments[0].out_stride = segments[0].n = INNER
    segments[0].format, segments[0].epilogue = FORMATS["fp8"], SWIGLU
    for matrix, out in zip((router, gate), outs, strict=True):
        n = out.shape[1]
        segments.append(Segment(weight=matrix.pointers[0], out=out.data_ptr(), out_stride=n, n=n, precise=1))
    us = median_us(lambda: kernels.linear(hi.data_ptr(), lo.data_ptr(), segments, rows, HIDDEN, stream()))
    report(f"router, shared up {rows}", us, rows * HIDDEN * 2 * (EXPERTS + INNER))


def mixture(kernels: PrefillExperts, format: str, rows: int) -> None:
    gate_up = Matrix(format, EXPERTS, 2 * INNER, HIDDEN, factors=2 * EXPERTS)
    down = Matrix(format, EXPERTS, HIDDEN, INNER, factors=EXPERTS)
    logits, x = torch.randn(rows, EXPERTS, device="cuda"), torch.randn(rows, HIDDEN, device="cuda").half()
    residual, shared, gate = (torch.randn(rows, n, device="cuda") for n in (HIDDEN, HIDDEN, 1))
    scratch = torch.empty(kernels.scratch_bytes(rows, HIDDEN, INNER), dtype=torch.uint8, device="cuda")
    act = torch.empty(rows * TOP_K, INNER, dtype=torch.float16, device="cuda")
    terms = torch.empty(rows * TOP_K, HIDDEN, dtype=torch.float16, device="cuda")
    group = kernels.grouping(rows, scratch.data_ptr())

    def run() -> None:
        kernels.run(
            logits=logits.data_ptr(),
            x=x.data_ptr(),
            gate_up=gate_up.pointers,
            down=down.pointers,
            format=FORMATS[format],
            inner=INNER,
            hidden=HIDDEN,
            rows=rows,
            shared=shared.data_ptr(),
            shared_gate=gate.data_ptr(),
            shared_gate_stride=1,
            residual=residual.data_ptr(),
            scratch=scratch.data_ptr(),
            stream=stream(),
        )

    weights, pairs = EXPERTS * HIDDEN * INNER * BYTES[format], rows * TOP_K
    report(f"{format} experts {rows}", median_us(run), 3 * pairs * HIDDEN * INNER, 3 * weights)
    report("    grouping", median_us(lambda: kernels.group(logits.data_ptr(), group, rows, stream())), 0)
    lists = (group.tiles, group.tile_count)
    up = ExpertsArguments(x.data_ptr(), group.sorted_tokens, *lists, *gate_up.pointers, act.data_ptr())
    up.format, up.k, up.n, up.gated = FORMATS[format], HIDDEN, INNER, 1
    us = median_us(lambda: kernels.product(up, rows, stream()))
    report("    gate and up", us, 2 * pairs * HIDDEN * INNER, 2 * weights + pairs * INNER * 2)
    last = ExpertsArguments(act.data_ptr(), None, *lists, *down.pointers, terms.data_ptr())
    last.format, last.k, last.n, last.gated = FORMATS[format], INNER, HIDDEN, 0
    us = median_us(lambda: kernels.product(last, rows, stream()))
    report("    down", us, pairs * HIDDEN * INNER, weights + pairs * HIDDEN * 2)


def main() -> None:
    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    print(f"{properties.name}, {properties.multi_processor_count} multiprocessors")
    kernels = PrefillLinear(Module(cached_kernels(linear.SOURCE, arch, {})), properties.multi_processor_count)
    for case in DENSE:
        dense(kernels, *case)
    for rows in (2048, 512):
        small(kernels, rows)
    module = Module(cached_kernels(experts.SOURCE, arch, {"NUM_EXPERTS": EXPERTS, "TOP_K": TOP_K}))
    for rows in (2048, 512, 64):
        mixture(PrefillExperts(module, EXPERTS, TOP_K), "nvfp4", rows)
    mixture(PrefillExperts(module, EXPERTS, TOP_K), "float", 2048)


if __name__ == "__main__":
    main()
