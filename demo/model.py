"""The demo model as plain functions over a dict of tensors: what train.py trains and quantize.py calibrates.

Contract: `Config.from_json` reads the checkpoint's config.json; `forward_all` gives the hidden states of the
main model and of two unrolled draft steps. Tensors have the checkpoint's names without the prefix
`model.language_model.`. The math is that of transformers' qwen3_5_moe, plus the MTP head; the arrangement is
for training: chunked delta rule, all experts densely, whole sequences, no cache. `demo.evaluate` holds it to
transformers.

    python -m demo.train --smoke
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Weights = dict[str, Tensor]
CHUNK = 64  # of the delta rule; sequence lengths are padded to a multiple of it


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float

    @staticmethod
    def from_json(path: Path) -> Config:
        text = json.loads(path.read_text())["text_config"]
        rope = text["rope_parameters"]
        derived: dict[str, Any] = {
            "rotary_dim": int(text["head_dim"] * rope["partial_rotary_factor"]),
            "rope_theta": float(rope["rope_theta"]),
        }
        return Config(**{n: derived[n] if n in derived else text[n] for n in Config.__dataclass_fields__})

    def is_attention(self, layer: int) -> bool:
        return layer % 4 == 3


def attention_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "self_attn.q_proj.weight": (2 * q, c.hidden_size),
        "self_attn.k_proj.weight": (kv, c.hidden_size),
        "self_attn.v_proj.weight": (kv, c.hidden_size),
        "self_attn.o_proj.weight": (c.hidden_size, q),
        "self_attn.q_norm.weight": (c.head_dim,),
        "self_attn.k_norm.weight": (c.head_dim,),
    }


def linear_attention_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    key = c.linear_num_key_heads * c.linear_key_head_dim
    value = c.linear_num_value_heads * c.linear_value_head_dim
    return {
        "linear_attn.in_proj_qkv.weight": (2 * key + value, c.hidden_size),
        "linear_attn.in_proj_z.weight": (value, c.hidden_size),
        "linear_attn.in_proj_b.weight": (c.linear_num_value_heads, c.hidden_size),
        "linear_attn.in_proj_a.weight": (c.linear_num_value_heads, c.hidden_size),
        "linear_attn.conv1d.weight": (2 * key + value, 1, c.linear_conv_kernel_dim),
        "linear_attn.A_log": (c.linear_num_value_heads,),
        "linear_attn.dt_bias": (c.linear_num_value_heads,),
        "linear_attn.norm.weight": (c.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (c.hidden_size, value),
    }


def layer_shapes(c: Config, is_attention: bool) -> dict[str, tuple[int, ...]]:
    shared = c.shared_expert_intermediate_size
    return {
        "input_layernorm.weight": (c.hidden_size,),
        "post_attention_layernorm.weight": (c.hidden_size,),
        **(attention_shapes(c) if is_attention else linear_attention_shapes(c)),
        "mlp.gate.weight": (c.num_experts, c.hidden_size),
        "mlp.experts.gate_up_proj": (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size),
        "mlp.experts.down_proj": (c.num_experts, c.hidden_size, c.moe_intermediate_size),
        "mlp.shared_expert.gate_proj.weight": (shared, c.hidden_size),
        "mlp.shared_expert.up_proj.weight": (shared, c.hidden_size),
        "mlp.shared_expert.down_proj.weight": (c.hidden_size, shared),
        "mlp.shared_expert_gate.weight": (1, c.hidden_size),
    }


def all_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_hidden_layers):
        inner = layer_shapes(c, c.is_attention(layer))
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes |= {"norm.weight": (c.hidden_size,), "lm_head.weight": (c.vocab_size, c.hidden_size)}
    shapes["mtp.fc.weight"] = (c.hidden_size, 2 * c.hidden_size)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        shapes[f"mtp.{name}.weight"] = (c.hidden_size,)
    return shapes | {f"mtp.layers.0.{name}": shape for name, shape in layer_shapes(c, True).items()}


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())


def rope_tables(c: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary_dim / 2]"""
    exponents = torch.arange(0, c.rotary_dim, 2, device=positions.device).float() / c.rotary_dim
    angles = positions.float()[:, None] * (1.0 / c.rope_theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + rotary_dim / 2) of x [B, T, H, D]; the dims behind them pass through."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class KeyValue(NamedTuple):
    key: Tensor  # [B, Hkv, T, D], rotated
    value: Tensor


