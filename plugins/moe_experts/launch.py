"""FloatMoeExperts and Nvfp4MoeExperts as plugins: up to DECODE_ROWS rows by decode.cu, more by prefill.cu.

Those kernels choose the experts from a router's logits. launch.cu turns the op's weights and ids back into logits:
their logarithms, whose softmax over the chosen are the weights again, as a row's sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int, c_void_p
from pathlib import Path
from typing import Any

from plugins import convert
from plugins.launch import DECODE_ROWS, Call, Device, Launch, Macros, Shapes, parts, total
from plugins.linear.cuda import FORMATS, Input, Segment, check_k, shared_bytes
from plugins.moe_experts import cuda, prefill
from plugins.moe_experts.cuda import DownArguments, ExpertsDecode, UpArguments
from plugins.moe_experts.prefill import PrefillExperts
from plugins.moe_routing.launch import routing_macros

SOURCE = Path(__file__).parent / "launch.cu"
THREADS = 256
GATES = 4 * DECODE_ROWS  # bytes: the shared experts' gates; what a shared expert of no width reads lies behind them


def _sizes(rows: int, hidden: int, experts: int, top_k: int, inner: int) -> list[int]:
    """Bytes: logits float32 [T, E]; then, decoding, gates and activations float32 [T, k, I]; or x as float16 and the
    scratch of `PrefillExperts.run`."""
    if rows <= DECODE_ROWS:
        return [4 * rows * experts, GATES, 4 * rows * top_k * inner]
    scratch = PrefillExperts(None, experts, top_k).scratch_bytes(rows, hidden, inner)
    return [4 * rows * experts, 2 * rows * hidden, scratch]


def workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    (rows, hidden), (_, top_k) = shapes["x"], shapes["topk_ids"]
    sizes = hidden, attributes["num_experts"], top_k, attributes["moe_intermediate_size"]
    return max(total(*_sizes(most, *sizes)) for most in (min(rows, DECODE_ROWS), rows))


def _prepare(call: Call, logits: int, gates: int) -> None:
    (rows, hidden), (_, top_k) = call.inputs["x"].shape, call.inputs["topk_ids"].shape
    pointers = [*call.addresses("topk_weights", "topk_ids"), logits, call.outputs["y"].address, gates]
    numbers = call.attributes["num_experts"], top_k, hidden
    args = [*map(c_void_p, pointers), *map(c_int, numbers)]
    kernel = call.module(SOURCE, {}).kernel("experts_prepare")
    kernel.launch((rows, 1, 1), (THREADS, 1, 1), args, call.stream)


def _most_rows(kernels: ExpertsDecode, rows: int, hidden: int, inner: int) -> int:
    """Of one launch: no row's bits depend on it."""
    limit = kernels.device_shared - kernels.up_static
    fitting = [r for r in range(1, rows + 1) if shared_bytes(r, hidden) <= limit and kernels.fits(r, inner, 0)]
    assert fitting, f"experts of {inner} for rows of {hidden} values take more shared memory than there is"
    return fitting[-1]


def _decode(call: Call, format: str, gate_up: list[int | None], down: list[int | None]) -> None:
    """experts_up reads x, and experts_down the logits and the shared expert's activations, before they wait: all that
    is written by experts_prepare, a late kernel as experts_up, or before it (common.cuh)."""
    (rows, hidden), (_, top_k) = call.inputs["x"].shape, call.inputs["topk_ids"].shape
    experts, inner = call.attributes["num_experts"], call.attributes["moe_intermediate_size"]
    logits, gates, acts = parts(call.workspace, *_sizes(rows, hidden, experts, top_k, inner))
    module = call.module(cuda.SOURCE, routing_macros(experts, top_k))
    kernels = ExpertsDecode(module, call.device.multiprocessors, call.device.shared_bytes, experts, top_k)
    _prepare(call, logits, gates)
    most = _most_rows(kernels, rows, hidden, inner)
    for start in range(0, rows, most):
        count = min(most, rows - start)
        x, y = (at + 4 * start * hidden for at in (call.inputs["x"].address, call.outputs["y"].address))
        chosen, act = logits + 4 * start * experts, acts + 4 * start * top_k * inner
        given = Input(x=x, x_stride=hidden, k=hidden, rows=count)
        kernels.up(UpArguments(given, chosen, *gate_up, act, FORMATS[format], inner), call.stream)
        # A shared expert of no width: its kernel reads the eight floats before its activations, and uses none.
        shared = (Segment(n=hidden), gates + GATES, gates + 4 * start)
        arguments = DownArguments(chosen, *down, act, *shared, y, FORMATS[format], inner, 0, hidden, count)
        kernels.down(arguments, call.stream)


def _prefill(call: Call, format: str, gate_up: list[int | None], down: list[int | None]) -> None:
    (rows, hidden), (_, top_k) = call.inputs["x"].shape, call.inputs["topk_ids"].shape
    experts, inner = call.attributes["num_experts"], call.attributes["moe_intermediate_size"]
    logits, half, scratch = parts(call.workspace, *_sizes(rows, hidden, experts, top_k, inner))
    _prepare(call, logits, 0)
    x = call.inputs["x"].address
    convert.to_halves(call.module(convert.SOURCE, {}), x, half, 0, rows * hidden, call.stream)
    PrefillExperts(call.module(prefill.SOURCE, routing_macros(experts, top_k)), experts, top_k).run(
        logits=logits,
        x=half,
        gate_up=(gate_up[0] or 0, gate_up[1] or 0, gate_up[2] or 0),
        down=(down[0] or 0, down[1] or 0, down[2] or 0),
        format=FORMATS[format],
        inner=inner,
        hidden=hidden,
        rows=rows,
        shared=0,
        shared_gate=0,
        shared_gate_stride=0,
        residual=call.outputs["y"].address,
        scratch=scratch,
        stream=call.stream,
    )


def _launch(format: str) -> Launch:
    def kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
        check_k(shapes["x"][1], format, "hidden_size")
        check_k(attributes["moe_intermediate_size"], format, "moe_intermediate_size")
        macros = routing_macros(attributes["num_experts"], shapes["topk_ids"][1])
        return [(SOURCE, {}), (cuda.SOURCE, macros), (prefill.SOURCE, macros), (convert.SOURCE, {})]

    def run(call: Call) -> None:
        suffixes = ("", "_scale", "_scale_2") if format == "nvfp4" else ("",)
        gate_up, down = (
            [call.inputs[name + suffix].address for suffix in suffixes] + [None] * (3 - len(suffixes))
            for name in ("gate_up", "down")
        )
        decoding = call.inputs["x"].shape[0] <= DECODE_ROWS
        (_decode if decoding else _prefill)(call, format, gate_up, down)

    return Launch(kernels, workspace, run, {})


FLOAT_MOE_EXPERTS_LAUNCH, NVFP4_MOE_EXPERTS_LAUNCH = _launch("float"), _launch("nvfp4")
