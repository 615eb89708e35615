"""MoeRouting as a plugin: the router's logits by the linear layers' kernels, then the choice by kernel.cu."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import c_int, c_void_p
from pathlib import Path
from typing import Any

from export.errors import UserError
from plugins.launch import Call, Device, Launch, Macros, Shapes, parts, total
from plugins.linear import launch as linear
from plugins.linear.cuda import MAX_EXPERTS, MAX_TOP_K, Segment, check_k

SOURCE = Path(__file__).parent / "kernel.cu"
WARPS = 8


def routing_macros(num_experts: int, top_k: int) -> dict[str, int | str]:
    """Of the sources that include routing.cuh. Raises UserError."""
    if num_experts > MAX_EXPERTS or top_k > min(MAX_TOP_K, num_experts):
        raise UserError(
            f"{top_k} of {num_experts} experts a token: the kernels take at most {MAX_TOP_K} of {MAX_EXPERTS}; use cpu"
        )
    return {"NUM_EXPERTS": num_experts, "TOP_K": top_k}


def kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    check_k(shapes["x"][1], "float", "the router")
    macros = routing_macros(shapes["weight"][0], attributes["num_experts_per_tok"])
    return [*linear.KERNELS, (SOURCE, macros)]


def _sizes(rows: int, hidden: int, experts: int) -> list[int]:
    """Bytes: logits float32 [T, E]; what their product takes."""
    return [4 * rows * experts, linear.workspace_bytes(rows, hidden, precise=True)]


def workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    rows, hidden = shapes["x"]
    return total(*_sizes(rows, hidden, shapes["weight"][0]))


def run(call: Call) -> None:
    x, weight = call.inputs["x"], call.inputs["weight"]
    (rows, hidden), experts = x.shape, weight.shape[0]
    logits, rest = parts(call.workspace, *_sizes(rows, hidden, experts))
    linear.multiply(call, x, Segment(weight=weight.address, out=logits, out_stride=experts, n=experts, precise=1), rest)
    kernel = call.module(SOURCE, routing_macros(experts, call.attributes["num_experts_per_tok"])).kernel("moe_choose")
    outputs = [call.outputs[name].address for name in ("topk_weights", "topk_ids")]
    args = [*map(c_void_p, (logits, *outputs)), c_int(rows)]
    kernel.launch((-(-rows // WARPS), 1, 1), (32 * WARPS, 1, 1), args, call.stream)


MOE_ROUTING_LAUNCH = Launch(kernels, workspace, run, {})