def attention(
    h: Tensor, w: Weights, c: Config, cos: Tensor, sin: Tensor, past: KeyValue | None = None
) -> tuple[Tensor, KeyValue]:
    """Causal gated attention on h [B, T, hidden]. With `past`, row p sees past rows <= p and its own row."""
    batch, length, _ = h.shape
    names = ("q_proj", "k_proj", "v_proj")
    proj = torch.cat([w[f"self_attn.{name}.weight"] for name in names])
    q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    q_gate, k, v = F.linear(h, proj).split([2 * q_size, kv_size, kv_size], -1)
    q, gate = q_gate.view(batch, length, -1, 2 * c.head_dim).chunk(2, -1)
    q = rms(q, w["self_attn.q_norm.weight"], c.rms_norm_eps)
    k = rms(k.view(batch, length, -1, c.head_dim), w["self_attn.k_norm.weight"], c.rms_norm_eps)
    q = rotate(q, cos, sin).to(h.dtype).transpose(1, 2)
    k = rotate(k, cos, sin).to(h.dtype).transpose(1, 2)
    v = v.view(batch, length, -1, c.head_dim).transpose(1, 2)
    own = KeyValue(k, v)
    mask = None
    if past is not None:
        k, v = torch.cat([past.key, k], 2), torch.cat([past.value, v], 2)
        rows = torch.arange(length, device=h.device)
        mask = torch.cat([rows[None] <= rows[:, None], rows[None] == rows[:, None]], 1)
    groups = c.num_attention_heads // c.num_key_value_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    out = out.transpose(1, 2) * torch.sigmoid(gate)
    return F.linear(out.reshape(batch, length, -1), w["self_attn.o_proj.weight"]), own


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + strict)^-1 for strictly lower triangular [..., C, C], by inverting blocks of doubling size.

    Blocks, and not powers of `strict`: with correlated keys the powers grow by many orders of magnitude
    before they cancel. The last line is a Newton step; its derivative, with X fixed, is that of the inverse.
    """
    size = strict.shape[-1]
    rows = torch.arange(size, device=strict.device)
    eye = torch.eye(size, device=strict.device)
    with torch.no_grad():
        x = eye
        block = 1
        while block < size:
            same = rows[:, None] // (2 * block) == rows[None] // (2 * block)
            corner = same & (rows[:, None] // block % 2 == 1) & (rows[None] // block % 2 == 0)
            x = eye - strict * corner if block == 1 else x - x @ (strict * corner) @ x
            block *= 2
    return 2 * x - x @ (eye + strict) @ x


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule by chunks, in float32. q, k [B, T, Hk, Dk]; v [B, T, Hv, Dv]; g, beta [B, T, Hv].

    Inside a chunk, with G the running sum of g and S0 the state before it:
    D = (I + tril(beta e^(Gi-Gj) k k^T))^-1 (beta v - beta e^G k S0) = U - W S0;  O = e^G q S0 + P D
    with P = tril(e^(Gi-Gj) q k^T), and S1 = e^Gend S0 + K^T D with K = e^(Gend-G) k.
    """
    batch, length, heads, dv = v.shape
    dk, groups, chunks = k.shape[-1], heads // k.shape[2], length // CHUNK

    def by_chunk(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, chunks, CHUNK, ...]
        return x.view(batch, chunks, CHUNK, *x.shape[2:]).movedim(3, 1)

    q, k, v, g, beta = (by_chunk(x) for x in (q, k, v, g, beta))
    beta = beta[..., None]
    G = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    kk, qk = k @ k.transpose(-1, -2), q @ k.transpose(-1, -2)
    kk, qk, q, k = (x.repeat_interleave(groups, 1) for x in (kk, qk, q, k))
    inverse = unit_lower_inverse(beta * decay * kk * lower.tril(-1))
    gain = G.exp()[..., None]
    WU = inverse @ torch.cat([beta * gain * k, beta * v], -1)
    P = decay * qk
    K = (G[..., -1:] - G).exp()[..., None] * k
    PWU, KWU = P @ WU, K.transpose(-1, -2) @ WU
    eye = torch.eye(dk, device=v.device)
    step = (gain[..., -1:, :] * eye - KWU[..., :dk]).flatten(0, 1).unbind(1)
    add = KWU[..., dk:].flatten(0, 1).unbind(1)
    states = [torch.zeros_like(add[0])]
    for i in range(chunks - 1):
        states.append(torch.baddbmm(add[i], step[i], states[-1]))
    S = torch.stack(states, 1).view(batch, heads, chunks, dk, dv)
    out = (gain * q - PWU[..., :dk]) @ S + PWU[..., dk:]
    return out.movedim(1, 3).reshape(batch, length, heads, dv)


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def linear_attention(h: Tensor, w: Weights, c: Config) -> Tensor:
    """Gated DeltaNet mixer on h [B, T, hidden]."""
    batch, length, _ = h.shape
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    parts = [w[f"linear_attn.{name}.weight"] for name in names]
    qkv, z, b, a = F.linear(h, torch.cat(parts)).split([len(p) for p in parts], -1)
    taps = w["linear_attn.conv1d.weight"].float()  # [channels, 1, kernel]
    width = taps.shape[-1]
    padded = F.pad(qkv.float(), (0, 0, width - 1, -length % CHUNK))
    total = padded.shape[1] - width + 1
    qkv = F.silu(sum(padded[:, i : i + total] * taps[:, 0, i] for i in range(width)))  # type: ignore[arg-type]
    key = c.linear_num_key_heads * c.linear_key_head_dim
    q, k, v = qkv.split([key, key, c.linear_num_value_heads * c.linear_value_head_dim], -1)
    q = l2norm(q.reshape(batch, total, -1, c.linear_key_head_dim)) * c.linear_key_head_dim**-0.5
    k = l2norm(k.reshape(batch, total, -1, c.linear_key_head_dim))
    v = v.reshape(batch, total, -1, c.linear_value_head_dim)
    pad = (0, 0, 0, total - length)
    g = -w["linear_attn.A_log"].float().exp() * F.softplus(a.float() + w["linear_attn.dt_bias"].float())
    out = delta_rule(q, k, v, F.pad(g, pad), F.pad(torch.sigmoid(b.float()), pad))[:, :length]
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + c.rms_norm_eps)
    out = w["linear_attn.norm.weight"].float() * out * F.silu(z.float().view(out.shape))
    return F.linear(out.flatten(2).to(h.dtype), w["linear_attn.out_proj.weight"])


