"""demo/quantize.py against compressed-tensors' NVFP4 quantizer, on fresh random matrices.

Codes and scales must be equal bit for bit where both have the same global scale. Tolerated, each for its reason:
- scale_2 is amax / 2688 here (ModelOpt) and 2688 / amax there: reciprocals, equal up to the rounding of one
  division. So matrices get an amax of 2688 * 2^n, for which both are exact.
- blocks of zeros: scale 1 here (ModelOpt), 2^-9 or so there; their codes are 0 in both.
- nonzero values whose code is 0: the sign bit is kept here (-0.0), and dropped or kept there; both mean zero.

    pytest tests/test_quantize.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from demo.quantize import (
    E2M1,
    e2m1_index,
    fake_quantize,
    fp8_fake,
    fp8_quantize,
    nvfp4_dequantize,
    nvfp4_fake,
    nvfp4_quantize,
)

quant = pytest.importorskip("compressed_tensors.quantization")


def random_matrix(seed: int, zero_blocks: bool) -> Tensor:
    """Random [N, K] of varied spread, in BF16 like a checkpoint's, with an amax of 2688 * 2^n."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(1, 9, (), generator=g)) * 16 for _ in range(2))
    w = torch.randn(rows, columns, generator=g) * torch.exp2(torch.randint(-6, 3, (rows, 1), generator=g))
    w = w.bfloat16().float()
    w = w.clamp(-5, 5)
    w[0, 0] = 2688 * 2.0**-9  # 5.25
    if zero_blocks:
        w.unflatten(-1, (-1, 16))[torch.rand(rows, columns // 16, generator=g) < 0.3] = 0
        w[0, :16] = 0
        w[0, 0] = 2688 * 2.0**-9
    return w * torch.exp2(torch.randint(-8, 4, (), generator=g))


def compressed_tensors_nvfp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of E2M1 [N, K], block scales [N, K / 16] and the global scale, by compressed-tensors."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = quant.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    total = generate_gparam(w.min(), w.max())
    blocks = w.unflatten(-1, (-1, 16))
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=total)
    return quantize(w, scale, zero, args, global_scale=total), scale.float(), total


def unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


@pytest.mark.parametrize("zero_blocks", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_equals_compressed_tensors(seed: int, zero_blocks: bool) -> None:
    w = random_matrix(seed, zero_blocks)
    packed, scale, scale_2 = nvfp4_quantize(w)
    values, their_scale, total = compressed_tensors_nvfp4(w)
    assert scale_2.item() * total.item() == 1.0
    filled = w.unflatten(-1, (-1, 16)).abs().amax(-1) > 0
    assert torch.equal(scale.float()[filled], their_scale[filled])
    assert (scale.float()[~filled] == 1).all()
    codes = unpack(packed)
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    assert torch.equal(table[codes.int()], values.float())
    assert torch.equal(codes >> 3 == 1, w < 0)


@pytest.mark.parametrize("seed", range(20))
def test_dequantized_equals_compressed_tensors_for_any_amax(seed: int) -> None:
    """An arbitrary amax: the two global scales are reciprocals up to one rounding, and so are the results."""
    g = torch.Generator().manual_seed(1000 + seed)
    w = torch.randn(48, 96, generator=g) * 0.05
    values, scale, total = compressed_tensors_nvfp4(w)
    theirs = (values.float().unflatten(-1, (-1, 16)) * (scale / total)[..., None]).flatten(-2)
    ours = nvfp4_fake(w)
    close = torch.isclose(ours, theirs, rtol=1e-6, atol=0)
    # a quotient within one rounding of a tie may fall to the other side
    assert (~close).sum() <= 2, f"{(~close).sum()} of {w.numel()} differ; max {(ours - theirs).abs().max()}"


def test_ties_and_limits() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75, 0.0])
    got = torch.tensor(E2M1)[e2m1_index(ties).int()]
    assert got.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 1.0, 0.0]


def test_low_nibble_is_the_even_index() -> None:
    w = torch.zeros(1, 16)
    w[0, :3] = torch.tensor([0.5, 1.0, 6.0])
    packed, scale, scale_2 = nvfp4_quantize(w)
    assert packed[0, 0].item() == 0x21
    assert (scale.float() * scale_2).item() == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(32, 64), (3, 32, 64), (2, 3, 16, 32)])
def test_fake_is_the_round_trip(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    w[..., 0, :16] = 0
    assert torch.equal(nvfp4_dequantize(*nvfp4_quantize(w)), nvfp4_fake(w))
    assert torch.equal(nvfp4_fake(torch.zeros(shape)), torch.zeros(shape))
    flat = w.flatten(0, -3) if w.ndim > 2 else w[None]
    alone = torch.stack([nvfp4_fake(matrix) for matrix in flat]).view(shape)
    assert torch.equal(alone, nvfp4_fake(w))


def test_gate_and_up_are_quantized_apart() -> None:
    w = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(8)).bfloat16()
    w[:, 32:] *= 0.01
    got = fake_quantize("layers.0.mlp.experts.gate_up_proj", w)
    want = torch.cat([nvfp4_fake(w[:, :32]), nvfp4_fake(w[:, 32:])], 1)
    assert torch.equal(got, want)
    assert torch.equal(fake_quantize("mtp.layers.0.mlp.experts.gate_up_proj", w), w.float())


@pytest.mark.parametrize("seed", range(5))
def test_fp8_is_nearest(seed: int) -> None:
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
    quantized, scale = fp8_quantize(w)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    nearest = ((w / scale)[..., None] - every).abs().amin(-1)
    assert torch.equal((quantized.float() - w / scale).abs(), nearest)
    assert quantized.float().abs().max() == 448
    assert torch.equal(fp8_fake(w), quantized.float() * scale)
