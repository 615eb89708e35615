"""Synthetic Hugging Face checkpoints for tests: tiny, random, lively, in every layout Tandem reads.

Contract: `tiny_config` gives a config.json, `random_state` the float32 weights (names and values as
transformers' `*ForCausalLM` has them, plus `mtp.*`), and `write_checkpoint` a directory in the layout
asked for. It returns the *twin*: the float32 weights which that directory stands for, dequantized
exactly. Nothing here is shared with `export/` or `plugins/`, the NVFP4 arithmetic included.

    python -c "from tests.checkpoints import demo; demo('build/tiny')"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
Layout = Literal["float", "modelopt_nvfp4", "modelopt_mixed", "compressed_tensors", "compressed_tensors_mixed"]
LAYOUTS: tuple[Layout, ...] = (
    "float",
    "modelopt_nvfp4",
    "modelopt_mixed",
    "compressed_tensors",
    "compressed_tensors_mixed",
)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
}
_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_CLASSES = {
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", "Qwen3NextForCausalLM"),
}


def tiny_config(family: str = "qwen3_5_moe", **overrides: Any) -> dict[str, Any]:
    """A config.json as the family publishes it; `overrides` go to the text model (num_experts=0: dense)."""
    if overrides.get("num_experts") == 0:
        family = "qwen3_5"
    dense = family == "qwen3_5"
    text = dict(_SIZES) | ({"intermediate_size": 48} if dense else _MOE)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    if family == "qwen3_next":
        text |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        rope |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
        text |= {"attn_output_gate": True, "full_attention_interval": 4}
    text |= {"rope_parameters": rope, "mtp_num_hidden_layers": 1} | overrides
    if dense:
        text = {key: value for key, value in text.items() if key not in _MOE}
    interval = text.get("full_attention_interval", 4)
    kinds = ("linear_attention", "full_attention")
    text.setdefault("layer_types", [kinds[(i + 1) % interval == 0] for i in range(text["num_hidden_layers"])])
    tied = text.pop("tie_word_embeddings", False)
    head = {"architectures": [_CLASSES[family][2]], "model_type": family, "tie_word_embeddings": tied}
    if family == "qwen3_next":
        return text | head
    return head | {"text_config": text | {"model_type": f"{family}_text"}}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a config.json, tie_word_embeddings included."""
    text = dict(config.get("text_config", config))
    return text | {"tie_word_embeddings": config.get("tie_word_embeddings", False)}