def moe(h: Tensor, w: Weights, c: Config) -> tuple[Tensor, Tensor]:
    """Routed and shared experts, all of them on every token, and the load-balancing loss.

    Experts that are not chosen get weight 0. For experts this small two large products beat gathering.
    """
    x = h.flatten(0, 1)
    probs = F.linear(x, w["mlp.gate.weight"]).float().softmax(-1)
    top, chosen = probs.topk(c.num_experts_per_tok, -1)
    routed = torch.zeros_like(probs).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    load = (routed > 0).float().mean(0) / c.num_experts_per_tok
    balance = c.num_experts * (load.detach() * probs.mean(0)).sum()
    shared_names = ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")
    gate_up = w["mlp.experts.gate_up_proj"].flatten(0, 1)
    y = F.linear(x, torch.cat([gate_up, *(w[n] for n in shared_names)]))
    gate, up = y[:, : len(gate_up)].view(len(x), c.num_experts, 2, -1).unbind(2)
    shared_gate, shared_up = y[:, len(gate_up) :].chunk(2, -1)
    share = torch.sigmoid(F.linear(x, w["mlp.shared_expert_gate.weight"]).float())
    inner = (F.silu(gate.float()) * up.float() * routed[..., None]).flatten(1)
    shared_inner = F.silu(shared_gate.float()) * shared_up.float() * share
    down = w["mlp.experts.down_proj"].transpose(0, 1).flatten(1)  # [hidden, experts * inner]
    both = torch.cat([inner, shared_inner], -1).to(h.dtype)
    out = F.linear(both, torch.cat([down, w["mlp.shared_expert.down_proj.weight"]], 1))
    return out.view(h.shape), balance


