"""The weights on a GPU: one copy of the weights file's bytes, which the main model and the head share.

`load` streams the file through pinned memory; `synthesize` makes random weights of a config's shapes on the GPU, in
NVIDIA's mixed layout, for benchmarks. Matrices keep the checkpoint's own bytes. What is small and read in float32
(norms, convolution, A_log, dt_bias) is converted once.

    weights = DeviceWeights.load(Path("build/demo/cuda/weights.safetensors"), formats)
    weights.address("layers.0.mlp.gate.weight")
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.cli import say
from export.config import FULL, ModelConfig
from export.errors import UserError
from export.weights import DTYPES, read_header
from plugins import nvfp4

PIECE = 64 << 20  # bytes of pinned memory, twice
ALIGNED = 16  # bytes, of whatever a kernel reads in vectors
VECTORS = re.compile(r"norm\w*\.weight$|conv1d\.weight$|A_log$|dt_bias$|norm_embedding\.weight$|norm_hidden\.weight$")


def device_dtype(
    name: str, dtype: str, shape: Sequence[int], formats: Mapping[str, str], words: bool
) -> tuple[str, tuple[int, ...]]:
    """What a tensor of the weights file is on the GPU, for engines that have to say so: dtype and shape. Four-bit codes
    are themselves rather than bytes; or, with `words`, all of eight bits and less is int32 by four bytes, for GPUs
    whose TensorRT has no such types. dtype: ONNX's name of the file's, block scales as bytes."""
    dims, owner = tuple(shape), name
    for suffix in (".weight_scale_2", ".weight_scale", ".weight"):
        owner = owner.removesuffix(suffix)
    format = formats.get(owner, formats.get(owner.rpartition(".")[0], "float") if ".experts." in owner else "float")
    if VECTORS.search(name):
        return "float32", dims
    if dtype not in ("UINT8", "FLOAT8E4M3FN"):
        return ("bfloat16" if name.endswith(".weight") else "float32"), dims
    if words:
        return "int32", (*dims[:-1], dims[-1] // 4)
    if format == "nvfp4" and name.endswith(".weight"):
        return "float4_e2m1", (*dims[:-1], 2 * dims[-1])
    return "float8_e4m3fn", dims


class DeviceWeights:
    def __init__(self, tensors: dict[str, Tensor], formats: Mapping[str, str]) -> None:
        """tensors: every tensor of a weights file, on the GPU; formats as in Checkpoint.formats."""
        self.formats = dict(formats)
        self.tensors = {name: self._prepared(name, tensor) for name, tensor in tensors.items()}

    def _prepared(self, name: str, tensor: Tensor) -> Tensor:
        if VECTORS.search(name):
            return tensor.float()
        module = name.removesuffix(".weight")
        is_matrix = name.endswith(".weight") and (module in self.formats or tensor.dim() >= 2)
        if is_matrix and tensor.dtype in (torch.float16, torch.float32):
            tensor = tensor.bfloat16()
        return tensor.clone() if tensor.dim() and tensor.data_ptr() % ALIGNED else tensor

    @classmethod
    def load(
        cls, path: Path, formats: Mapping[str, str], progress: Callable[[int, int], None] | None = None
    ) -> DeviceWeights:
        """Raises UserError: the file cannot be read, or the GPU has no room for it."""
        header = read_header(path)
        start = min(entry.offset for entry in header.values())
        total = max(entry.offset + entry.length for entry in header.values()) - start
        pool = _allocate(total)
        _upload(path, start, pool, progress)
        tensors = {}
        for name, entry in header.items():
            raw = pool[entry.offset - start : entry.offset - start + entry.length]
            dtype = DTYPES[entry.dtype][1]
            if raw.data_ptr() % dtype.itemsize:
                raw = raw.clone()
            tensors[name] = raw.view(dtype).view(entry.shape)
        weights = cls(tensors, formats)
        if any(e.dtype in ("F16", "F32") and len(e.shape) >= 2 and n.endswith(".weight") for n, e in header.items()):
            say("float16 and float32 matrices are rounded to bfloat16 on the GPU")
        return weights

    @classmethod
    def synthesize(cls, config: ModelConfig, seed: int = 0) -> DeviceWeights:
        """Random weights on the GPU: NVFP4 experts and lm_head, FP8 mixers, the rest and the head bfloat16."""
        formats: dict[str, str] = {}
        generator = torch.Generator("cuda").manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for module, format, shape in synthetic_modules(config):
            formats[module.rpartition(".")[0] if ".experts." in module else module] = format
            for suffix, tensor in _random(module, format, shape, generator):
                tensors[f"{module}{suffix}"] = tensor
        for name, shape in synthetic_vectors(config):
            tensors[name] = torch.randn(shape, generator=generator, device="cuda") * 0.1
        return cls(tensors, formats)

    def address(self, name: str) -> int:
        return self.tensors[name].data_ptr()

    def format_of(self, module: str) -> str:
        """A matrix outside the checkpoint's list of modules (router, embedding) is plain."""
        return self.formats.get(module, "float")

    def add_quantized(self, module: str, source: str) -> None:
        """`module`: an NVFP4 copy of the bfloat16 matrix `source` [N, K], made on the GPU."""
        codes, scale, scale_2 = nvfp4.quantize(self.tensors[f"{source}.weight"])
        self.formats[module] = "nvfp4"
        self.tensors |= {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": scale_2,
        }

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _allocate(size: int) -> Tensor:
    free, _ = torch.cuda.mem_get_info()
    if size > free:
        raise UserError(
            f"the weights take {size / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB free; close what uses it"
        )
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _upload(path: Path, start: int, pool: Tensor, progress: Callable[[int, int], None] | None) -> None:
    """File from `start` on -> pool; reading the next piece overlaps with copying the last."""
    buffers = [torch.empty(min(PIECE, len(pool)), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)]
    with open(path, "rb", buffering=0) as file:
        for i, at in enumerate(range(0, len(pool), PIECE)):
            buffer, event = buffers[i % 2], events[i % 2]
            event.synchronize()
            size, done = min(PIECE, len(pool) - at), 0
            while done < size:
                read = os.preadv(file.fileno(), [buffer.numpy().data[done:size]], start + at + done)
                if not read:
                    raise UserError(f"{path}: ends at byte {start + at + done}; build the engines again")
                done += read
            pool[at : at + size].copy_(buffer[:size], non_blocking=True)
            event.record()
            if progress:
                progress(at + size, len(pool))
    torch.cuda.synchronize()


