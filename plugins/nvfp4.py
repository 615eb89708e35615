"""NVFP4 weights: sixteen E2M1 codes share one E4M3 scale, a tensor shares one float32 scale.

    W[n, k] = e2m1(code[n, k]) * e4m3(weight_scale[n, k // 16]) * weight_scale_2

Two codes a byte, the even k in the low nibble. Scales travel as bytes (uint8): ONNX Runtime's CPU provider can
neither slice nor gather float8 tensors. Numerics: NVIDIA ModelOpt's NVFP4, checked in tests/test_quantize.py.
"""

import torch

from plugins.op import number

GROUP = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = torch.tensor([*E2M1, *(-value for value in E2M1)])
PAIRS = torch.stack([CODES[torch.arange(256) & 15], CODES[torch.arange(256) >> 4]], dim=1)  # byte -> even, odd
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def dequantize(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """codes uint8 [..., N, K/2], scale uint8 [..., N, K/16], scale_2 float32, broadcast over [..., N] -> float32
    [..., N, K]."""
    values = PAIRS.to(codes.device)[codes.int()].unflatten(-2, (-1, GROUP // 2)).flatten(-2)  # [..., N, K/16, 16]
    scales = scale.view(torch.float8_e4m3fn).float() * scale_2[..., None]
    return (values * scales[..., None]).flatten(-2)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] of any float dtype -> codes uint8 [N, K/2], scale uint8 [N, K/16], scale_2 float32 [], as NVIDIA
    ModelOpt quantizes; in slices, so that a vocabulary's matrix takes little memory besides."""
    scale_2 = (weight.abs().amax().float() / (6 * 448)).clamp_min(torch.finfo(torch.float32).tiny)
    levels = torch.tensor(E2M1, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes, scales = [], []
    for rows in weight.split(1 << 14):
        blocks = rows.float().unflatten(-1, (-1, GROUP))  # [N, K/16, 16]
        scale = (blocks.abs().amax(-1) / (6 * scale_2)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        scaled = blocks / (scale.float() * scale_2)[..., None]
        code = torch.bucketize(scaled.abs(), middles) | (scaled < 0).long() << 3
        code = code.flatten(-2).to(torch.uint8)
        codes.append(code[:, 0::2] | code[:, 1::2] << 4)
        scales.append(scale.view(torch.uint8))
    return torch.cat(codes), torch.cat(scales), scale_2


def table(name: str, values: torch.Tensor) -> str:
    """A body statement: a float32 constant with these values."""
    shape = ",".join(map(str, values.shape))
    # E4M3's two NaN codes: the exporter refuses them, and a body's text has no spelling for them.
    numbers = ", ".join(f"{number(value)}" for value in values.nan_to_num(0.0).flatten().tolist())
    return f"{name} = Constant <value = float[{shape}] {{{numbers}}}> ()"


def dequantize_body(out: str, codes: str, scale: str, scale_2: str, rank: int) -> str:
    """Body statements for `dequantize`; rank is that of the codes. scale_2 must broadcast over [..., N, K/16]."""
    keep = ", ".join(["0"] * (rank - 1))
    return f"""
        {out}_pairs = Constant <value_ints = [{keep}, -1, {GROUP}]> ()
        {out}_flat = Constant <value_ints = [{keep}, -1]> ()
        {out}_last = Constant <value_ints = [-1]> ()
        {table(f"{out}_e2m1", PAIRS)}
        {table(f"{out}_e4m3", E4M3)}
        {out}_c = Cast <to = 6> ({codes})
        {out}_v = Gather ({out}_e2m1, {out}_c)
        {out}_g = Reshape ({out}_v, {out}_pairs)
        {out}_s = Cast <to = 6> ({scale})
        {out}_s1 = Gather ({out}_e4m3, {out}_s)
        {out}_s2 = Mul ({out}_s1, {scale_2})
        {out}_s3 = Unsqueeze ({out}_s2, {out}_last)
        {out}_w = Mul ({out}_g, {out}_s3)
        {out} = Reshape ({out}_w, {out}_flat)"""
