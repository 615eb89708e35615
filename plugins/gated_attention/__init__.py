"""Gated attention between its projections: q/k norm, partial RoPE, KV append, attention, sigmoid output gate.

    q, gate = q_gate per head;  q, k = RMS(q, 1 + q_norm), RMS(k, 1 + k_norm), then RoPE on the first rotary_dim
    y = softmax(q kᵀ / sqrt(D), causal) v * sigmoid(gate)

(transformers, Qwen3_5MoeAttention.) Row t stands at position + t; its key and value are written to that slot of the
cache before anybody reads it, and it sees the slots up to its own, so what rejected drafts left further on is never
read. `KvAppend` is the same without the queries: what the MTP head needs of a prompt.

Shapes: q_gate [T, Hq 2D] (per head: D of q, D of gate), k and v [T, Hkv D], q_norm and k_norm [D] (zero-centred),
position int64 or int32 [1], kv_cache [2, Hkv, S, D] (keys, then values), S a multiple of 64, y [T, Hq D]. Float32; with
the `cache_dtype` "float16" keys and values are clamped to its range and rounded when they are appended to the cache.
A row's bits do not depend on T: the rows of a KV head's queries go through one product, which takes another kernel for
a single row only, so where a head has one query a row is added.
"""

from collections.abc import Iterator
from typing import Any

import torch

from plugins import rms_norm
from plugins.gated_attention.launch import GATED_ATTENTION_LAUNCH, KV_APPEND_LAUNCH
from plugins.op import Attributes, Case, Op, floats, ints, number, padded, scalar

BLOCK = 64  # attention reads the cache in whole blocks: adding masked slots in blocks leaves every sum's bits alone
LARGEST_HALF = 65504.0  # float16
ATTRIBUTES = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "rope_theta", "epsilon", "cache_dtype")


def inverse_frequencies(rotary_dim: int, rope_theta: float) -> torch.Tensor:
    """float32 [rotary_dim / 2], as transformers computes them."""
    return 1.0 / (rope_theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))


def rotate(x: torch.Tensor, position: torch.Tensor, rotary_dim: int, rope_theta: float) -> torch.Tensor:
    """x [T, heads, D]: rotate-half RoPE on the first rotary_dim of D, pairs (i, i + rotary_dim / 2)."""
    phase = (position + torch.arange(len(x))).float()[:, None] * inverse_frequencies(rotary_dim, rope_theta)
    cos, sin = phase.cos()[:, None], phase.sin()[:, None]  # [T, 1, rotary_dim / 2]
    first, second, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def append_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_norm: torch.Tensor,
    position: torch.Tensor,
    kv_cache: torch.Tensor,
    **attributes: Any,
) -> torch.Tensor:
    heads = attributes["num_kv_heads"]
    keys = rms_norm.reference(k.unflatten(-1, (heads, -1)), k_norm, epsilon=attributes["epsilon"])
    keys = rotate(keys, position, attributes["rotary_dim"], attributes["rope_theta"])
    rows = torch.stack([keys, v.unflatten(-1, (heads, -1))]).transpose(1, 2)  # [2, Hkv, T, D]
    if kv_cache.dtype == torch.float16:  # as `cache_dtype` says
        rows = rows.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    start = int(position)
    return torch.cat([kv_cache[:, :, :start], rows, kv_cache[:, :, start + len(k) :]], dim=2)


