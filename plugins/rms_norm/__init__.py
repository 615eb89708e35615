"""Zero-centred RMS norm: y = x * rsqrt(mean(x²) + eps) * (1 + weight), over the last dimension, in float32.

Every norm of Qwen3.6 but the one inside Gated DeltaNet has its weight stored around zero (transformers,
Qwen3_5MoeRMSNorm).
"""

from collections.abc import Iterator
from typing import Any

import torch

from plugins.op import Attributes, Case, Op, number, scalar
from plugins.rms_norm.launch import RMS_NORM_LAUNCH


def reference(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """x float32 [..., D], weight [D] of any float dtype -> float32 [..., D]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (1 + weight.float())


def infer(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> list[tuple[torch.dtype, list[Any]]]:
    return [(torch.float32, list(x.shape))]


def norm_body(out: str, x: str, weight: str, epsilon: float) -> str:
    """Body statements for `reference`, also used by attention for its query and key norms."""
    return f"""
        {scalar(f"{out}_one", 1.0)}
        {out}_w = Cast <to = 1> ({weight})
        {out}_w1 = Add ({out}_w, {out}_one)
        {out} = RMSNormalization <axis = -1, epsilon = {number(epsilon)}> ({x}, {out}_w1)"""


def body(attributes: Attributes, expanded: bool) -> str:
    return norm_body("y", "x", "weight", attributes["epsilon"])


def cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for size, dtype in [(32, torch.bfloat16), (80, torch.float32)]:
        x = torch.randn(rows, size, generator=generator) * 3
        yield (x, torch.randn(size, generator=generator).to(dtype)), {"epsilon": 1e-6}


RMS_NORM = Op(
    name="ZeroCenteredRmsNorm",
    inputs=("x", "weight"),
    weights=("weight",),
    outputs=("y",),
    attributes=("epsilon",),
    reference=reference,
    infer=infer,
    body=body,
    cases=cases,
    launch=RMS_NORM_LAUNCH,
)