def linear_layer(x: Tensor, w: Weights, c: Config) -> tuple[Tensor, Tensor]:
    dtype = w["mlp.experts.down_proj"].dtype
    x = x + linear_attention(rms(x, w["input_layernorm.weight"], c.rms_norm_eps).to(dtype), w, c)
    out, balance = moe(rms(x, w["post_attention_layernorm.weight"], c.rms_norm_eps).to(dtype), w, c)
    return x + out, balance


def attention_layer(
    x: Tensor, w: Weights, c: Config, cos: Tensor, sin: Tensor, past: KeyValue | None = None
) -> tuple[Tensor, Tensor, KeyValue]:
    dtype = w["mlp.experts.down_proj"].dtype
    h = rms(x, w["input_layernorm.weight"], c.rms_norm_eps).to(dtype)
    mixed, own = attention(h, w, c, cos, sin, past)
    x = x + mixed
    out, balance = moe(rms(x, w["post_attention_layernorm.weight"], c.rms_norm_eps).to(dtype), w, c)
    return x + out, balance, own


class Layers(NamedTuple):
    """The two layer functions, so that train.py can put compiled ones in."""

    linear: Callable[..., tuple[Tensor, Tensor]] = linear_layer
    attention: Callable[..., tuple[Tensor, Tensor, KeyValue]] = attention_layer


class Hidden(NamedTuple):
    main: Tensor  # [B, T, hidden], after the final norm; row p predicts token p + 1
    draft1: Tensor  # after mtp.norm; row p, from token p + 1, predicts token p + 2
    draft2: Tensor  # row p, from token p + 2 and draft1's row p, predicts token p + 3
    balance: Tensor


def draft_input(w: Weights, c: Config, tokens: Tensor, hidden: Tensor) -> Tensor:
    embedded = F.embedding(tokens, w["embed_tokens.weight"])
    embedded = rms(embedded, w["mtp.pre_fc_norm_embedding.weight"], c.rms_norm_eps)
    hidden = rms(hidden, w["mtp.pre_fc_norm_hidden.weight"], c.rms_norm_eps)
    fc = w["mtp.fc.weight"]
    return F.linear(torch.cat([embedded, hidden], -1).to(fc.dtype), fc).float()


def forward_main(w: Weights, c: Config, tokens: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, hidden] of tokens [B, T] after the final norm, and the summed balance loss."""
    x = F.embedding(tokens, w["embed_tokens.weight"]).float()
    cos, sin = rope_tables(c, torch.arange(tokens.shape[1], device=tokens.device))
    total = torch.zeros((), device=x.device)
    for layer in range(c.num_hidden_layers):
        inner = under(w, f"layers.{layer}.")
        if c.is_attention(layer):
            x, balance, _ = layers.attention(x, inner, c, cos, sin)
        else:
            x, balance = layers.linear(x, inner, c)
        total = total + balance
    return rms(x, w["norm.weight"], c.rms_norm_eps), total


def forward_all(w: Weights, c: Config, tokens: Tensor, layers: Layers | None = None) -> Hidden:
    """Main model on tokens[:, :T] and both draft steps, for tokens [B, T + 2]."""
    layers = layers or Layers()
    length = tokens.shape[1] - 2
    main, total = forward_main(w, c, tokens[:, :length], layers)
    inner = under(w, "mtp.layers.0.")
    cos, sin = rope_tables(c, torch.arange(length + 1, device=tokens.device))
    x = draft_input(w, c, tokens[:, 1:-1], main)
    x, balance1, past = layers.attention(x, inner, c, cos[:-1].clone(), sin[:-1].clone())
    draft1 = rms(x, w["mtp.norm.weight"], c.rms_norm_eps)
    x = draft_input(w, c, tokens[:, 2:], draft1)
    x, balance2, _ = layers.attention(x, inner, c, cos[1:].clone(), sin[1:].clone(), past)
    draft2 = rms(x, w["mtp.norm.weight"], c.rms_norm_eps)
    return Hidden(main, draft1, draft2, total + balance1 + balance2)