def attention_reference(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    position: torch.Tensor,
    kv_cache: torch.Tensor,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_cache = append_reference(k, v, k_norm, position, kv_cache, **attributes)
    rows, heads, dim = len(q_gate), attributes["num_heads"], attributes["head_dim"]
    q, gate = q_gate.unflatten(-1, (heads, 2 * dim)).chunk(2, dim=-1)
    q = rms_norm.reference(q, q_norm, epsilon=attributes["epsilon"])
    q = rotate(q, position, attributes["rotary_dim"], attributes["rope_theta"])
    slots = int(position) + rows
    keys, values = kv_cache[:, :, :slots].to(q.dtype).repeat_interleave(heads // attributes["num_kv_heads"], dim=1)
    scores = torch.einsum("thd,hsd->ths", q, keys) * dim**-0.5
    hidden = torch.arange(slots)[None] > (position + torch.arange(rows))[:, None]  # [T, S]
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return (torch.einsum("ths,hsd->thd", weights, values) * gate.sigmoid()).flatten(1), kv_cache


def infer_append(*inputs: torch.Tensor, **_: Any) -> list[tuple[torch.dtype, list[Any]]]:
    return [(inputs[-1].dtype, list(inputs[-1].shape))]


def infer_attention(q_gate: torch.Tensor, *inputs: torch.Tensor, **_: Any) -> list[tuple[torch.dtype, list[Any]]]:
    return [(torch.float32, [q_gate.shape[0], q_gate.shape[1] // 2]), *infer_append(*inputs)]


def append_body(attributes: Attributes) -> str:
    heads, dim, rotary = attributes["num_kv_heads"], attributes["head_dim"], attributes["rotary_dim"]
    frequencies = inverse_frequencies(rotary, attributes["rope_theta"]).tolist()
    return f"""
        {ints("zero", 0)}
        {ints("one", 1)}
        scalar_zero = Constant <value_int = 0> ()
        scalar_one = Constant <value_int = 1> ()
        rows = Shape <end = 1> (k)
        row_count = Squeeze (rows, zero)
        row = Range (scalar_zero, row_count, scalar_one)
        start = Cast <to = 7> (position)
        row_position = Add (row, start)
        position_float = Cast <to = 1> (row_position)
        position_column = Unsqueeze (position_float, one)
        {floats("frequencies", *frequencies)}
        phase = Mul (position_column, frequencies)
        {padded("Cos", "cos_rows", "phase", rotary // 2)}
        {padded("Sin", "sin_rows", "phase", rotary // 2)}
        cos = Unsqueeze (cos_rows, zero)
        sin = Unsqueeze (sin_rows, zero)
        {ints("k_heads", 0, heads, dim)}
        k_split = Reshape (k, k_heads)
        {rms_norm.norm_body("k_normed", "k_split", "k_norm", attributes["epsilon"])}
        {ints("k_flat", 1, -1, heads * dim)}
        k_rows = Reshape (k_normed, k_flat)
        k_turned = RotaryEmbedding <num_heads = {heads}, rotary_embedding_dim = {rotary}> (k_rows, cos, sin)
        {ints("kv_shape", 1, -1, heads, dim)}
        k4 = Reshape (k_turned, kv_shape)
        v4 = Reshape (v, kv_shape)
        kv_rows = Concat <axis = 0> (k4, v4)
        {to_cache("kv", attributes)}
        slots = Concat <axis = 0> (start, start)
        next_kv_cache = TensorScatter <axis = -2> (kv_cache, kv, slots)"""


def to_cache(out: str, attributes: Attributes) -> str:
    """Body statements: out = the transposed rows of keys and values, as the cache holds them."""
    transposed = "Transpose <perm = [0, 2, 1, 3]> (kv_rows)"
    if attributes["cache_dtype"] == "float32":
        return f"{out} = {transposed}"
    return f"""
        {out}_float = {transposed}
        {scalar("largest_half", LARGEST_HALF)}
        {scalar("least_half", -LARGEST_HALF)}
        {out}_clamped = Clip ({out}_float, least_half, largest_half)
        {out} = Cast <to = 10> ({out}_clamped)"""


def from_cache(out: str, slots: str, attributes: Attributes) -> str:
    """Body statements: out = squeezed slots of the cache, float32."""
    if attributes["cache_dtype"] == "float32":
        return f"{out} = Squeeze ({slots}, zero)"
    return f"""
        {out}_half = Squeeze ({slots}, zero)
        {out} = Cast <to = 1> ({out}_half)"""


def product(out: str, op: str, a: str, b: str, group: int) -> str:
    """Body statements: out = op(a, b) for a [Hkv, T * group, ...], never on a single row."""
    if group > 1:
        return f"{out} = {op} ({a}, {b})"
    return f"""
        {ints(f"{out}_last", -1)}
        {out}_pad = Slice ({a}, zero, one, one)
        {out}_padded = Concat <axis = 1> ({a}, {out}_pad)
        {out}_all = {op} ({out}_padded, {b})
        {out} = Slice ({out}_all, zero, {out}_last, one)"""


def attention_body(attributes: Attributes, expanded: bool) -> str:
    heads, kv_heads, dim = attributes["num_heads"], attributes["num_kv_heads"], attributes["head_dim"]
    group = heads // kv_heads
    scaled_product = f"com.microsoft.FusedMatMul <transB = 1, alpha = {number(dim**-0.5)}>"
    return f"""
        {append_body(attributes)}
        {ints("q_heads", 0, heads, 2 * dim)}
        q_gate_heads = Reshape (q_gate, q_heads)
        q_split, gate = Split <axis = 2, num_outputs = 2> (q_gate_heads)
        {rms_norm.norm_body("q_normed", "q_split", "q_norm", attributes["epsilon"])}
        {ints("q_flat", 1, -1, heads * dim)}
        q_rows = Reshape (q_normed, q_flat)
        q_turned = RotaryEmbedding <num_heads = {heads}, rotary_embedding_dim = {attributes["rotary_dim"]}> (
            q_rows, cos, sin)
        {ints("block_less_one", BLOCK - 1)}
        {ints("block", BLOCK)}
        {ints("two", 2)}
        {ints("kv_axes", 0, 2)}
        end = Add (start, rows)
        end_up = Add (end, block_less_one)
        blocks = Div (end_up, block)
        whole = Mul (blocks, block)
        keys_from = Concat <axis = 0> (zero, zero)
        keys_to = Concat <axis = 0> (one, whole)
        values_from = Concat <axis = 0> (one, zero)
        values_to = Concat <axis = 0> (two, whole)
        keys4 = Slice (next_kv_cache, keys_from, keys_to, kv_axes)
        values4 = Slice (next_kv_cache, values_from, values_to, kv_axes)
        {from_cache("keys", "keys4", attributes)}
        {from_cache("values", "values4", attributes)}
        whole_count = Squeeze (whole, zero)
        column = Range (scalar_zero, whole_count, scalar_one)
        position_rows = Unsqueeze (row_position, one)
        visible = LessOrEqual (column, position_rows)
        allowed = Constant <value_float = 0.0> ()
        forbidden = Constant <value_float = -3e38> ()
        bias2 = Where (visible, allowed, forbidden)
        bias = Unsqueeze (bias2, one)
        {ints("q_groups", -1, kv_heads, group * dim)}
        q_grouped = Reshape (q_turned, q_groups)
        q_by_head = Transpose <perm = [1, 0, 2]> (q_grouped)
        {ints("by_head", kv_heads, -1, dim)}
        queries = Reshape (q_by_head, by_head)
        {product("scores", scaled_product, "queries", "keys", group)}
        row_total = Reshape (rows, one)
        {ints("head_count", kv_heads)}
        {ints("group_count", group)}
        {ints("rest", -1)}
        scores_shape = Concat <axis = 0> (head_count, row_total, group_count, rest)
        scores4 = Reshape (scores, scores_shape)
        masked = Add (scores4, bias)
        weights4 = Softmax <axis = -1> (masked)
        {ints("weights_rows", kv_heads, -1)}
        weights_shape = Concat <axis = 0> (weights_rows, whole)
        weights = Reshape (weights4, weights_shape)
        {product("mixed", "MatMul", "weights", "values", group)}
        {ints("mixed_heads", kv_heads, -1, group * dim)}
        mixed_rows = Reshape (mixed, mixed_heads)
        out = Transpose <perm = [1, 0, 2]> (mixed_rows)
        {ints("y_split", -1, heads, dim)}
        out_heads = Reshape (out, y_split)
        gate_sigmoid = Sigmoid (gate)
        gated = Mul (out_heads, gate_sigmoid)
        {ints("y_flat", 0, heads * dim)}
        y = Reshape (gated, y_flat)"""


def append_cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for inputs, attributes in attention_cases(generator, rows):
        _, k, v, _, *rest = inputs
        del attributes["num_heads"]
        yield (k, v, *rest), attributes


def attention_cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    shapes = [(4, 2, 16, 8, 0), (2, 2, 32, 8, 61), (6, 2, 16, 16, 126), (4, 2, 16, 4, 63), (3, 1, 32, 32, 0)]
    for heads, kv_heads, dim, rotary_dim, position in shapes:
        capacity = (position + rows + BLOCK) // BLOCK * BLOCK + BLOCK
        inputs = (
            torch.randn(rows, heads * 2 * dim, generator=generator),
            torch.randn(rows, kv_heads * dim, generator=generator),
            torch.randn(rows, kv_heads * dim, generator=generator),
            torch.randn(dim, generator=generator).bfloat16(),
            torch.randn(dim, generator=generator),
            torch.tensor([position]),
            torch.randn(2, kv_heads, capacity, dim, generator=generator),
        )
        attributes: Attributes = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "rotary_dim": rotary_dim,
        }
        attributes |= {"rope_theta": 1e7, "epsilon": 1e-6}
        yield inputs, {**attributes, "cache_dtype": "float32"}
        *others, start, kv_cache = inputs
        yield (*others, start.int(), kv_cache.half()), {**attributes, "cache_dtype": "float16"}


GATED_ATTENTION = Op(
    name="GatedAttention",
    inputs=("q_gate", "k", "v", "q_norm", "k_norm", "position", "kv_cache"),
    outputs=("y", "next_kv_cache"),
    attributes=ATTRIBUTES,
    weights=("q_norm", "k_norm"),
    reference=attention_reference,
    infer=infer_attention,
    body=attention_body,
    cases=attention_cases,
    rtol=1e-5,
    launch=GATED_ATTENTION_LAUNCH,
)

KV_APPEND = Op(
    name="KvAppend",
    inputs=("k", "v", "k_norm", "position", "kv_cache"),
    outputs=("next_kv_cache",),
    attributes=tuple(name for name in ATTRIBUTES if name != "num_heads"),
    weights=("k_norm",),
    reference=append_reference,
    infer=infer_append,
    body=lambda attributes, expanded: append_body(attributes),
    cases=append_cases,
    rtol=1e-5,
    launch=KV_APPEND_LAUNCH,
)
