"""y = x Wᵀ for the three weight formats of a checkpoint: floating point, FP8 per tensor, NVFP4.

x float32 [T, K] -> y float32 [T, N]. The product of a row does not depend on the other rows of the call: with
constant weights ONNX Runtime packs them once and every row goes through the same kernel; where weights stay
packed in memory (`expanded` false) the product of a single row would take another kernel, so a row is added.
"""

from collections.abc import Iterator
from typing import Any

import torch

from plugins import nvfp4
from plugins.linear.launch import FLOAT_LINEAR_LAUNCH, FP8_LINEAR_LAUNCH, NVFP4_LINEAR_LAUNCH
from plugins.op import Attributes, Case, Op, ints


def add_row() -> str:
    """Body statements: x_padded = x and one row more; `first`, `second` and `last` are left defined."""
    return f"""{ints("first", 0)}
        {ints("second", 1)}
        {ints("last", -1)}
        pad = Slice (x, first, second, first)
        x_padded = Concat <axis = 0> (x, pad)"""


def product(expanded: bool) -> str:
    """Body statements: y = x wᵀ with w float32 [N, K], each row's bits independent of the number of rows."""
    if expanded:
        return "y = Gemm <transB = 1> (x, w)"
    return f"""
        {add_row()}
        y_padded = Gemm <transB = 1> (x_padded, w)
        y = Slice (y_padded, first, last, first)"""


def infer(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> list[tuple[torch.dtype, list[Any]]]:
    return [(torch.float32, [x.shape[0], weight.shape[0]])]


def float_cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for (k, n), dtype in zip(
        [(32, 48), (96, 33), (64, 1)], [torch.bfloat16, torch.float32, torch.float16], strict=True
    ):
        x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
        if n == 1:  # a single output may be small by chance, and its error is taken relative to it: nothing cancels
            x, weight = x.abs(), weight.abs()
        yield (x, weight.to(dtype)), {}


def fp8_cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for k, n in [(32, 48), (80, 17)]:
        weight = (torch.randn(n, k, generator=generator) * 100).to(torch.float8_e4m3fn)
        yield (torch.randn(rows, k, generator=generator), weight, torch.rand((), generator=generator)), {}


def random_nvfp4(generator: torch.Generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes uint8 [..., K/2] and finite E4M3 scale bytes uint8 [..., K/16]."""
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(*shape[:-1], shape[-1] // nvfp4.GROUP, generator=generator) * 448
    return codes, scale.to(torch.float8_e4m3fn).view(torch.uint8)


def nvfp4_cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for k, n in [(32, 48), (80, 17)]:
        codes, scale = random_nvfp4(generator, n, k)
        yield (torch.randn(rows, k, generator=generator), codes, scale, torch.rand((), generator=generator)), {}


def float_body(attributes: Attributes, expanded: bool) -> str:
    return "w = Cast <to = 1> (weight)\n" + product(expanded)


def fp8_body(attributes: Attributes, expanded: bool) -> str:
    return "w0 = Cast <to = 1> (weight)\nw = Mul (w0, weight_scale)\n" + product(expanded)


def nvfp4_body(attributes: Attributes, expanded: bool) -> str:
    return nvfp4.dequantize_body("w", "weight", "weight_scale", "weight_scale_2", rank=2) + "\n" + product(expanded)


FLOAT_LINEAR = Op(
    name="FloatLinear",
    inputs=("x", "weight"),  # weight bfloat16, float16 or float32 [N, K]
    weights=("weight",),
    outputs=("y",),
    reference=lambda x, weight: x @ weight.float().T,
    infer=infer,
    body=float_body,
    cases=float_cases,
    launch=FLOAT_LINEAR_LAUNCH,
)

FP8_LINEAR = Op(
    name="Fp8Linear",
    inputs=("x", "weight", "weight_scale"),  # float8_e4m3fn [N, K], float32 []: W = weight * weight_scale
    weights=("weight", "weight_scale"),
    outputs=("y",),
    reference=lambda x, weight, weight_scale: x @ (weight.float() * weight_scale).T,
    infer=infer,
    body=fp8_body,
    cases=fp8_cases,
    launch=FP8_LINEAR_LAUNCH,
)

NVFP4_LINEAR = Op(
    name="Nvfp4Linear",
    inputs=("x", "weight", "weight_scale", "weight_scale_2"),  # uint8 [N, K/2], uint8 (E4M3) [N, K/16], float32 []
    weights=("weight", "weight_scale", "weight_scale_2"),
    outputs=("y",),
    reference=lambda x, weight, scale, scale_2: x @ nvfp4.dequantize(weight, scale, scale_2).T,
    infer=infer,
    body=nvfp4_body,
    cases=nvfp4_cases,
    launch=NVFP4_LINEAR_LAUNCH,
)
