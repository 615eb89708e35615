"""Every kernel compiles for every architecture, at the sizes of Qwen3.6-35B-A3B and of the demo, without a GPU."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from engines.cuda_memory import gdn_sizes
from export.config import ModelConfig
from plugins import convert
from plugins.gated_attention import cuda as attention
from plugins.gated_attention import launch as attention_launch
from plugins.gated_delta_net import cuda as gdn
from plugins.gated_delta_net import launch as gdn_launch
from plugins.kernels import CompileError, compile_kernels
from plugins.linear import cuda as linear
from plugins.linear import prefill as linear_prefill
from plugins.moe_experts import cuda as experts
from plugins.moe_experts import launch as experts_launch
from plugins.moe_experts import prefill as experts_prefill
from plugins.moe_routing import launch as routing_launch
from plugins.rms_norm import launch as rms_norm_launch
from plugins.sampling import cuda as sampling_cuda

ROOT = Path(__file__).parents[1]
CONFIGS = {"35b": ROOT / "demo/qwen3.6-35b-a3b.json", "demo": ROOT / "demo/checkpoint"}
EXPERTS = (linear.SOURCE, linear_prefill.SOURCE, experts.SOURCE, experts_prefill.SOURCE, routing_launch.SOURCE)
ATTENTION = (attention.DECODE_SOURCE, attention.PREFILL_SOURCE)
LAUNCHES = (attention_launch.SOURCE, gdn_launch.LAUNCH_SOURCE, experts_launch.SOURCE, rms_norm_launch.SOURCE)
OF_ANY_SIZE = (convert.SOURCE, *LAUNCHES)
SOURCES = (*EXPERTS, *ATTENTION, *OF_ANY_SIZE, gdn.SOURCE, sampling_cuda.SOURCE)


def macros(source: Path, config: ModelConfig, fp8_cache: bool = False) -> dict[str, int | str]:
    if source in EXPERTS:
        return {"NUM_EXPERTS": config.num_experts, "TOP_K": config.num_experts_per_tok}
    if source in OF_ANY_SIZE:
        return {}
    if source in ATTENTION:
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim
        return attention.Sizes(*heads, fp8_cache).defines
    return gdn_sizes(config).macros() if source == gdn.SOURCE else sampling_cuda.defines(config.hidden_size)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_source_compiles_without_a_gpu(source: Path, arch: str) -> None:
    for config in CONFIGS.values() if arch == "sm_90" else [CONFIGS["35b"]]:
        cubin = compile_kernels(source, arch, macros(source, ModelConfig.from_hf(config)))
        assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
@pytest.mark.parametrize("source", ATTENTION, ids=lambda path: path.stem)
def test_an_eight_bit_cache_compiles(source: Path, arch: str) -> None:
    compile_kernels(source, arch, macros(source, ModelConfig.from_hf(CONFIGS["35b"]), fp8_cache=True))


def declared_shared(cubin: bytes) -> dict[str, int]:
    """Bytes of shared memory that kernels declare, by name: the sizes of the ELF sections .nv.shared.NAME."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    text = cubin[sections[names][4] :]
    labelled = {text[s[0] :].split(b"\0", 1)[0].decode(): s[5] for s in sections}
    return {n.removeprefix(".nv.shared."): size for n, size in labelled.items() if n.startswith(".nv.shared.")}


@pytest.mark.parametrize("num_experts", [16, 256, 512])
def test_launchers_know_what_kernels_declare(num_experts: int) -> None:
    """Before 9.0 the sections hold nothing else."""
    found = declared_shared(compile_kernels(linear.SOURCE, "sm_80", {}))
    assert found and max(found.values()) <= linear.STATIC
    launcher = experts.ExpertsDecode(None, 132, 227 << 10, num_experts, 8)
    found = declared_shared(compile_kernels(experts.SOURCE, "sm_80", {"NUM_EXPERTS": num_experts, "TOP_K": 8}))
    assert max(found["experts_up_4"], found["experts_up_8"]) <= launcher.up_static
    assert max(found["experts_down_4"], found["experts_down_8"]) <= launcher.down_static


def test_all_sources_are_listed() -> None:
    assert set((ROOT / "plugins").rglob("*.cu")) == {path.resolve() for path in SOURCES}


def test_a_source_that_does_not_compile_says_where(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('#include "common.cuh"\nKERNEL broken() { undefined_name = 1; }\n')
    with pytest.raises(CompileError, match=r"(?s)broken\.cu for sm_90.*undefined_name"):
        compile_kernels(source, "sm_90", {})
