"""GatedDeltaNetRing and GatedDeltaNetRingPrefill as plugins: cuda.py's mixer on a layer's state and ring, in place.

The mixer wants a row's four inputs side by side: launch.cu copies them into the ring's slots, or, for a prefill, into
rows of the workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from export.errors import UserError
from plugins import convert
from plugins.gated_delta_net.cuda import MAX_ROWS, RING, SOURCE, GatedDeltaNet, Memory, Sizes, Weights
from plugins.launch import Call, Device, Launch, Macros, Shapes, parts, total

LAUNCH_SOURCE = Path(__file__).parent / "launch.cu"
THREADS = 256
ALIASES = {"next_recurrent_state": "recurrent_state", "next_ring": "ring"}


class PackArguments(Structure):
    _fields_ = [
        ("input", c_void_p * 4),
        ("width", c_int * 4),
        ("rows", c_void_p),
        ("position", c_void_p),
        ("stride", c_int),
        ("mask", c_int),
        ("first", c_int),
        ("padding", c_int),
    ]


def _mixer(call: Call) -> tuple[GatedDeltaNet, Memory, Weights]:
    sizes = Sizes.of(call.attributes)
    assert call.inputs["ring"].shape == (RING, sizes.row_stride)
    memory = Memory(*call.addresses("ring", "recurrent_state"))
    weights = Weights(*call.addresses("conv_weight", "A_log", "dt_bias", "norm_weight"))
    return GatedDeltaNet(call.module(SOURCE, sizes.macros()), sizes), memory, weights


def _pack(call: Call, rows: int, position: int = 0, first: int = 0) -> None:
    """qkv_in, z, b and a, from row `first` on, into rows of projections: at `rows`, or, with the address of row 0's
    position, into the slots of a ring."""
    names = ("qkv_in", "z", "b", "a")
    arguments = PackArguments(rows=rows, position=position or None, mask=RING - 1, first=first)
    arguments.stride = Sizes.of(call.attributes).row_stride
    for i, name in enumerate(names):
        arguments.input[i], arguments.width[i] = call.inputs[name].address, call.inputs[name].shape[1]
    kernel = call.module(LAUNCH_SOURCE, {}).kernel("gdn_pack")
    kernel.launch((call.inputs["z"].shape[0] - first, 1, 1), (THREADS, 1, 1), [arguments], call.stream)


def _check(attributes: Mapping[str, Any], shapes: Shapes) -> None:
    """Raises UserError for sizes that there are no kernels for."""
    sizes = Sizes.of(attributes)
    for name, size in (("linear_key_head_dim", sizes.head_k_dim), ("linear_value_head_dim", sizes.head_v_dim)):
        if size % 16 or not 16 <= size <= 128:
            raise UserError(f"{name} {size}: the kernels take multiples of 16 up to 128; use cpu")
    if sizes.num_v_heads % sizes.num_k_heads:
        raise UserError(f"linear_num_value_heads {sizes.num_v_heads}: not a multiple of the key heads; use cpu")
    if shapes["conv_weight"][1] != 4:
        raise UserError(f"linear_conv_kernel_dim {shapes['conv_weight'][1]}: the kernels take 4; use cpu")


# ---- decoding --------------------------------------------------------------------------------------------------------


def ring_kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    _check(attributes, shapes)
    return [(SOURCE, Sizes.of(attributes).macros()), (LAUNCH_SOURCE, {})]


def ring_workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    """Of the squares, float32 [T, Hv, head_parts]."""
    sizes = Sizes.of(attributes)
    return total(4 * shapes["z"][0] * sizes.num_v_heads * GatedDeltaNet(None, sizes).head_parts)


def run_ring(call: Call) -> None:
    """gdn_decode reads position, accepted and older rows, and writes the state, before it waits: gdn_pack before it is
    a late kernel (common.cuh) and writes none of these."""
    mixer, memory, weights = _mixer(call)
    rows, heads, head_dim = call.inputs["z"].shape[0], mixer.sizes.num_v_heads, mixer.sizes.head_v_dim
    assert rows <= MAX_ROWS
    position, accepted = call.addresses("position", "accepted")
    y, squares = call.outputs["y"].address, call.workspace
    _pack(call, memory.ring, position)
    mixer.decode(memory, weights, position, accepted, rows, y, squares, call.stream)
    args = [c_void_p(y), c_void_p(squares), c_int(head_dim), c_int(mixer.head_parts)]
    args.append(c_float(call.attributes["epsilon"]))
    kernel = call.module(LAUNCH_SOURCE, {}).kernel("gdn_divide")
    kernel.launch((rows, heads, 1), (-(-head_dim // 32) * 32, 1, 1), args, call.stream)


# ---- prefill ---------------------------------------------------------------------------------------------------------


def prefill_kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    return [*ring_kernels(attributes, shapes), (convert.SOURCE, {})]


def _prefill_sizes(sizes: Sizes, rows: int) -> list[int]:
    """Bytes: projections float32 [T, row_stride]; the scratch of `GatedDeltaNet.prefill`; its y, float16 [T, Hv Dv]."""
    scratch = GatedDeltaNet(None, sizes).scratch_bytes(rows)
    return [4 * rows * sizes.row_stride, scratch, 2 * rows * sizes.value_width]


def prefill_workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    return total(*_prefill_sizes(Sizes.of(attributes), shapes["z"][0]))


def run_prefill(call: Call) -> None:
    """Safe as `run_ring` is: gdn_pack writes nothing that gdn_decode, the first of the mixer's kernels, has to itself.
    The mixer leaves in the ring what later rows need of a prompt; the op wants whole rows there."""
    mixer, memory, weights = _mixer(call)
    rows, width = call.inputs["z"].shape
    projections, scratch, half = parts(call.workspace, *_prefill_sizes(mixer.sizes, rows))
    _pack(call, projections)
    position, accepted = call.addresses("position", "accepted")
    epsilon = call.attributes["epsilon"]
    mixer.prefill(projections, memory, weights, position, accepted, rows, half, epsilon, scratch, call.stream)
    _pack(call, memory.ring, position, first=max(rows - RING, 0))
    module = call.module(convert.SOURCE, {})
    convert.to_floats(module, half, call.outputs["y"].address, rows * width, call.stream)


RING_LAUNCH = Launch(ring_kernels, ring_workspace, run_ring, ALIASES)
RING_PREFILL_LAUNCH = Launch(prefill_kernels, prefill_workspace, run_prefill, ALIASES)
