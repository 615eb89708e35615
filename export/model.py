"""The main model and the MTP head as torch modules over the ops of `plugins/`.

A module's parameter names are the tensor names of the weights file, so that a traced graph can point straight into
that file. Modules are built from the checkpoint's tensor table on the meta device, and take no memory; `load` gives
them real weights, for eager runs. Math: transformers' qwen3_5_moe, and for the head vLLM's qwen3_5_mtp.

    graph = Graph("main.verify", config, tensors, formats)     # the module behind one ONNX graph
    graph.load(weights)                                        # eager: the oracle of every engine
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from export.bindings import CACHE_BLOCK, GRAPHS, RING, RING_CALL_ROWS, input_specs
from export.config import FULL, ModelConfig
from export.weights import DTYPES
from plugins.gated_attention import BLOCK, GATED_ATTENTION, KV_APPEND
from plugins.gated_delta_net import GATED_DELTA_NET_PREFILL, GATED_DELTA_NET_VERIFY, cuda
from plugins.gated_delta_net.ring import GATED_DELTA_NET_RING, GATED_DELTA_NET_RING_PREFILL
from plugins.gated_delta_net.ring import STATES as RING_STATES
from plugins.linear import FLOAT_LINEAR, FP8_LINEAR, NVFP4_LINEAR
from plugins.moe_experts import FLOAT_MOE_EXPERTS, NVFP4_MOE_EXPERTS
from plugins.moe_routing import MOE_ROUTING
from plugins.rms_norm import RMS_NORM

State = dict[str, Tensor]
assert (CACHE_BLOCK, RING, RING_CALL_ROWS) == (BLOCK, cuda.RING, cuda.MAX_ROWS)


class Weights:
    """What the weights file holds: dtype and shape per tensor, format per linear or experts module."""

    def __init__(self, tensors: Mapping[str, Any], formats: Mapping[str, str], device: str) -> None:
        self.tensors, self.formats, self.device = tensors, formats, device

    def parameter(self, name: str) -> nn.Parameter:
        spec = self.tensors[name]
        # NVFP4's E4M3 block scales travel as bytes: see plugins/nvfp4.py.
        is_block_scale = name.endswith("weight_scale") and spec.dtype == "F8_E4M3"
        dtype = torch.uint8 if is_block_scale else DTYPES[spec.dtype][1]
        return nn.Parameter(torch.empty(spec.shape, dtype=dtype, device=self.device), requires_grad=False)


class Weight(nn.Module):
    """One tensor under the name `<module>.weight`."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight = weights.parameter(f"{name}.weight")


class RmsNorm(Weight):
    def __init__(self, weights: Weights, name: str, epsilon: float) -> None:
        super().__init__(weights, name)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return RMS_NORM(x, self.weight, epsilon=self.epsilon)


