"""The model on a GPU as sequences of kernel launches: verify, draft and prefill over buffers at fixed addresses.

Every method enqueues launches on torch's current stream and returns at once, reads its scalars (position, rows to
commit) from device memory, and allocates nothing, so that a sequence can be captured into a CUDA graph and replayed.

    model = CudaModel(config, DeviceWeights.load(path, formats))
    model.start(capacity=4096, window=3)
    model.verify(rows=3)                       # model.verify_tokens -> model.logits, model.hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.cuda_weights import DeviceWeights
from export.config import FULL, ModelConfig
from export.errors import UserError
from plugins.gated_attention import cuda as attention
from plugins.gated_attention import inverse_frequencies
from plugins.gated_delta_net import cuda as gdn
from plugins.kernels import Module, cached_kernels
from plugins.linear import cuda as linear
from plugins.linear.cuda import ADD, FORMATS, MAX_ROWS, PACK, PACK_NVFP4, STORE, SWIGLU, Input, Segment
from plugins.moe_experts import cuda as experts
from runtime import sampling_cuda

LEAST = (8, 0)  # compute capability


@dataclass(frozen=True)
class Device:
    arch: str
    multiprocessors: int
    shared_bytes: int  # that one block may have

    @classmethod
    def current(cls) -> Device:
        """Raises UserError: no GPU, or one that is too old."""
        if not torch.cuda.is_available():
            raise UserError("the cuda target needs an NVIDIA GPU, and there is none; use engines of the cpu target")
        capability = torch.cuda.get_device_capability()
        if capability < LEAST:
            raise UserError(f"this GPU has compute capability {capability[0]}.{capability[1]}; the cuda target needs 8.0")
        properties: Any = torch.cuda.get_device_properties()
        shared = properties.shared_memory_per_block_optin
        return cls(f"sm_{capability[0]}{capability[1]}", properties.multi_processor_count, shared)


class Memory:
    """What belongs to one sequence: state, and the buffers that launches hand each other. All zeros at first."""

    def __init__(self, config: ModelConfig, capacity: int, window: int, has_mtp: bool, kv_bytes: int) -> None:
        c, rows = config, window
        self.capacity = capacity
        sizes = c.hidden_size
        self.kv: dict[str, Tensor] = {}
        self.recurrent: dict[str, tuple[Tensor, Tensor]] = {}  # state, ring
        kv_shape = (2, c.num_key_value_heads, capacity, c.head_dim)
        kv_dtype = torch.float16 if kv_bytes == 2 else torch.uint8
        layers = [(f"layers.{i}", kind) for i, kind in enumerate(c.layer_types)]
        for name, kind in [*layers, ("mtp.layers.0", FULL)] if has_mtp else layers:
            if kind == FULL:
                self.kv[name] = torch.zeros(kv_shape, dtype=kv_dtype, device="cuda")
            else:
                state = floats(c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
                self.recurrent[name] = state, floats(gdn.RING, gdn_sizes(c).row_stride)
        self.control = integers(sampling_cuda.CONTROL_WORDS)
        self.seed = integers(2)
        self.verify_tokens, self.head_tokens = integers(rows), integers(rows)
        self.drafts, self.sampled, self.out_tokens = integers(rows), integers(rows), integers(rows)
        self.x, self.hidden, self.logits = floats(rows, sizes), floats(rows, sizes), floats(rows, c.vocab_size)
        self.mixed = floats(rows, max(c.num_attention_heads * c.head_dim, c.value_dim))
        self.q = floats(rows, 2 * c.num_attention_heads * c.head_dim)
        self.k, self.v = (floats(rows, c.num_key_value_heads * c.head_dim) for _ in range(2))
        # The head's own.
        self.pair, self.head_x = floats(rows, 2 * sizes), floats(rows, sizes)
        self.draft_x, self.head_hidden, self.draft_logits = floats(1, sizes), floats(1, sizes), floats(1, c.vocab_size)
        if c.is_moe:
            self.router_logits, self.shared_gate = floats(rows, c.num_experts), floats(rows)
            self.act = floats(rows * c.num_experts_per_tok, c.moe_intermediate_size)
            self.shared_act = floats(rows, c.shared_expert_intermediate_size)
            self.routing = torch.zeros(linear.routing_bytes(c.num_experts_per_tok), dtype=torch.uint8, device="cuda")
            self.counter = integers(1)
        else:
            self.shared_act = floats(rows, c.intermediate_size)


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cuda")


def integers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device="cuda")


def gdn_sizes(c: ModelConfig) -> gdn.Sizes:
    return gdn.Sizes(c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)


class CudaModel:
    def __init__(self, config: ModelConfig, weights: DeviceWeights, draft_vocab: int | None = None) -> None:
        """draft_vocab: drafts come from the first so many entries of the vocabulary only (tokenizers number them by
        frequency); the output does not change. Raises UserError for sizes that the kernels cannot take."""
        self.config, self.weights, self.device = config, weights, Device.current()
        c, arch = config, self.device.arch
        self.has_mtp = c.mtp_num_hidden_layers > 0
        self.draft_vocab = min(draft_vocab or c.vocab_size, c.vocab_size)
        self.draft_head = weights.draft_head(c)
        macros = {"NUM_EXPERTS": max(c.num_experts, 1), "TOP_K": max(c.num_experts_per_tok, 1)}

        def module(source: Any, defines: dict[str, Any]) -> Module:
            return Module(cached_kernels(source, arch, defines))

        count = self.device.multiprocessors
        self.linear = linear.LinearDecode(module(linear.SOURCE, macros), count)
        if c.is_moe:
            compiled = module(experts.SOURCE, macros)
            self.experts = experts.ExpertsDecode(compiled, count, c.num_experts, c.num_experts_per_tok)
        self.gdn = gdn.GatedDeltaNet(module(gdn.SOURCE, gdn_sizes(c).macros()), gdn_sizes(c))
        self.sampling = sampling_cuda.SamplingKernels(
            module(sampling_cuda.SOURCE, sampling_cuda.defines(c.hidden_size)), c.vocab_size
        )
        self.frequencies = inverse_frequencies(c.rotary_dim, c.rope_theta).cuda()
        # What was launched, by name, when a benchmark asks for it.
        self.recorded: list[tuple[str, Callable[[], None]]] | None = None

    # ---- parts ----

    def _launch(self, name: str, function: Callable[..., None], *args: Any, **options: Any) -> None:
        def launch() -> None:
            function(*args, torch.cuda.current_stream().cuda_stream, **options)

        if self.recorded is not None:
            self.recorded.append((name, launch))
        launch()

    def _input(self, x: Tensor, rows: int, norm: str | None = None) -> Input:
        weight = self.weights.address(f"{norm}.weight") if norm else None
        given = Input(x=x.data_ptr(), norm_weight=weight, epsilon=self.config.rms_norm_eps)
        given.x_stride = given.k = x.shape[-1]
        given.rows = rows
        return given

    def _segment(self, name: str, out: int, stride: int, up: str | None = None, **fields: int) -> Segment:
        w = self.weights
        segment = Segment(out=out, out_stride=stride, n=len(w.tensors[f"{name}.weight"]), **fields)
        format = w.format_of(name)
        segment.format = FORMATS[format]
        scales = {"float": (), "fp8": ((".weight_scale", "scale_2"),)}.get(
            format, ((".weight_scale", "scale"), (".weight_scale_2", "scale_2"))
        )
        for suffix, field in ((".weight", "weight"), *scales):
            setattr(segment, field, w.address(name + suffix))
            if up:
                setattr(segment, f"{field}_up", w.address(up + suffix))
        return segment

    def _store(self, name: str, out: Tensor) -> Segment:
        return self._segment(name, out.data_ptr(), out.shape[-1], epilogue=STORE)

    def _delta_net(self, name: str, rows: int) -> None:
        m, sizes, weight = self.memory, self.gdn.sizes, self.weights.address
        state, ring = m.recurrent[name]
        mixer, position = f"{name}.linear_attn", m.control[sampling_cuda.POSITION :].data_ptr()
        given = self._input(m.x, rows, f"{name}.input_layernorm")
        given.position = position
        places = {"qkv": 0, "z": sizes.z_offset, "b": sizes.b_offset, "a": sizes.a_offset}
        segments = [
            self._segment(f"{mixer}.in_proj_{part}", ring.data_ptr() + 4 * at, sizes.row_stride, ring_mask=gdn.RING - 1)
            for part, at in places.items()
        ]
        self._launch("GDN projections", self.linear.linear, given, segments)
        weights = gdn.Weights(*(weight(f"{mixer}.{n}") for n in ("conv1d.weight", "A_log", "dt_bias", "norm.weight")))
        memory, commit = gdn.Memory(ring.data_ptr(), state.data_ptr()), m.control[sampling_cuda.COMMIT :].data_ptr()
        self._launch("GDN mixer", self.gdn.decode, memory, weights, position, commit, rows, m.mixed.data_ptr())
        gated = Input(m.mixed.data_ptr(), weights.norm_weight, ring.data_ptr() + 4 * sizes.z_offset, position)
        gated.epsilon, gated.rows, gated.head_dim = self.config.rms_norm_eps, rows, sizes.head_v_dim
        gated.x_stride = gated.k = sizes.value_width
        gated.z_stride, gated.z_ring_mask = sizes.row_stride, gdn.RING - 1
        out = self._segment(f"{mixer}.out_proj", m.x.data_ptr(), m.x.shape[-1], epilogue=ADD)
        self._launch_linear("GDN output", gated, [out], residual=m.x.data_ptr())

    def _launch_linear(self, label: str, given: Input, segments: list[Segment], **options: Any) -> None:
        self._launch(label, self.linear.linear, given, segments, **options)
