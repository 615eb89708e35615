"""GatedAttention and KvAppend as plugins: the kernels of cuda.py on a float16 cache, in place.

Their first kernel reads the cache, the position and RoPE's frequencies before it waits (plugins/common.cuh). Here any
kernel may come before, and the frequencies right before, so that one is launched when all else is done.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from ctypes import Structure, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any

from export.errors import UserError
from plugins import convert
from plugins.gated_attention.cuda import DECODE_SOURCE, PREFILL_SOURCE, Decode, Prefill, Sizes
from plugins.launch import DECODE_ROWS, Call, Device, Launch, Macros, Shapes, parts, total

SOURCE = Path(__file__).parent / "launch.cu"
MAX_FREQUENCIES = 128
FIRST = ("attention_decode", "attention_append")  # kernels that start when all before them is done


class Frequencies(Structure):
    _fields_ = [("value", c_float * MAX_FREQUENCIES)]


class _Serial:
    """A module whose kernels in FIRST do not start early."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def kernel(self, name: str) -> Any:
        kernel = self.module.kernel(name)
        return _SerialKernel(kernel) if name.startswith(FIRST) else kernel


class _SerialKernel:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def launch(self, *args: Any, **options: Any) -> None:
        self.kernel.launch(*args, **options, programmatic=False)


def _sizes(attributes: Mapping[str, Any]) -> Sizes:
    """KvAppend has no queries, for which its kernel's sizes then are those of the keys."""
    kv_heads = attributes["num_kv_heads"]
    return Sizes(attributes.get("num_heads", kv_heads), kv_heads, attributes["head_dim"], attributes["rotary_dim"])


def _check(attributes: Mapping[str, Any]) -> Sizes:
    """Raises UserError for sizes that there are no kernels for."""
    sizes = _sizes(attributes)
    if sizes.head_dim % 16 or not 16 <= sizes.head_dim <= 256:
        raise UserError(f"head_dim {sizes.head_dim}: the kernels take multiples of 16 up to 256; use cpu")
    if sizes.rotary_dim % 2 or not 2 <= sizes.rotary_dim <= sizes.head_dim:
        raise UserError(f"rotary_dim {sizes.rotary_dim}: the kernels take even numbers up to head_dim; use cpu")
    if sizes.num_heads % sizes.num_kv_heads or sizes.group > 16 or sizes.num_kv_heads > 32:
        raise UserError(
            f"{sizes.num_heads} attention heads over {sizes.num_kv_heads} of keys and values: the kernels take "
            "multiples, up to 16 over each of up to 32; use cpu"
        )
    if attributes["cache_dtype"] != "float16":
        raise UserError(f"cache_dtype {attributes['cache_dtype']}: the kernels take float16; use cpu")
    return sizes


@functools.cache
def _frequencies(rotary_dim: int, rope_theta: float) -> Frequencies:
    """The op's own values: no kernel's power would have their bits."""
    from plugins.gated_attention import inverse_frequencies

    values = inverse_frequencies(rotary_dim, rope_theta).tolist()
    return Frequencies((c_float * MAX_FREQUENCIES)(*values))


