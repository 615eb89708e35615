"""The bindings of the graphs: names, dtypes and shapes, the same in ONNX, in every engine and in the manifest.

No torch here, so that decoding need not load it. A letter is a dynamic dimension: T rows of the call, S cache
capacity, W rows of the pending window, which are the rows of the verify before.

State has one of two layouts. `host`, for CPUs: float32 caches, and the GDN layers' pending windows. `device`, for GPUs:
int32 indices, float16 caches, and rings of rows addressed by position (plugins/gated_delta_net/ring.py), so that no
buffer changes its size or its place.

    input_specs("main.verify", config)["token_ids"]        # ("int64", ("T",))
"""

from __future__ import annotations

from collections.abc import Mapping

from export.config import FULL, ModelConfig

GRAPHS = ("main.prefill", "main.verify", "mtp.prefill", "mtp.draft")
LAYOUTS = ("host", "device")
CACHE_BLOCK = 64  # S is a multiple of this: see plugins/gated_attention
RING = 32  # rows of a ring: see plugins/gated_delta_net
RING_CALL_ROWS = 8  # that a verify with rings takes at most

Spec = tuple[str, tuple[int | str, ...]]


def sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> list[int]:
    """A shape with its letters replaced by numbers."""
    return [dim if isinstance(dim, int) else sizes[dim] for dim in shape]


def ring_row_stride(config: ModelConfig) -> int:
    """Floats of a ring's row: qkv_in, z, b and a, padded to whole cache lines."""
    return -(-(config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads) // 32) * 32


def _linear_shapes(config: ModelConfig, layout: str) -> dict[str, tuple[int | str, ...]]:
    """The states of a GDN layer, float32."""
    v_heads, k_dim = config.linear_num_value_heads, config.linear_key_head_dim
    recurrent_state = (v_heads, k_dim, config.linear_value_head_dim)
    if layout == "device":
        assert config.linear_conv_kernel_dim == 4, "rings keep three rows of history"
        return {"recurrent_state": recurrent_state, "ring": (RING, ring_row_stride(config))}
    return {
        "recurrent_state": recurrent_state,
        "conv_state": (config.linear_conv_kernel_dim - 1, config.conv_dim),
        "pending_conv": ("W", config.conv_dim),
        "pending_k": ("W", config.key_dim),
        "pending_v": ("W", config.value_dim),
        "pending_g": ("W", v_heads),
        "pending_beta": ("W", v_heads),
    }


def _state_specs(config: ModelConfig, mtp: bool, layout: str) -> dict[str, Spec]:
    """Every state tensor: its dtype and shape."""
    assert layout in LAYOUTS, layout
    kv_dtype = "float16" if layout == "device" else "float32"
    kv: Spec = (kv_dtype, (2, config.num_key_value_heads, "S", config.head_dim))
    if mtp:
        return {"mtp.layers.0.kv_cache": kv}
    shapes = _linear_shapes(config, layout)
    specs: dict[str, Spec] = {}
    for i, kind in enumerate(config.layer_types):
        if kind == FULL:
            specs[f"layers.{i}.kv_cache"] = kv
        else:
            specs |= {f"layers.{i}.{name}": ("float32", shapes[name]) for name in shapes}
    return specs


def input_specs(graph: str, config: ModelConfig, layout: str = "host") -> dict[str, Spec]:
    """Name -> dtype and shape of the graph's inputs, in order; a letter is a dynamic dimension."""
    index = "int32" if layout == "device" else "int64"
    rows: dict[str, Spec] = {"token_ids": (index, ("T",))}
    if graph.startswith("mtp"):
        rows["hidden"] = ("float32", ("T", config.hidden_size))
    rows["position"] = (index, (1,))
    if graph != "mtp.prefill":
        rows["accepted"] = (index, (1,))
    return rows | _state_specs(config, graph.startswith("mtp"), layout)


def output_specs(graph: str, config: ModelConfig, layout: str = "host") -> dict[str, Spec]:
    """Name -> dtype and shape of the graph's outputs, in order. A state's next value is called `next.<name>`."""
    states = _state_specs(config, graph.startswith("mtp"), layout)
    if graph == "main.prefill":
        states = {name: spec for name, spec in states.items() if ".pending_" not in name}
    following: dict[str, Spec] = {}
    for name, (dtype, shape) in states.items():
        following[f"next.{name}"] = (dtype, tuple("T" if dim == "W" else dim for dim in shape))
    if graph == "mtp.prefill":
        return following
    rows: dict[str, tuple[int | str, int | str]] = {
        "main.prefill": ("T", 1),
        "main.verify": ("T", "T"),
        "mtp.draft": (1, 1),
    }
    hidden_rows, logits_rows = rows[graph]
    return {
        "next.hidden" if graph == "mtp.draft" else "hidden": ("float32", (hidden_rows, config.hidden_size)),
        "logits": ("float32", (logits_rows, config.vocab_size)),
    } | following
