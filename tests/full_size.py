"""A checkpoint of the real size and layout of nvidia/Qwen3.6-35B-A3B-NVFP4, all zeros, sparse on disk.

For measuring what an export costs: 93,000 tensors, 22 GB of apparent size, no disk space. Sizes and layout are those
of the published config (40 layers, 256 experts, FP8 attention and GDN, NVFP4 experts and lm_head).

    python -m tests.full_size build/full-size && make engines MODEL=build/full-size
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.weights import write_hole

Tensor = tuple[str, str, tuple[int, ...]]

TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "attn_output_gate": True,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
H, INNER = TEXT["hidden_size"], TEXT["moe_intermediate_size"]


class Layout:
    """Collects tensors and the quantization that each module is declared with."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.declared: dict[str, dict[str, object]] = {}

    def nvfp4(self, name: str, n: int, k: int) -> Iterator[Tensor]:
        self.declared[name] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        yield f"{name}.weight", "U8", (n, k // 2)
        yield f"{name}.weight_scale", "F8_E4M3", (n, k // 16)
        yield f"{name}.weight_scale_2", "F32", ()

    def fp8(self, name: str, n: int, k: int) -> Iterator[Tensor]:
        self.declared[name] = {"quant_algo": "FP8"}
        yield f"{name}.weight", "F8_E4M3", (n, k)
        yield f"{name}.weight_scale", "F32", ()
        yield f"{name}.input_scale", "F32", ()

    def swiglu(self, name: str, inner: int) -> Iterator[Tensor]:
        yield from self.nvfp4(f"{name}.gate_proj", inner, H)
        yield from self.nvfp4(f"{name}.up_proj", inner, H)
        yield from self.nvfp4(f"{name}.down_proj", H, inner)

    def layer(self, name: str, attention: bool) -> Iterator[Tensor]:
        yield f"{name}.input_layernorm.weight", "BF16", (H,)
        yield f"{name}.post_attention_layernorm.weight", "BF16", (H,)
        if attention:
            for part, n, k in (("q", 8192, H), ("k", 512, H), ("v", 512, H), ("o", H, 4096)):
                yield from self.fp8(f"{name}.self_attn.{part}_proj", n, k)
            yield f"{name}.self_attn.q_norm.weight", "BF16", (256,)
            yield f"{name}.self_attn.k_norm.weight", "BF16", (256,)
        else:
            for part, n, k in (("in_proj_qkv", 8192, H), ("in_proj_z", 4096, H), ("out_proj", H, 4096)):
                yield from self.fp8(f"{name}.linear_attn.{part}", n, k)
            for part in ("in_proj_a", "in_proj_b"):
                yield f"{name}.linear_attn.{part}.weight", "BF16", (32, H)
            yield f"{name}.linear_attn.conv1d.weight", "BF16", (8192, 1, 4)
            for part, n in (("A_log", 32), ("dt_bias", 32), ("norm.weight", 128)):
                yield f"{name}.linear_attn.{part}", "BF16", (n,)
        yield f"{name}.mlp.gate.weight", "BF16", (self.experts, H)
        yield f"{name}.mlp.shared_expert_gate.weight", "BF16", (1, H)
        yield from self.swiglu(f"{name}.mlp.shared_expert", INNER)
        for expert in range(self.experts):
            yield from self.swiglu(f"{name}.mlp.experts.{expert}", INNER)


def head(experts: int) -> Iterator[Tensor]:
    """The MTP head, BF16, its experts stacked."""
    yield "mtp.fc.weight", "BF16", (H, 2 * H)
    layer = "mtp.layers.0"
    for name in ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"):
        yield f"{name}.weight", "BF16", (H,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{name}.weight", "BF16", (H,)
    for part, n, k in (("q", 8192, H), ("k", 512, H), ("v", 512, H), ("o", H, 4096)):
        yield f"{layer}.self_attn.{part}_proj.weight", "BF16", (n, k)
    for part in "qk":
        yield f"{layer}.self_attn.{part}_norm.weight", "BF16", (256,)
    yield f"{layer}.mlp.gate.weight", "BF16", (experts, H)
    yield f"{layer}.mlp.experts.gate_up_proj", "BF16", (experts, 2 * INNER, H)
    yield f"{layer}.mlp.experts.down_proj", "BF16", (experts, H, INNER)
    for part, n, k in (("gate", INNER, H), ("up", INNER, H), ("down", H, INNER)):
        yield f"{layer}.mlp.shared_expert.{part}_proj.weight", "BF16", (n, k)
    yield f"{layer}.mlp.shared_expert_gate.weight", "BF16", (1, H)


def write(directory: Path, layers: int = 40, experts: int = 256, vocab_size: int = 248320) -> None:
    """Write the checkpoint, or one with fewer layers, experts or words; one shard per ten layers."""
    directory.mkdir(parents=True)
    layout, prefix = Layout(experts), "model.language_model"
    shards: list[list[Tensor]] = [[(f"{prefix}.embed_tokens.weight", "BF16", (vocab_size, H))]]
    for i in range(layers):
        if i and i % 10 == 0:
            shards.append([])
        shards[-1] += layout.layer(f"{prefix}.layers.{i}", attention=i % 4 == 3)
    shards[-1] += [(f"{prefix}.norm.weight", "BF16", (H,)), *layout.nvfp4("lm_head", vocab_size, H), *head(experts)]
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_hole(directory / file, tensors)
        index |= {name: file for name, _, _ in tensors}
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layout.declared}
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab_size},
        "quantization_config": quantization,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 40)
