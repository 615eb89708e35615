"""What belongs to one sequence on a GPU: its state, and the buffers that launches hand each other.

Everything is allocated once and keeps its address, so that a captured CUDA graph finds it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export.bindings import CACHE_BLOCK
from export.config import FULL, ModelConfig
from plugins.gated_delta_net import cuda as gdn
from plugins.sampling import cuda as sampling_cuda

PREFILL_CHUNK = 2048  # rows of one prefill call
SLACK = 64  # a round writes all its drafts, and one more is launched before its end is seen
DEVICE = "cuda"  # tests put whole models on the "cpu", where tests/emulator.py runs the kernels


def stream() -> int:
    """The stream that launches go to."""
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def floats(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.float32)


def halves(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.float16)


def integers(count: int) -> Tensor:
    return zeros(count, dtype=torch.int32)


def octets(count: int) -> Tensor:
    return zeros(count, dtype=torch.uint8)


def gdn_sizes(c: ModelConfig) -> gdn.Sizes:
    return gdn.Sizes(c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)


def slots(capacity: int) -> int:
    """Cache slots for so many positions, and what rounds that are dropped write beyond the last."""
    return -(-(capacity + SLACK) // CACHE_BLOCK) * CACHE_BLOCK


class State:
    """Per attention layer a KV cache [2, Hkv, S, D], float16 or E4M3; per GDN layer the recurrent state, float32, and
    the ring of its projections' rows. All zeros at first."""

    def __init__(self, config: ModelConfig, capacity: int, fp8_cache: bool) -> None:
        c = config
        self.capacity = capacity
        self.kv: dict[str, Tensor] = {}
        self.recurrent: dict[str, tuple[Tensor, Tensor]] = {}
        layers = [(f"layers.{i}", kind) for i, kind in enumerate(c.layer_types)]
        layers += [("mtp.layers.0", FULL)] * c.mtp_num_hidden_layers
        for name, kind in layers:
            if kind == FULL:
                dtype = torch.uint8 if fp8_cache else torch.float16
                shape = (2, c.num_key_value_heads, capacity, c.head_dim)
                self.kv[name] = zeros(*shape, dtype=dtype)
            else:
                state = floats(c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
                self.recurrent[name] = state, floats(gdn.RING, gdn_sizes(c).row_stride)


class RoundBuffers:
    """Of verify and draft calls of up to `rows` rows. H: hidden size, V: vocabulary."""

    def __init__(self, config: ModelConfig, rows: int, draft_vocab: int, head_parts: int) -> None:
        c, h = config, config.hidden_size
        self.rows = rows
        # What the host reads after a round lies together: the control block, the round's tokens, its drafts.
        self.results = integers(sampling_cuda.CONTROL_WORDS + 2 * rows)
        self.control, self.out_tokens, self.drafts = self.results.split([sampling_cuda.CONTROL_WORDS, rows, rows])
        self.seed = integers(2)
        self.verify_tokens, self.head_tokens = integers(rows), integers(rows)
        self.sampled = integers(rows)
        # What changes logits before they are sampled, see plugins/sampling, and the changed ones.
        self.occurrences, self.penalties, self.bias = integers(c.vocab_size), floats(3), floats(c.vocab_size)
        self.allowed, self.steered = zeros(rows, -(-c.vocab_size // 32), dtype=torch.int32), floats(rows, c.vocab_size)
        self.x, self.hidden, self.logits = floats(rows, h), floats(rows, h), floats(rows, c.vocab_size)
        self.mixed = floats(rows, c.value_dim)
        self.squares = floats(rows * c.linear_num_value_heads * head_parts)
        self.attended = floats(rows, c.num_attention_heads * c.head_dim)
        self.q = floats(rows, 2 * c.num_attention_heads * c.head_dim)
        self.k, self.v = (floats(rows, c.num_key_value_heads * c.head_dim) for _ in range(2))
        if c.is_moe:
            self.router_logits, self.shared_gate = floats(rows, c.num_experts), floats(rows, 1)
            self.act = floats(rows * c.num_experts_per_tok, c.moe_intermediate_size)
        self.shared_act = floats(rows, c.shared_expert_intermediate_size if c.is_moe else c.intermediate_size)
        # The head's: [embedding, hidden] of its rows, their residual stream, and those of the row that it drafts from.
        self.pair, self.head_x, self.draft_x = floats(rows, 2 * h), floats(rows, h), floats(1, h)
        self.head_hidden, self.draft_logits, self.draft_token = floats(1, h), floats(1, draft_vocab), integers(1)

    def steering(self, masked: bool) -> sampling_cuda.SteeringArguments:
        """masked: by a grammar too."""
        addresses = [tensor.data_ptr() for tensor in (self.occurrences, self.penalties, self.bias)]
        allowed = (self.allowed.data_ptr(), self.allowed.shape[1]) if masked else (None, 0)
        return sampling_cuda.SteeringArguments(*addresses, *allowed)


class PrefillBuffers:
    """Of prefill calls of up to `rows` rows."""

    def __init__(self, config: ModelConfig, rows: int, scratch_bytes: int) -> None:
        c, h = config, config.hidden_size
        self.rows = rows
        self.tokens, self.next_tokens = integers(rows), integers(rows)
        self.x, self.hidden = floats(rows, h), floats(rows + 1, h)
        self.normed, self.rest = halves(rows, h), halves(rows, h)
        widest = max(gdn_sizes(c).row_stride, 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim)
        self.projected = floats(rows, widest)
        self.mixed = halves(rows, max(c.value_dim, c.num_attention_heads * c.head_dim))
        inner = c.shared_expert_intermediate_size if c.is_moe else c.intermediate_size
        self.act = halves(rows, inner)
        if c.is_moe:
            self.shared, self.shared_gate = floats(rows, h), floats(rows, 1)
            self.router_logits = floats(rows, c.num_experts)
        self.scratch = octets(scratch_bytes)
        self.pair = floats(rows, 2 * h)
        self.pair_half = halves(rows, 2 * h)