def transformers_model(config: dict[str, Any], state: State | None = None) -> Any:
    """transformers' float32 model for the config, in eval mode; loads `state` (its `mtp.*` aside)."""
    import transformers

    text = text_config(config)
    family = text["model_type"].removesuffix("_text")
    config_class, model_class, _ = _CLASSES[family]
    hf_config = getattr(transformers, config_class)(**text)
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(hf_config).float().eval()
    if state is not None:
        main = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
        missing, unexpected = model.load_state_dict(main, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
    return model


def random_state(config: dict[str, Any], seed: int = 0) -> State:
    """Random float32 weights: no norm at its initial value, no near ties, drafts right now and then.

    The embedding carries most of the residual stream and `mtp.fc` passes its embedding half on, so the
    head's guess agrees with the main model about as often as not: both outcomes of a round are common.
    """
    generator = torch.Generator().manual_seed(seed)
    state = _main_shapes(config)
    if text_config(config).get("mtp_num_hidden_layers", 0):
        state |= _mtp_shapes(config, state)
    # Logits of deviation 3 want small rows from a tied embedding, which also echoes: louder layers there.
    tied = config.get("tie_word_embeddings")
    residual = 3.0 / text_config(config)["hidden_size"] ** 0.5 if tied else 2.0
    branch = (0.9 if tied else 0.25) * residual
    drawn = {name: _draw(name, tensor.shape, generator, residual, branch) for name, tensor in state.items()}
    if "mtp.norm.weight" in drawn:
        drawn["mtp.norm.weight"] = 0.8 * drawn["model.norm.weight"]
    return drawn


def _main_shapes(config: dict[str, Any]) -> State:
    with torch.device("meta"):
        state = dict(transformers_model(config).state_dict())
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    return state


def _mtp_shapes(config: dict[str, Any], main: State) -> State:
    """The head: the tensors of one full-attention layer, and those that feed it."""
    text = text_config(config)
    layer = f"model.layers.{text['layer_types'].index('full_attention')}."
    hidden = text["hidden_size"]
    with torch.device("meta"):
        head = {f"mtp.{n}.weight": torch.empty(hidden) for n in ("pre_fc_norm_embedding", "norm")}
        head |= {
            "mtp.pre_fc_norm_hidden.weight": torch.empty(hidden),
            "mtp.fc.weight": torch.empty(hidden, 2 * hidden),
        }
    layers = {n.replace(layer, "mtp.layers.0."): t for n, t in main.items() if n.startswith(layer)}
    return head | layers


def _draw(name: str, shape: torch.Size, generator: torch.Generator, residual: float, branch: float) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    normal = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    if name.endswith("A_log"):
        return uniform(0.05, 4.0).log()
    if name.endswith("dt_bias"):
        return uniform(-3.0, 1.0)
    if name.endswith("linear_attn.norm.weight"):  # plain weight; all others are zero-centred
        return uniform(0.5, 1.5)
    if "norm" in name:
        return uniform(-0.3, 0.3) if "pre_fc" not in name else uniform(-0.1, 0.1)
    if name.endswith("embed_tokens.weight"):
        return residual * torch.randn(shape, generator=generator)
    if name == "lm_head.weight":
        return 3.0 * normal
    if name == "mtp.fc.weight":
        return 0.2 * normal + torch.eye(shape[0], shape[1])
    if name.endswith("conv1d.weight"):
        return uniform(-0.7, 0.7)
    if "out_proj" in name or "o_proj" in name or "down_proj" in name:
        return branch * normal
    return 1.5 * normal


# NVFP4 and FP8: straight from the definition, float32 throughout.

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Nearest code, ties to the even one: sign << 3 | magnitude."""
    m = x.abs()
    code = (m > 0.25).int() + (m >= 0.75).int() + (m > 1.25).int() + (m >= 1.75).int()
    code = code + (m > 2.5).int() + (m >= 3.5).int() + (m > 5.0).int()
    return code + 8 * (x < 0).int()


def quantize_nvfp4(w: torch.Tensor, reciprocal: bool) -> tuple[State, torch.Tensor]:
    """({codes, scale, global}, what they stand for); the global scale is ModelOpt's or its reciprocal."""
    rows, columns = w.shape
    blocks = w.reshape(rows, columns // 16, 16)
    amax = w.abs().max().clamp(min=1e-30)
    block_amax = blocks.abs().amax(-1)
    if reciprocal:
        total = 448 * 6 / amax
        scale = (total * block_amax / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        unit = scale.float() / total
    else:
        total = amax / (6 * 448)
        scale = (block_amax / (6 * total)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        unit = scale.float() * total
    codes = _e2m1_codes(blocks / unit[..., None])
    values = _E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    values = values * scale.float()[..., None]
    values = (values / total if reciprocal else values * total).reshape(rows, columns)
    pairs = codes.reshape(rows, columns // 2, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)  # low nibble: the even column
    return {"codes": packed, "scale": scale, "global": total.reshape(())}, values


def quantize_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, what they stand for), one scale for the tensor."""
    scale = (w.abs().max() / 448).clamp(min=1e-30)
    codes = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


# Layouts: which linears are quantized, and how a directory says so.


def _format(name: str, layout: Layout, tied: bool) -> str:
    """One of "float", "fp8" and "nvfp4", for a tensor of the state."""
    experts = ".mlp.experts." in name or ".shared_expert." in name
    dense_mlp = any(f".mlp.{p}_proj." in name for p in ("gate", "up", "down"))
    attention = ".self_attn." in name and "_proj." in name
    gdn = any(f".linear_attn.{p}." in name for p in ("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj"))
    if layout == "float" or name.startswith("mtp."):
        return "float"
    if experts or dense_mlp:
        return "nvfp4"
    if layout == "compressed_tensors" and attention:
        return "nvfp4"
    if layout in ("modelopt_mixed", "compressed_tensors_mixed") and (attention or gdn):
        return "fp8"
    if layout == "modelopt_mixed" and name == "lm_head.weight" and not tied:
        return "nvfp4"
    return "float"


def _quantized(base: str, w: torch.Tensor, how: str, layout: Layout) -> tuple[State, torch.Tensor]:
    """The tensors on disk of one quantized linear, and its twin."""
    compressed = layout.startswith("compressed_tensors")
    if how == "fp8":
        codes, scale, values = quantize_fp8(w)
        disk = {f"{base}.weight": codes, f"{base}.weight_scale": scale.reshape(1) if compressed else scale}
        if not compressed:
            disk[f"{base}.input_scale"] = torch.tensor(0.125)
        return disk, values
    parts, values = quantize_nvfp4(w, reciprocal=compressed)
    if compressed:
        return {
            f"{base}.weight_packed": parts["codes"],
            f"{base}.weight_scale": parts["scale"],
            f"{base}.weight_global_scale": parts["global"].reshape(1),
            f"{base}.input_global_scale": torch.tensor([32.0]),
        }, values
    disk = {
        f"{base}.weight": parts["codes"],
        f"{base}.weight_scale": parts["scale"],
        f"{base}.weight_scale_2": parts["global"],
    }
    if layout == "modelopt_nvfp4":  # W4A4; the mixed layout is W4A16
        disk[f"{base}.input_scale"] = torch.tensor(0.125)
    return disk, values


def _split_experts(name: str, w: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """`experts.gate_up_proj` [E, 2I, H] or `experts.down_proj` [E, H, I] -> its per-expert linears."""
    base, kind = name.rsplit(".", 1)
    out = []
    for e, matrix in enumerate(w):
        halves = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
        parts = halves if kind == "gate_up_proj" else {"down_proj": matrix}
        out += [(f"{base}.{e}.{part}.weight", value) for part, value in parts.items()]
    return out


def _is_experts(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _encode(
    name: str, w: torch.Tensor, layout: Layout, dtype: torch.dtype, split: bool, tied: bool
) -> tuple[State, torch.Tensor]:
    """One tensor of the state -> its tensors on disk, and its twin."""
    how = _format(name, layout, tied)
    if layout.startswith("compressed_tensors") and name.endswith(("A_log", "linear_attn.norm.weight")):
        dtype = torch.float32  # as in 3.5; the other layouts follow 3.6
    if how == "float":
        stored = w.to(dtype)
        if _is_experts(name) and split:
            return dict(_split_experts(name, stored)), stored.float()
        return {name: stored}, stored.float()
    if not _is_experts(name):
        return _quantized(name.removesuffix(".weight"), w, how, layout)
    disk: State = {}
    twins: list[torch.Tensor] = []
    for part, matrix in _split_experts(name, w):
        tensors, values = _quantized(part.removesuffix(".weight"), matrix, how, layout)
        disk |= tensors
        twins.append(values)
    return disk, torch.cat(twins).reshape(w.shape)


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    state: State,
    layout: Layout = "float",
    *,
    shards: int = 1,
    mtp: Literal["inside", "sidecar", "none"] = "inside",
    mtp_experts: Literal["stacked", "split"] = "stacked",
    experts: Literal["stacked", "split"] = "stacked",
    dtype: str = "BF16",
    prefix: str | None = None,
    vision: bool = False,
) -> State:
    """Write a checkpoint directory; return the float32 weights it stands for, named as in `state`.

    `experts` is about float experts: quantized ones are always split. `prefix` replaces `model.`;
    by default `model.language_model.` where the config is nested.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tied = bool(config.get("tie_word_embeddings"))
    if prefix is None:
        prefix = "model.language_model." if "text_config" in config else "model."
    disk: State = {}
    sidecar: State = {}
    twin: State = {}
    for name, w in state.items():
        is_mtp = name.startswith("mtp.")
        if is_mtp and mtp == "none":
            continue
        split = (mtp_experts if is_mtp else experts) == "split"
        tensors, twin[name] = _encode(name, w, layout, DTYPES[dtype], split, tied)
        target = sidecar if is_mtp and mtp == "sidecar" else disk
        for key, tensor in tensors.items():
            key = prefix + key.removeprefix("model.") if key.startswith("model.") else key
            target[key] = tensor.clone().contiguous()
    if vision:
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "merger.norm.bias"):
            disk[f"model.visual.{name}"] = torch.zeros(3, 4, dtype=DTYPES[dtype])
    if layout == "modelopt_mixed":
        for name in [n for n in disk if n.endswith("self_attn.k_proj.weight") and not n.startswith("mtp.")]:
            attention = name.removesuffix("k_proj.weight")
            disk |= {f"{attention}{p}_proj.{p}_scale": torch.tensor(1.0) for p in "kv"}
    _write_quantization(directory, config, state, layout, prefix)
    _write_shards(directory, disk, shards)
    if sidecar:
        save_file(sidecar, directory / "model_mtp.safetensors", {"format": "pt"})
    return twin


def _write_shards(directory: Path, disk: State, shards: int) -> None:
    if shards == 1:
        save_file(disk, directory / "model.safetensors", {"format": "pt"})
        return
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(disk.items()) if i % shards == shard}
        save_file(part, directory / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in disk.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def _modules(state: State, layout: Layout, prefix: str, tied: bool) -> dict[str, str]:
    """Every module with a weight matrix, as named on disk -> its format; experts as one module."""
    modules = {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or "conv1d" in name or "embed" in name:
            continue
        module = name.rsplit(".", 1)[0]
        module = prefix + module.removeprefix("model.") if module.startswith("model.") else module
        modules[module] = _format(name, layout, tied)
    return modules


def _write_quantization(directory: Path, config: dict[str, Any], state: State, layout: Layout, prefix: str) -> None:
    """config.json, and hf_quant_config.json where ModelOpt writes one."""
    modules = _modules(state, layout, prefix, bool(config.get("tie_word_embeddings")))
    ignored = [m for m, how in modules.items() if how == "float" and not m.startswith("mtp.")]
    config = dict(config)
    producer = {"name": "modelopt", "version": "0.47.0"}
    if layout.startswith("compressed_tensors"):
        config["quantization_config"] = _compressed_tensors_config(modules, layout, ignored)
    elif layout == "modelopt_nvfp4":  # older releases say so in hf_quant_config.json alone
        inner: dict[str, Any] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
        document = {"producer": producer, "quantization": inner | {"exclude_modules": [*ignored, "mtp*"]}}
        (directory / "hf_quant_config.json").write_text(json.dumps(document))
    elif layout == "modelopt_mixed":
        algo = {"nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16}, "fp8": {"quant_algo": "FP8"}}
        layers = {m: algo[how] for m, how in modules.items() if how != "float"}
        inner = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        config["quantization_config"] = inner | {
            "quant_method": "modelopt",
            "producer": producer,
            "ignore": ["model.visual*", "mtp*"],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        }
        document = {"producer": producer, "quantization": inner | {"kv_cache_quant_algo": "FP8"}}
        (directory / "hf_quant_config.json").write_text(json.dumps(document))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _compressed_tensors_config(modules: dict[str, str], layout: Layout, ignored: list[str]) -> dict[str, Any]:
    nvfp4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    mixed = layout == "compressed_tensors_mixed"
    groups: dict[str, Any] = {
        "group_0": {"targets": [r"re:.*mlp\..*_proj$"] if mixed else ["Linear"], "weights": nvfp4}
    }
    if mixed:
        groups["group_1"] = {"targets": [m for m, how in modules.items() if how == "fp8"], "weights": fp8}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if mixed else "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*ignored, "re:.*visual.*", "re:^mtp.*"],
        "kv_cache_scheme": None,
    }


def demo(directory: str) -> None:
    """Write one tiny checkpoint, to look at or to export by hand."""
    config = tiny_config()
    write_checkpoint(Path(directory), config, random_state(config), "modelopt_mixed", vision=True)
    print(f"wrote {directory}")