class Linear(Weight):
    """x [T, K] -> [T, N], in the format that the checkpoint has this weight in."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__(weights, name)
        self.format = weights.formats[name]
        if self.format != "float":
            self.weight_scale = weights.parameter(f"{name}.weight_scale")
        if self.format == "nvfp4":
            self.weight_scale_2 = weights.parameter(f"{name}.weight_scale_2")

    def forward(self, x: Tensor) -> Tensor:
        match self.format:
            case "float":
                return FLOAT_LINEAR(x, self.weight)
            case "fp8":
                return FP8_LINEAR(x, self.weight, self.weight_scale)
            case "nvfp4":
                return NVFP4_LINEAR(x, self.weight, self.weight_scale, self.weight_scale_2)
        raise AssertionError(self.format)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        for projection in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
            self.add_module(projection, Linear(weights, f"{name}.{projection}"))
        self.conv1d = Weight(weights, f"{name}.conv1d")
        self.norm = Weight(weights, f"{name}.norm")
        self.A_log = weights.parameter(f"{name}.A_log")
        self.dt_bias = weights.parameter(f"{name}.dt_bias")
        self.attributes = {
            "num_k_heads": config.linear_num_key_heads,
            "num_v_heads": config.linear_num_value_heads,
            "head_k_dim": config.linear_key_head_dim,
            "head_v_dim": config.linear_value_head_dim,
            "epsilon": config.rms_norm_eps,
        }

    def forward(
        self, x: Tensor, position: Tensor, accepted: Tensor, state: list[Tensor], prefill: bool
    ) -> tuple[Tensor, list[Tensor]]:
        inputs = [
            *(self.get_submodule(f"in_proj_{part}")(x) for part in ("qkv", "z", "b", "a")),
            *(self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight),
        ]
        if len(state) == len(RING_STATES):
            op = GATED_DELTA_NET_RING_PREFILL if prefill else GATED_DELTA_NET_RING
            inputs.append(position)
        else:
            op = GATED_DELTA_NET_PREFILL if prefill else GATED_DELTA_NET_VERIFY
        y, *next_state = op(*inputs, accepted, *state, **self.attributes)
        return self.get_submodule("out_proj")(y), next_state


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str, only_append: bool = False) -> None:
        super().__init__()
        for projection in ("k_proj", "v_proj") if only_append else ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(projection, Linear(weights, f"{name}.{projection}"))
        self.k_norm = Weight(weights, f"{name}.k_norm")
        if not only_append:
            self.q_norm = Weight(weights, f"{name}.q_norm")
        self.attributes = {
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rotary_dim": config.rotary_dim,
            "rope_theta": config.rope_theta,
            "epsilon": config.rms_norm_eps,
        }
        self.num_heads = config.num_attention_heads

    def append(self, x: Tensor, position: Tensor, kv_cache: Tensor) -> Tensor:
        """The KV cache with the keys and values of x's rows."""
        k, v = self.get_submodule("k_proj")(x), self.get_submodule("v_proj")(x)
        attributes = {**self.attributes, "cache_dtype": dtype_name(kv_cache)}
        return KV_APPEND(k, v, self.k_norm.weight, position, kv_cache, **attributes)

    def forward(self, x: Tensor, position: Tensor, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        y, kv_cache = GATED_ATTENTION(
            *(self.get_submodule(f"{part}_proj")(x) for part in "qkv"),
            *(self.q_norm.weight, self.k_norm.weight, position, kv_cache),
            **self.attributes,
            num_heads=self.num_heads,
            cache_dtype=dtype_name(kv_cache),
        )
        return self.get_submodule("o_proj")(y), kv_cache


class Experts(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.format = weights.formats[name]
        self.gate_up_proj = Weight(weights, f"{name}.gate_up_proj")
        self.down_proj = Weight(weights, f"{name}.down_proj")
        if self.format == "nvfp4":
            for module, part in ((self.gate_up_proj, "gate_up_proj"), (self.down_proj, "down_proj")):
                for scale in ("weight_scale", "weight_scale_2"):
                    setattr(module, scale, weights.parameter(f"{name}.{part}.{scale}"))
        self.attributes = {"num_experts": config.num_experts, "moe_intermediate_size": config.moe_intermediate_size}

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        tensors = [*self.gate_up_proj.parameters(), *self.down_proj.parameters()]
        op = FLOAT_MOE_EXPERTS if self.format == "float" else NVFP4_MOE_EXPERTS
        return op(x, topk_weights, topk_ids, *tensors, **self.attributes)


class SwiGlu(nn.Module):
    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(weights, f"{name}.{part}_proj") for part in ("gate", "up", "down")
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * gate.sigmoid() * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.gate = Weight(weights, f"{name}.gate")
        self.experts = Experts(config, weights, f"{name}.experts")
        self.shared_expert = SwiGlu(weights, f"{name}.shared_expert")
        self.shared_expert_gate = Weight(weights, f"{name}.shared_expert_gate")
        self.num_experts_per_tok = config.num_experts_per_tok

    def forward(self, x: Tensor) -> Tensor:
        routing = MOE_ROUTING(x, self.gate.weight, num_experts_per_tok=self.num_experts_per_tok)
        shared = FLOAT_LINEAR(x, self.shared_expert_gate.weight).sigmoid() * self.shared_expert(x)
        return self.experts(x, *routing) + shared


class Layer(nn.Module):
    """A decoder layer. Its state: GDN's states and window, GDN's state and ring, or one KV cache."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.input_layernorm = RmsNorm(weights, f"{name}.input_layernorm", config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(weights, f"{name}.post_attention_layernorm", config.rms_norm_eps)
        if kind == FULL:
            self.self_attn = Attention(config, weights, f"{name}.self_attn")
        else:
            self.linear_attn = GatedDeltaNet(config, weights, f"{name}.linear_attn")
        mlp = f"{name}.mlp"
        self.mlp = MixtureOfExperts(config, weights, mlp) if config.is_moe else SwiGlu(weights, mlp)

    def forward(
        self, x: Tensor, position: Tensor, accepted: Tensor, state: list[Tensor], prefill: bool
    ) -> tuple[Tensor, list[Tensor]]:
        normed = self.input_layernorm(x)
        if self.kind == FULL:
            mixed, cache = self.self_attn(normed, position, state[0])
            next_state = [cache]
        else:
            mixed, next_state = self.linear_attn(normed, position, accepted, state, prefill)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), next_state


class AppendLayer(nn.Module):
    """What a prompt row needs of the head's layer: its key and value, no attention, no experts."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(weights, f"{name}.input_layernorm", config.rms_norm_eps)
        self.self_attn = Attention(config, weights, f"{name}.self_attn", only_append=True)

    def forward(self, x: Tensor, position: Tensor, kv_cache: Tensor) -> Tensor:
        return self.self_attn.append(self.input_layernorm(x), position, kv_cache)


class MtpHead(nn.Module):
    """x = fc([norm(embedding of token p + 1), norm(hidden of p)]), then one attention layer at position p."""

    def __init__(self, config: ModelConfig, weights: Weights, only_append: bool) -> None:
        super().__init__()
        epsilon = config.rms_norm_eps
        self.pre_fc_norm_embedding = RmsNorm(weights, "mtp.pre_fc_norm_embedding", epsilon)
        self.pre_fc_norm_hidden = RmsNorm(weights, "mtp.pre_fc_norm_hidden", epsilon)
        self.fc = Linear(weights, "mtp.fc")
        if not only_append:
            self.norm = RmsNorm(weights, "mtp.norm", epsilon)
            self.layers = nn.ModuleList([Layer(config, weights, "mtp.layers.0", FULL)])
            return
        self.layers = nn.ModuleList([AppendLayer(config, weights, "mtp.layers.0")])

    def combine(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        return self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1))


class Graph(nn.Module):
    """The module behind one of GRAPHS. Inputs and outputs: those of export.bindings for this layout, in that order. The
    modules within follow the state that they are given."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tensors: Mapping[str, Any],
        formats: Mapping[str, str],
        device: str = "meta",
        layout: str = "host",
    ) -> None:
        assert name in GRAPHS
        super().__init__()
        weights = Weights(tensors, formats, device)
        self.graph_name, self.config, self.layout = name, config, layout
        self.embed_tokens = Weight(weights, "embed_tokens")
        if name.startswith("main"):
            self.layers = nn.ModuleList(
                Layer(config, weights, f"layers.{i}", kind) for i, kind in enumerate(config.layer_types)
            )
            self.norm = RmsNorm(weights, "norm", config.rms_norm_eps)
        else:
            self.mtp = MtpHead(config, weights, only_append=name == "mtp.prefill")
        if name != "mtp.prefill" and not config.tie_word_embeddings:
            self.lm_head = Linear(weights, "lm_head")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(input_specs(self.graph_name, self.config, self.layout), inputs, strict=True))
        embedding = torch.nn.functional.embedding(named["token_ids"], self.embed_tokens.weight).float()
        if self.graph_name.startswith("main"):
            return self._main(embedding, named)
        cache = named["mtp.layers.0.kv_cache"]
        x = self.mtp.combine(embedding, named["hidden"])
        layer = self.mtp.layers[0]
        if self.graph_name == "mtp.prefill":
            return (layer(x, named["position"], cache),)
        x, (cache,) = layer(x, named["position"], named["accepted"], [cache], prefill=False)
        hidden = self.mtp.norm(x.index_select(0, named["accepted"] - 1))
        return hidden, self._logits(hidden), cache

    def _main(self, x: Tensor, named: State) -> tuple[Tensor, ...]:
        prefill = self.graph_name == "main.prefill"
        next_state: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            state = [tensor for name, tensor in named.items() if name.startswith(f"layers.{i}.")]
            x, layer_state = layer(x, named["position"], named["accepted"], state, prefill)
            next_state += layer_state
        hidden = self.norm(x)
        return hidden, self._logits(hidden[-1:] if prefill else hidden), *next_state

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return FLOAT_LINEAR(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def load(self, weights: Mapping[str, Tensor]) -> Graph:
        """Give the modules their weights, by name, bytes unchanged; all of them must be there."""
        for name, parameter in list(self.named_parameters()):
            tensor = weights[name]
            owner, _, leaf = name.rpartition(".")
            tensor = tensor if tensor.dtype == parameter.dtype else tensor.view(parameter.dtype)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        return self
