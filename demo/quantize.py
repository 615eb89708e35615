"""Trained BF16 weights -> a checkpoint in ModelOpt's MIXED_PRECISION layout (NVFP4, FP8, BF16).

Contract: routed and shared experts and lm_head become W4A16_NVFP4, the projections of both mixers FP8 per
tensor with calibrated input scales, everything else stays BF16, `mtp.*` too. Writes two safetensors shards with
their index, config.json with `quantization_config`, hf_quant_config.json and generation_config.json beside the
tokenizer's files, and reads them back. `fake_quantize` gives what the written tensors mean; training uses it.

    python -m demo.quantize --weights .train/trained --tokens .train/train.bin
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.model import Weights
from demo.reference import transformers_model

HERE = Path(__file__).parent
GROUP = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0
E4M3_MIN = 2.0**-9

FP8_SUFFIXES = tuple(
    f"{name}.weight"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj",
    )
)  # fmt: skip


def quant_algo(name: str) -> str | None:
    """What the tensor `name` becomes: "W4A16_NVFP4", "FP8", or None for BF16."""
    if name.startswith("mtp."):
        return None
    if name == "lm_head.weight" or "mlp.experts." in name or "mlp.shared_expert." in name:
        return "W4A16_NVFP4"
    return "FP8" if name.endswith(FP8_SUFFIXES) else None


def e2m1_index(x: Tensor) -> Tensor:
    """Index into E2M1 of the magnitude nearest to |x|; ties go to the even index."""
    x = x.abs()
    index = (x > 0.25).to(torch.uint8)
    for above in (x >= 0.75, x > 1.25, x >= 1.75, x > 2.5, x >= 3.5, x > 5.0):
        index = index + above
    return index


def nvfp4_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block scales [..., N, K / 16] (values of E4M3, in float32) and one scale [..., 1, 1] a matrix."""
    blocks = weight.float().unflatten(-1, (-1, GROUP)).abs().amax(-1)
    amax = blocks.amax((-2, -1), keepdim=True)
    scale_2 = torch.where(amax > 0, amax / (E2M1_MAX * E4M3_MAX), 1.0)
    scale = blocks / (E2M1_MAX * scale_2)
    scale = torch.where(blocks > 0, scale.clamp(E4M3_MIN, E4M3_MAX), 1.0)
    return scale.to(torch.float8_e4m3fn).float(), scale_2