def _put_frequencies(call: Call, out: int) -> None:
    dim = call.attributes["rotary_dim"]
    args = [_frequencies(dim, call.attributes["rope_theta"]), c_void_p(out), c_int(dim // 2)]
    kernel = call.module(SOURCE, {}).kernel("put_frequencies")
    kernel.launch((1, 1, 1), (MAX_FREQUENCIES, 1, 1), args, call.stream)


def _cache(call: Call, frequencies: int) -> dict[str, Any]:
    """What all launches take."""
    cache = call.inputs["kv_cache"]
    return {
        "inverse_frequencies": frequencies,
        "position": call.inputs["position"].address,
        "kv_cache": cache.address,
        "capacity": cache.shape[2],
        "epsilon": call.attributes["epsilon"],
        "stream": call.stream,
    }


def _strided(call: Call, *names: str) -> dict[str, int]:
    """k -> k, k_stride."""
    addresses = dict(zip(names, call.addresses(*names), strict=True))
    return addresses | {f"{name}_stride": call.inputs[name].shape[1] for name in names}


def _append(call: Call, sizes: Sizes, frequencies: int) -> Prefill:
    prefill = Prefill(_Serial(call.module(PREFILL_SOURCE, sizes.defines)), sizes)
    _put_frequencies(call, frequencies)
    k_norm, rows = call.inputs["k_norm"].address, call.inputs["k"].shape[0]
    prefill.append(**_strided(call, "k", "v"), k_norm=k_norm, rows=rows, **_cache(call, frequencies))
    return prefill


# ---- KvAppend --------------------------------------------------------------------------------------------------------


def append_kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    return [(SOURCE, {}), (PREFILL_SOURCE, _check(attributes).defines)]


def append_workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    return total(4 * MAX_FREQUENCIES)


def run_append(call: Call) -> None:
    _append(call, _sizes(call.attributes), call.workspace)


# ---- GatedAttention --------------------------------------------------------------------------------------------------


def attention_kernels(attributes: Mapping[str, Any], shapes: Shapes) -> list[tuple[Path, Macros]]:
    defines = _check(attributes).defines
    return [(SOURCE, {}), (DECODE_SOURCE, defines), (PREFILL_SOURCE, defines), (convert.SOURCE, {})]


def _decode(module: Any, sizes: Sizes, device: Device) -> Decode:
    return Decode(module, sizes, device.multiprocessors, device.shared_bytes)


def _attention_sizes(sizes: Sizes, rows: int, capacity: int, device: Device) -> list[int]:
    """Bytes: the frequencies; the scratch of `Decode`, or a prefill's y, float16 [T, Hq D]."""
    if rows <= DECODE_ROWS:
        return [4 * MAX_FREQUENCIES, _decode(None, sizes, device).scratch_bytes(capacity)]
    return [4 * MAX_FREQUENCIES, 2 * rows * sizes.num_heads * sizes.head_dim]


def attention_workspace(attributes: Mapping[str, Any], shapes: Shapes, device: Device) -> int:
    rows, capacity = shapes["q_gate"][0], shapes["kv_cache"][2]
    given = (min(rows, DECODE_ROWS), rows)
    return max(total(*_attention_sizes(_sizes(attributes), most, capacity, device)) for most in given)


def run_attention(call: Call) -> None:
    sizes, rows, y = _sizes(call.attributes), call.inputs["q_gate"].shape[0], call.outputs["y"]
    capacity = call.inputs["kv_cache"].shape[2]
    frequencies, second = parts(call.workspace, *_attention_sizes(sizes, rows, capacity, call.device))
    q_norm, k_norm = call.addresses("q_norm", "k_norm")
    if rows <= DECODE_ROWS:
        _put_frequencies(call, frequencies)
        decode = _decode(_Serial(call.module(DECODE_SOURCE, sizes.defines)), sizes, call.device)
        given = _strided(call, "q_gate", "k", "v")
        given["q_stride"] = given.pop("q_gate_stride")
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        decode.launch(**given, **norms, rows=rows, y=y.address, scratch=second, **_cache(call, frequencies))
        return
    prefill = _append(call, sizes, frequencies)
    q_gate, q_stride = call.inputs["q_gate"].address, call.inputs["q_gate"].shape[1]
    queries = {"q_gate": q_gate, "q_stride": q_stride, "q_norm": q_norm}
    prefill.attend(**queries, rows=rows, y=second, **_cache(call, frequencies))
    module = call.module(convert.SOURCE, {})
    convert.to_floats(module, second, y.address, rows * sizes.num_heads * sizes.head_dim, call.stream)


GATED_ATTENTION_LAUNCH = Launch(attention_kernels, attention_workspace, run_attention, {"next_kv_cache": "kv_cache"})
KV_APPEND_LAUNCH = Launch(append_kernels, append_workspace, run_append, {"next_kv_cache": "kv_cache"})