def synthetic_modules(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """module, format and shape of every matrix of NVIDIA's mixed layout."""
    h, c = config.hidden_size, config
    yield "embed_tokens", "float", (c.vocab_size, h)
    yield "lm_head", "nvfp4", (c.vocab_size, h)
    layers = [(f"layers.{i}", kind, True) for i, kind in enumerate(c.layer_types)]
    if c.mtp_num_hidden_layers:
        yield "mtp.fc", "float", (h, 2 * h)
        layers.append(("mtp.layers.0", FULL, False))
    for name, kind, quantized in layers:
        fp8, nvfp4 = ("fp8", "nvfp4") if quantized else ("float", "float")
        if kind == FULL:
            yield f"{name}.self_attn.q_proj", fp8, (2 * c.num_attention_heads * c.head_dim, h)
            yield f"{name}.self_attn.k_proj", fp8, (c.num_key_value_heads * c.head_dim, h)
            yield f"{name}.self_attn.v_proj", fp8, (c.num_key_value_heads * c.head_dim, h)
            yield f"{name}.self_attn.o_proj", fp8, (h, c.num_attention_heads * c.head_dim)
        else:
            yield f"{name}.linear_attn.in_proj_qkv", fp8, (c.conv_dim, h)
            yield f"{name}.linear_attn.in_proj_z", fp8, (c.value_dim, h)
            yield f"{name}.linear_attn.in_proj_b", "float", (c.linear_num_value_heads, h)
            yield f"{name}.linear_attn.in_proj_a", "float", (c.linear_num_value_heads, h)
            yield f"{name}.linear_attn.out_proj", fp8, (h, c.value_dim)
        mlp = f"{name}.mlp"
        inner = c.shared_expert_intermediate_size if c.is_moe else c.intermediate_size
        dense = f"{mlp}.shared_expert" if c.is_moe else mlp
        yield f"{dense}.gate_proj", nvfp4, (inner, h)
        yield f"{dense}.up_proj", nvfp4, (inner, h)
        yield f"{dense}.down_proj", nvfp4, (h, inner)
        if c.is_moe:
            yield f"{mlp}.gate", "float", (c.num_experts, h)
            yield f"{mlp}.shared_expert_gate", "float", (1, h)
            yield f"{mlp}.experts.gate_up_proj", nvfp4, (c.num_experts, 2 * c.moe_intermediate_size, h)
            yield f"{mlp}.experts.down_proj", nvfp4, (c.num_experts, h, c.moe_intermediate_size)


def synthetic_vectors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    c = config
    layers = [(f"layers.{i}", kind) for i, kind in enumerate(c.layer_types)]
    yield "norm.weight", (c.hidden_size,)
    if c.mtp_num_hidden_layers:
        layers.append(("mtp.layers.0", FULL))
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{norm}.weight", (c.hidden_size,)
    for name, kind in layers:
        yield f"{name}.input_layernorm.weight", (c.hidden_size,)
        yield f"{name}.post_attention_layernorm.weight", (c.hidden_size,)
        if kind == FULL:
            yield f"{name}.self_attn.q_norm.weight", (c.head_dim,)
            yield f"{name}.self_attn.k_norm.weight", (c.head_dim,)
        else:
            yield f"{name}.linear_attn.conv1d.weight", (c.conv_dim, c.linear_conv_kernel_dim)
            yield f"{name}.linear_attn.A_log", (c.linear_num_value_heads,)
            yield f"{name}.linear_attn.dt_bias", (c.linear_num_value_heads,)
            yield f"{name}.linear_attn.norm.weight", (c.linear_value_head_dim,)


def _random(
    module: str, format: str, shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a matrix whose entries have a standard deviation of about 1 / sqrt(K)."""
    deviation = shape[-1] ** -0.5
    if format == "nvfp4":
        count = math.prod(shape) // 2
        codes = torch.randint(0, 256, (count,), generator=generator, device="cuda", dtype=torch.uint8)
        yield ".weight", codes.view(*shape[:-1], shape[-1] // 2)
        scale = torch.randint(
            0x34, 0x3D, (math.prod(shape) // 16,), generator=generator, device="cuda", dtype=torch.uint8
        )
        yield ".weight_scale", scale.view(*shape[:-1], shape[-1] // 16)  # E4M3 0.75 to 1.625
        halves = (2,) if module.endswith("gate_up_proj") else ()
        yield ".weight_scale_2", torch.full(shape[:-2] + halves, deviation / 3.5, device="cuda")
        return
    weight = torch.empty(shape, dtype=torch.bfloat16 if format == "float" else torch.float8_e4m3fn, device="cuda")
    flat = weight.view(-1)
    for at in range(0, len(flat), 1 << 26):
        piece = flat[at : at + (1 << 26)]
        values = torch.randn(len(piece), generator=generator, device="cuda") * (
            deviation if format == "float" else 32.0
        )
        piece.copy_(values.to(weight.dtype))
    yield ".weight", weight
    if format == "fp8":
        yield ".weight_scale", torch.tensor(deviation / 32.0, device="cuda")