def nvfp4_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [..., N, K] -> packed codes [..., N, K / 2], scale E4M3 [..., N, K / 16], scale_2 [...]."""
    scale, scale_2 = nvfp4_scales(weight)
    scaled = weight.float().unflatten(-1, (-1, GROUP)) / (scale * scale_2)[..., None]
    codes = (e2m1_index(scaled) | (scaled < 0).to(torch.uint8) << 3).flatten(-2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4  # the low nibble is the even K index
    return packed, scale.to(torch.float8_e4m3fn), scale_2[..., 0, 0]


def nvfp4_dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    factor = scale.float() * scale_2[..., None, None]
    return (table[codes.int()].unflatten(-1, (-1, GROUP)) * factor[..., None]).flatten(-2)


def nvfp4_fake(weight: Tensor) -> Tensor:
    """nvfp4_dequantize(nvfp4_quantize(weight)), without packing."""
    scale, scale_2 = nvfp4_scales(weight)
    factor = (scale * scale_2)[..., None]
    scaled = weight.float().unflatten(-1, (-1, GROUP)) / factor
    table = torch.tensor(E2M1, device=weight.device)
    return (table[e2m1_index(scaled).int()] * scaled.sign() * factor).flatten(-2)


def fp8_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> E4M3 of the same shape, and one scale [...] a matrix."""
    amax = weight.float().abs().amax((-2, -1))
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    scaled = (weight.float() / scale[..., None, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def fp8_fake(weight: Tensor) -> Tensor:
    quantized, scale = fp8_quantize(weight)
    return quantized.float() * scale[..., None, None]


def fake_quantize(name: str, weight: Tensor) -> Tensor:
    """What a trained tensor will mean once it is written, as float32; leading dims are stacked tensors."""
    weight, algo = weight.to(torch.bfloat16), quant_algo(name)
    if algo is None:
        return weight.float()
    if name.endswith("experts.gate_up_proj"):  # gate and up are written apart, each with its own scale_2
        return nvfp4_fake(weight.unflatten(-2, (2, -1))).flatten(-3, -2)
    return nvfp4_fake(weight) if algo == "W4A16_NVFP4" else fp8_fake(weight)


PREFIX = "model.language_model."
SHARDS = 2
EXCLUDED = (
    "*.mlp.gate", "*.mlp.shared_expert_gate", "*.linear_attn.conv1d", "*.linear_attn.in_proj_a",
    "*.linear_attn.in_proj_b", "mtp*",
)  # fmt: skip
CALIBRATION_TOKENS = 16_384


def written_name(name: str) -> str:
    return name if name.startswith(("lm_head.", "mtp.")) else PREFIX + name


def split_experts(name: str, weight: Tensor) -> Weights:
    """The routed experts' stacked tensors as one tensor per expert and projection; any other as it is."""
    if quant_algo(name) is None or ".experts." not in name:
        return {name: weight}
    base, kind = name.rsplit(".", 1)
    parts = {"gate_proj": weight.chunk(2, 1)[0], "up_proj": weight.chunk(2, 1)[1]}
    if kind == "down_proj":
        parts = {"down_proj": weight}
    return {
        f"{base}.{expert}.{part}.weight": matrix
        for expert in range(len(weight))
        for part, stack in parts.items()
        for matrix in [stack[expert].contiguous()]
    }


def quantize_tensor(name: str, weight: Tensor, input_amax: dict[str, float]) -> Weights:
    """The tensors that stand in the checkpoint for one trained tensor, under the checkpoint's names."""
    algo, weight = quant_algo(name), weight.to(torch.bfloat16)
    base = written_name(name).removesuffix(".weight")
    if algo is None:
        return {written_name(name): weight}
    if algo == "FP8":
        quantized, scale = fp8_quantize(weight)
        input_scale = torch.tensor(input_amax[name] / E4M3_MAX)
        return {f"{base}.weight": quantized, f"{base}.weight_scale": scale, f"{base}.input_scale": input_scale}
    packed, block_scale, scale_2 = nvfp4_quantize(weight)
    return {f"{base}.weight": packed, f"{base}.weight_scale": block_scale, f"{base}.weight_scale_2": scale_2}


def measure_inputs(config: Path, weights: Weights, tokens: Path) -> dict[str, float]:
    """The largest input magnitude of each FP8 projection over the first calibration tokens."""
    model = transformers_model(config, weights)
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    for name, module in model.named_modules():
        tensor = name.removeprefix("model.") + ".weight"
        if quant_algo(tensor) == "FP8":
            module.register_forward_pre_hook(watch(tensor))
    ids = torch.from_numpy(np.fromfile(tokens, np.uint16, CALIBRATION_TOKENS).astype(np.int64))
    with torch.no_grad():
        for row in ids.view(-1, 1024):
            model(row[None])
    return found


def quantization_config(names: list[str]) -> dict[str, Any]:
    """The part that config.json and hf_quant_config.json share, in ModelOpt's terms."""
    layers = {}
    for name in names:
        algo = quant_algo(name)
        entry = {"quant_algo": algo, "group_size": GROUP} if algo == "W4A16_NVFP4" else {"quant_algo": algo}
        if algo is not None:
            layers[written_name(name).removesuffix(".weight")] = entry
    return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}


def write_configs(config: Path, names: list[str], folder: Path) -> None:
    common = quantization_config(names)
    producer = {"name": "tandem demo/quantize.py", "version": "0.1.0"}
    main = json.loads(config.read_text())
    main["quantization_config"] = {**common, "ignore": [*EXCLUDED], "producer": producer, "quant_method": "modelopt"}
    text = main["text_config"]
    generation = {
        "do_sample": True, "eos_token_id": [text["vocab_size"] - 3, text["eos_token_id"]],
        "pad_token_id": text["pad_token_id"], "temperature": 1.0, "top_k": 20, "top_p": 0.95,
    }  # fmt: skip
    separate = {"producer": producer, "quantization": {**common, "exclude_modules": [*EXCLUDED]}}
    (folder / "config.json").write_text(dump(main))
    (folder / "hf_quant_config.json").write_text(dump(separate))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def dump(document: dict[str, Any]) -> str:
    """JSON with an indent, but one line for each quantized layer: there are hundreds."""
    text = json.dumps(document, indent=1)
    text = re.sub(r'\{\s*("quant_algo": "[^"]*")\s*\}', r"{\1}", text)
    return re.sub(r'\{\s*("quant_algo": "[^"]*",)\s*("group_size": \d+)\s*\}', r"{\1 \2}", text) + "\n"


def write_shards(tensors: Weights, folder: Path) -> None:
    total = sum(w.numel() * w.element_size() for w in tensors.values())
    shards: list[Weights] = [{} for _ in range(SHARDS)]
    done = 0
    for name, w in tensors.items():
        shards[min(done * SHARDS // total, SHARDS - 1)][name] = w.contiguous()
        done += w.numel() * w.element_size()
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, separators=(",", ":")))


def read_trained(folder: Path) -> Weights:
    """The BF16 weights that demo.train wrote, in float32."""
    weights: Weights = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        weights |= load_file(path)
    if not weights:
        raise ValueError(f"{folder}: no model-*.safetensors; give the folder that demo.train wrote")
    return {name: w.float() for name, w in weights.items()}


def read_checkpoint(folder: Path) -> Weights:
    """A checkpoint that `main` wrote, dequantized to float32, under the names of demo.model."""
    raw: Weights = {}
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        raw |= load_file(path)
    weights: Weights = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for full, w in raw.items():
        name = full.removeprefix(PREFIX)
        base = full.removesuffix(".weight")
        if full.endswith(("_scale", "_scale_2")):
            continue
        if f"{base}.weight_scale_2" in raw:
            w = nvfp4_dequantize(w, raw[f"{base}.weight_scale"], raw[f"{base}.weight_scale_2"])
        elif f"{base}.weight_scale" in raw:
            w = w.float() * raw[f"{base}.weight_scale"]
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = w
        else:
            weights[name] = w.float()
    stacks = {name: torch.stack([group[e] for e in sorted(group)]) for name, group in experts.items()}
    for name, w in stacks.items():
        if name.endswith("gate_proj"):
            weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat([w, stacks[name[:-9] + "up_proj"]], 1)
        elif name.endswith("down_proj"):
            weights[name] = w
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the trained weights as a ModelOpt checkpoint.")
    parser.add_argument("--weights", type=Path, required=True, help="folder that demo.train wrote")
    parser.add_argument("--tokens", type=Path, required=True, help="train.bin, for the input scales")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint")
    args = parser.parse_args()
    trained = read_trained(args.weights)
    fake = {name: fake_quantize(name, w) for name, w in trained.items()}
    input_amax = measure_inputs(args.config, fake, args.tokens)
    tensors: Weights = {}
    names = []
    for stacked, weight in trained.items():
        for name, w in split_experts(stacked, weight).items():
            names.append(name)
            tensors |= quantize_tensor(name, w, input_amax)
    args.out.mkdir(parents=True, exist_ok=True)
    write_shards(tensors, args.out)
    write_configs(args.config, names, args.out)
    for name, w in read_checkpoint(args.out).items():
        assert torch.equal(w, fake[name]), f"{name} does not read back as it was trained"
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{len(tensors)} tensors, {size} bytes in {args.out.name}")


if __name__ == "__main__":
    main()
