"""The routed experts: y[t] = Σ_j topk_weights[t, j] · down_e(silu(gate_e x[t]) · up_e x[t]), e = topk_ids[t, j].

Rows 0..I of gate_up are the gate, the rest is up. A row's topk_weights are positive and sum to one, as MoeRouting
makes them; its ids are distinct. Two function bodies. Expanded: one product over all experts with
the unrouted ones weighted by zero: twice as fast as gathering at the sizes for which weights are expanded, and as
fast for five rows as for one (docs/decisions.md). Packed: a loop over the experts that unpacks one at a time and
skips those without a row, so that memory stays at one expert. In both, a row's sum runs in the order of expert ids
whatever the other rows are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import silu

from plugins import nvfp4
from plugins.linear import add_row, random_nvfp4
from plugins.moe_experts.launch import FLOAT_MOE_EXPERTS_LAUNCH, NVFP4_MOE_EXPERTS_LAUNCH
from plugins.op import Attributes, Case, Op, ints

Weights = tuple[torch.Tensor, ...]


def mixture(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """x float32 [T, H]; expert(e) -> gate_up [2I, H], down [H, I], float32."""
    y = torch.zeros_like(x)
    for e in topk_ids.unique().tolist():
        gate_up, down = expert(e)
        share = (topk_weights * (topk_ids == e)).sum(-1, keepdim=True)  # [T, 1], zero for rows routed elsewhere
        rows = share[:, 0].nonzero()[:, 0]
        gate, up = (x[rows] @ gate_up.T).chunk(2, dim=-1)
        y[rows] += share[rows] * ((silu(gate) * up) @ down.T)
    return y


def float_reference(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    **_: int,
) -> torch.Tensor:
    """gate_up [E, 2I, H], down [E, H, I], of any float dtype."""
    return mixture(x, topk_weights, topk_ids, lambda e: (gate_up[e].float(), down[e].float()))


def nvfp4_reference(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *weights: torch.Tensor, **_: int
) -> torch.Tensor:
    """gate_up uint8 [E, 2I, H/2], its scale uint8 [E, 2I, H/16], its scale_2 [E, 2] (gate, up); down uint8
    [E, H, I/2], its scale [E, H, I/16], its scale_2 [E]."""
    gate_up, gate_up_scale, gate_up_scale_2, down, down_scale, down_scale_2 = weights

    def expert(e: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows_scale_2 = gate_up_scale_2[e].repeat_interleave(gate_up.shape[1] // 2)
        return (
            nvfp4.dequantize(gate_up[e], gate_up_scale[e], rows_scale_2),
            nvfp4.dequantize(down[e], down_scale[e], down_scale_2[e].expand(down.shape[1])),
        )

    return mixture(x, topk_weights, topk_ids, expert)


def infer(x: torch.Tensor, *_: torch.Tensor, **__: int) -> list[tuple[torch.dtype, list[Any]]]:
    return [(torch.float32, list(x.shape))]


def dense_body(attributes: Attributes, unpack: str) -> str:
    """unpack: statements that define w_gate_up [E, 2I, H] and w_down [E, H, I]."""
    experts = attributes["num_experts"]
    return f"""
        {unpack}
        gate_up_rows = Flatten <axis = 2> (w_gate_up)
        h = Gemm <transB = 1> (x, gate_up_rows)
        {ints("per_expert", 0, experts, -1)}
        h3 = Reshape (h, per_expert)
        gate, up = Split <axis = 2, num_outputs = 2> (h3)
        sigmoid = Sigmoid (gate)
        silu = Mul (gate, sigmoid)
        act = Mul (silu, up)
        {ints("zero", 0)}
        {ints("one", 1)}
        {ints("two", 2)}
        {ints("experts", experts)}
        ids_shape = Shape <end = 1> (topk_ids)
        share_shape = Concat <axis = 0> (ids_shape, experts)
        nothing = ConstantOfShape (share_shape)
        share = ScatterElements <axis = 1> (nothing, topk_ids, topk_weights)
        share3 = Unsqueeze (share, two)
        weighted = Mul (act, share3)
        {ints("flat", 0, -1)}
        columns = Reshape (weighted, flat)
        down_t = Transpose <perm = [0, 2, 1]> (w_down)
        down_rows = Flatten <axis = 2> (down_t)
        y = MatMul (columns, down_rows)"""


def loop_body(attributes: Attributes, unpack: str) -> str:
    """unpack: statements that define w_gate_up [2I, H] and w_down [H, I] of expert `e`."""
    return f"""
        {add_row()}
        shape = Shape (x)
        nothing = ConstantOfShape (shape)
        always = Constant <value = bool {{1}}> ()
        count = Constant <value_int = {attributes["num_experts"]}> ()
        none = Constant <value_float = 0.0> ()
        y = Loop (count, always, nothing) <body = over_experts (int64 e, bool going, float[T, H] sum)
                => (bool going_on, float[T, H] sum_out) {{
            going_on = Identity (going)
            hit = Equal (topk_ids, e)
            hit_float = Cast <to = 1> (hit)
            parts = Mul (hit_float, topk_weights)
            share = ReduceSum <keepdims = 1> (parts, last)
            total = ReduceSum <keepdims = 0> (share)
            routed = Greater (total, none)
            sum_out = If (routed) <then_branch = run () => (float[T, H] sum_run) {{
                {unpack}
                h = Gemm <transB = 1> (x_padded, w_gate_up)
                gate, up = Split <axis = 1, num_outputs = 2> (h)
                sigmoid = Sigmoid (gate)
                silu = Mul (gate, sigmoid)
                act = Mul (silu, up)
                out_padded = Gemm <transB = 1> (act, w_down)
                out = Slice (out_padded, first, last, first)
                weighted = Mul (out, share)
                sum_run = Add (sum, weighted)
            }}, else_branch = skip () => (float[T, H] sum_skip) {{
                sum_skip = Identity (sum)
            }}>
        }}>"""


def float_body(attributes: Attributes, expanded: bool) -> str:
    if expanded:
        return dense_body(attributes, "w_gate_up = Cast <to = 1> (gate_up)\nw_down = Cast <to = 1> (down)")
    return loop_body(
        attributes,
        """gate_up_e = Gather (gate_up, e)
                w_gate_up = Cast <to = 1> (gate_up_e)
                down_e = Gather (down, e)
                w_down = Cast <to = 1> (down_e)""",
    )


def nvfp4_body(attributes: Attributes, expanded: bool) -> str:
    inner = attributes["moe_intermediate_size"]
    if expanded:
        unpack = f"""
        {ints("u_two", 2)}
        {ints("u_expand", 1, 2, inner)}
        {ints("u_rows", 0, -1, 1)}
        gs2 = Unsqueeze (gate_up_scale_2, u_two)
        gs2_expanded = Expand (gs2, u_expand)
        gs2_rows = Reshape (gs2_expanded, u_rows)
        {nvfp4.dequantize_body("w_gate_up", "gate_up", "gate_up_scale", "gs2_rows", rank=3)}
        {ints("u_last", 1, 2)}
        ds2 = Unsqueeze (down_scale_2, u_last)
        {nvfp4.dequantize_body("w_down", "down", "down_scale", "ds2", rank=3)}"""
        return dense_body(attributes, unpack)
    unpack = f"""
        {ints("u_one", 1)}
        {ints("u_expand", 2, inner)}
        {ints("u_rows", -1, 1)}
        gate_up_e = Gather (gate_up, e)
        gate_up_scale_e = Gather (gate_up_scale, e)
        gs2 = Gather (gate_up_scale_2, e)
        gs2_column = Unsqueeze (gs2, u_one)
        gs2_expanded = Expand (gs2_column, u_expand)
        gs2_rows = Reshape (gs2_expanded, u_rows)
        {nvfp4.dequantize_body("w_gate_up", "gate_up_e", "gate_up_scale_e", "gs2_rows", rank=2)}
        down_e = Gather (down, e)
        down_scale_e = Gather (down_scale, e)
        ds2 = Gather (down_scale_2, e)
        {nvfp4.dequantize_body("w_down", "down_e", "down_scale_e", "ds2", rank=2)}"""
    return loop_body(attributes, unpack)


def routed_cases(
    generator: torch.Generator, rows: int, weights: Callable[[torch.Generator, int, int, int], Weights]
) -> Iterator[Case]:
    for hidden, experts, top_k, inner in [(32, 8, 2, 16), (48, 5, 3, 32)]:
        x = torch.randn(rows, hidden, generator=generator)
        topk_weights, topk_ids = torch.rand(rows, experts, generator=generator).topk(top_k)
        topk_weights /= topk_weights.sum(-1, keepdim=True)
        attributes = {"num_experts": experts, "moe_intermediate_size": inner}
        yield (x, topk_weights, topk_ids, *weights(generator, hidden, experts, inner)), attributes


def float_weights(generator: torch.Generator, hidden: int, experts: int, inner: int) -> Weights:
    return (
        torch.randn(experts, 2 * inner, hidden, generator=generator).bfloat16(),
        torch.randn(experts, hidden, inner, generator=generator).bfloat16(),
    )


def nvfp4_weights(generator: torch.Generator, hidden: int, experts: int, inner: int) -> Weights:
    return (
        *random_nvfp4(generator, experts, 2 * inner, hidden),
        torch.rand(experts, 2, generator=generator) / 100,
        *random_nvfp4(generator, experts, hidden, inner),
        torch.rand(experts, generator=generator) / 100,
    )


ROUTED = ("x", "topk_weights", "topk_ids")
FLOAT_WEIGHTS = ("gate_up", "down")
NVFP4_WEIGHTS = ("gate_up", "gate_up_scale", "gate_up_scale_2", "down", "down_scale", "down_scale_2")

FLOAT_MOE_EXPERTS = Op(
    name="FloatMoeExperts",
    inputs=(*ROUTED, *FLOAT_WEIGHTS),
    weights=FLOAT_WEIGHTS,
    outputs=("y",),
    attributes=("num_experts", "moe_intermediate_size"),
    reference=float_reference,
    infer=infer,
    body=float_body,
    cases=lambda generator, rows: routed_cases(generator, rows, float_weights),
    launch=FLOAT_MOE_EXPERTS_LAUNCH,
)

NVFP4_MOE_EXPERTS = Op(
    name="Nvfp4MoeExperts",
    inputs=(*ROUTED, *NVFP4_WEIGHTS),
    weights=NVFP4_WEIGHTS,
    outputs=("y",),
    attributes=("num_experts", "moe_intermediate_size"),
    reference=nvfp4_reference,
    infer=infer,
    body=nvfp4_body,
    cases=lambda generator, rows: routed_cases(generator, rows, nvfp4_weights),
    launch=NVFP4_MOE_EXPERTS_LAUNCH,
)
