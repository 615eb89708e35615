"""The weights file as plain float32 Hugging Face weights: what transformers runs, for benchmarks and comparisons.

state = dequantize(Path("build/demo/cpu/weights.safetensors"), manifest.formats)
Qwen3_5MoeForCausalLM(config).load_state_dict({k: v for k, v in state.items() if not k.startswith("mtp.")})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from export.checkpoint import load_weights
from plugins import nvfp4


def dequantize(weights_file: Path, formats: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Every tensor in float32 under its Hugging Face name (`model.` prefix, experts stacked; of Qwen3-Next, whose files
    fuse the GDN projections, under the names of Qwen3.5)."""
    weights, state = load_weights(weights_file), {}
    quantized = {name for name, kind in formats.items() if kind != "float"}
    for name, tensor in weights.items():
        if name.endswith((".weight_scale", ".weight_scale_2")):
            continue
        module = name.removesuffix(".weight")
        owner = module.rpartition(".")[0] if ".experts." in module else module
        if owner in quantized:
            tensor = _unpack(module, weights, formats[owner])
        if name.endswith("conv1d.weight"):
            tensor = tensor[:, None]
        if ".experts." in name:
            name = module
        state[name if name.startswith(("lm_head", "mtp.")) else f"model.{name}"] = tensor.float()
    return state


def _unpack(module: str, weights: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
    weight, scale = weights[f"{module}.weight"], weights[f"{module}.weight_scale"]
    if kind == "fp8":
        return weight.float() * scale
    rows_scale = weights[f"{module}.weight_scale_2"]
    if rows_scale.ndim == 2:  # gate and up of stacked experts: one scale for each half of the rows
        rows_scale = rows_scale.repeat_interleave(weight.shape[1] // 2, dim=1)
    elif rows_scale.ndim == 1:
        rows_scale = rows_scale[:, None]
    return nvfp4.dequantize(weight, scale.view(torch.uint8), rows_scale.expand(weight.shape[:-1]))
