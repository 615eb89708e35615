"""Routing of a mixture of experts: softmax over all experts, the top k, divided by their sum.

    p = softmax(x Wᵀ);  topk_weights, topk_ids = top k of p;  topk_weights /= sum(topk_weights)

As transformers' Qwen3_5MoeTopKRouter, in float32. Weights come in falling order. The function body takes the softmax
of the k largest logits, which is the same number without the sum over all experts.
"""

from collections.abc import Iterator
from typing import Any

import torch

from plugins.linear import product
from plugins.moe_routing.launch import MOE_ROUTING_LAUNCH
from plugins.op import Attributes, Case, Op, ints


def reference(x: torch.Tensor, weight: torch.Tensor, *, num_experts_per_tok: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [T, H], weight [E, H] -> topk_weights float32 [T, k], topk_ids int64 [T, k]."""
    probabilities = torch.softmax(x @ weight.float().T, dim=-1)
    topk_weights, topk_ids = torch.topk(probabilities, num_experts_per_tok, dim=-1)
    return topk_weights / topk_weights.sum(-1, keepdim=True), topk_ids


def infer(x: torch.Tensor, weight: torch.Tensor, *, num_experts_per_tok: int) -> list[tuple[torch.dtype, list[Any]]]:
    shape = [x.shape[0], num_experts_per_tok]
    return [(torch.float32, shape), (torch.int64, shape)]


def body(attributes: Attributes, expanded: bool) -> str:
    return f"""
        w = Cast <to = 1> (weight)
        {product(expanded)}
        {ints("k", attributes["num_experts_per_tok"])}
        top, topk_ids = TopK <axis = -1> (y, k)
        topk_weights = Softmax <axis = -1> (top)"""


def cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    for hidden, experts, top_k in [(32, 8, 2), (48, 16, 4), (16, 5, 5)]:
        x = torch.randn(rows, hidden, generator=generator)
        weight = torch.randn(experts, hidden, generator=generator).bfloat16()
        yield (x, weight), {"num_experts_per_tok": top_k}


MOE_ROUTING = Op(
    name="MoeRouting",
    inputs=("x", "weight"),
    weights=("weight",),
    outputs=("topk_weights", "topk_ids"),
    attributes=("num_experts_per_tok",),
    reference=reference,
    infer=infer,
    body=body,
    cases=cases,
    launch=MOE_ROUTING_LAUNCH,
    rtol=1e-5,  # logits of magnitude |x||w|, then an exponential: their rounding grows by that magnitude
)
