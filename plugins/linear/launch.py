"""FloatLinear, Fp8Linear and Nvfp4Linear as plugins: up to DECODE_ROWS rows by decode.cu, more by prefill.cu.

multiply(call, call.inputs["x"], Segment(weight=…, out=…, out_stride=n, n=n), workspace)    # other ops' products too
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugins import convert
from plugins.launch import DECODE_ROWS, Argument, Call, Device, Launch, Macros, Shapes, parts, total
from plugins.linear import cuda, prefill
from plugins.linear.cuda import FORMATS, Input, LinearDecode, Segment

KERNELS: list[tuple[Path, Macros]] = [(cuda.SOURCE, {}), (prefill.SOURCE, {}), (convert.SOURCE, {})]


def workspace_bytes(rows: int, k: int, precise: bool) -> int:
    """Of `multiply`."""
    return total(*[2 * rows * k] * (1 + precise)) if rows > DECODE_ROWS else 0


def multiply(call: Call, x: Argument, segment: Segment, workspace: int) -> None:
    """x float32 [T, K] times one STORE segment, whose `out` is float32 [T, out_stride]. For prefill.cu x is rounded to
    float16, and for a segment that is `precise` what that rounds off is multiplied too, as decode.cu always does."""
    rows, k = x.shape
    if rows <= DECODE_ROWS:
        return _decode(call, x, segment)
    high, *rest = parts(workspace, *[2 * rows * k] * (2 if segment.precise else 1))
    low = rest[0] if rest else 0
    convert.to_halves(call.module(convert.SOURCE, {}), x.address, high, low, rows * k, call.stream)
    kernels = prefill.PrefillLinear(call.module(prefill.SOURCE, {}), call.device.multiprocessors)
    kernels.linear(high, low, [segment], rows, k, call.stream)


def _decode(call: Call, x: Argument, segment: Segment) -> None:
    """As many rows a launch as its shared memory holds: no row's bits depend on it."""
    rows, k = x.shape
    kernels = LinearDecode(call.module(cuda.SOURCE, {}), call.device.multiprocessors, call.device.shared_bytes)
    fitting = [r for r in range(1, rows + 1) if cuda.shared_bytes(r, k) <= kernels.shared_limit]
    assert fitting, f"a row of {k} values takes more shared memory than there is"
    out, stride = int(segment.out), int(segment.out_stride)
    for start in range(0, rows, fitting[-1]):
        count = min(fitting[-1], rows - start)
        segment.out = out + 4 * start * stride
        kernels.linear(Input(x=x.address + 4 * start * k, x_stride=k, k=k, rows=count), [segment], call.stream)


def _launch(format: str) -> Launch:
    precise = format == "float"  # routers and gates: a small difference may choose another expert

    def kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
        cuda.check_k(shapes["x"][1], format, f"a linear layer of {shapes['weight'][0]} outputs")
        return KERNELS

    def workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
        rows, k = shapes["x"]
        return workspace_bytes(rows, k, precise)

    def run(call: Call) -> None:
        n = call.inputs["weight"].shape[0]
        scales = {
            "float": {},
            "fp8": {"scale_2": "weight_scale"},
            "nvfp4": {"scale": "weight_scale", "scale_2": "weight_scale_2"},
        }[format]
        out = call.outputs["y"].address
        segment = Segment(out=out, out_stride=n, n=n, format=FORMATS[format], precise=precise)
        for field, name in {"weight": "weight", **scales}.items():
            setattr(segment, field, call.inputs[name].address)
        multiply(call, call.inputs["x"], segment, call.workspace)

    return Launch(kernels, workspace, run, {})


FLOAT_LINEAR_LAUNCH, FP8_LINEAR_LAUNCH, NVFP4_LINEAR_LAUNCH = map(_launch, FORMATS)
