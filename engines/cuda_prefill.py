"""Prefill on a GPU: chunks of a prompt through tensor-core kernels, float16 in, float32 sums and residual stream.

prefill = Prefill(model, rows=2048)
prefill.main(rows)          # buffers.tokens at the control block's position -> buffers.hidden, model.buffers.logits
prefill.head(rows, first)   # the same rows into the head's KV cache
"""

from __future__ import annotations

from typing import Any

import torch

from engines.cuda_memory import PrefillBuffers
from engines.cuda_model import CudaModel
from export.config import FULL
from plugins.gated_attention import cuda as attention
from plugins.gated_delta_net import cuda as gdn
from plugins.linear import prefill as linear
from plugins.linear.cuda import ADD, FORMATS, SWIGLU
from plugins.moe_experts import prefill as experts
from plugins.sampling import cuda as sampling_cuda


class Prefill:
    def __init__(self, model: CudaModel, rows: int) -> None:
        self.model, c = model, model.config
        self.linear = linear.PrefillLinear(model.module(linear.SOURCE, {}), model.gpu.multiprocessors)
        sizes = model.attention_sizes
        self.attention = attention.Prefill(model.module(attention.PREFILL_SOURCE, sizes.defines), sizes)
        scratch = model.gdn.scratch_bytes(rows)
        if c.is_moe:
            self.experts = experts.PrefillExperts(
                model.module(experts.SOURCE, model.expert_macros), c.num_experts, c.num_experts_per_tok
            )
            scratch = max(scratch, self.experts.scratch_bytes(rows, c.hidden_size, c.moe_intermediate_size))
        self.buffers = PrefillBuffers(c, rows, scratch)
        self.position = model.control(sampling_cuda.POSITION)

    def _norm(self, norm: str, rows: int, rest: bool = False) -> None:
        """buffers.x -> buffers.normed, and what its rounding lost in buffers.rest."""
        b, c = self.buffers, self.model.config
        weight = self.model.weights.address(f"{norm}.weight")
        self.model.launch(
            *("norm", self.linear.norm, b.x.data_ptr(), weight, b.normed.data_ptr(), rows, c.hidden_size),
            c.rms_norm_eps,
            lo=b.rest.data_ptr() if rest else 0,
        )

    def _linear(self, label: str, x: torch.Tensor, segments: list[Any], rows: int, rest: int = 0) -> None:
        self.model.launch(label, self.linear.linear, x.data_ptr(), rest, segments, rows, x.shape[-1])

    def _delta_net(self, name: str, rows: int) -> None:
        model, b, mixer = self.model, self.buffers, f"{name}.linear_attn"
        sizes = model.gdn.sizes
        projected = b.projected.data_ptr()
        segments = [
            model.segment(f"{mixer}.in_proj_{part}", projected + 4 * at, sizes.row_stride)
            for part, at in sizes.places.items()
        ]
        self._linear("GDN in", b.normed, segments, rows)
        state, ring = model.state.recurrent[name]
        memory = gdn.Memory(ring.data_ptr(), state.data_ptr())
        model.launch(
            *("GDN mixer", model.gdn.prefill, projected, memory, model.gdn_weights(mixer), self.position),
            *(model.control(sampling_cuda.COMMIT), rows, b.mixed.data_ptr(), model.config.rms_norm_eps),
            b.scratch.data_ptr(),
        )
        y = b.mixed.view(-1)[: b.rows * sizes.value_width].view(b.rows, sizes.value_width)
        self._linear("GDN out", y, [model.store(f"{mixer}.out_proj", b.x, epilogue=ADD)], rows)

    def _append(self, name: str, parts: dict[str, Any], rows: int, offset: int) -> None:
        """Keys and values of buffers.normed into the cache; parts: where k and v go, with their strides."""
        model, mixer = self.model, f"{name}.self_attn"
        segments = [model.segment(f"{mixer}.{part}_proj", at, stride) for part, (at, stride) in parts.items()]
        self._linear("attention in", self.buffers.normed, segments, rows)
        model.launch(
            *("KV append", self.attention.append),
            k=parts["k"][0],
            k_stride=parts["k"][1],
            v=parts["v"][0],
            v_stride=parts["v"][1],
            k_norm=model.weights.address(f"{mixer}.k_norm.weight"),
            **self._cache(name, rows, offset),
        )

    def _cache(self, name: str, rows: int, offset: int) -> dict[str, Any]:
        model = self.model
        return {
            "inverse_frequencies": model.frequencies.data_ptr(),
            "position": self.position,
            "position_offset": offset,
            "kv_cache": model.state.kv[name].data_ptr(),
            "capacity": model.state.capacity,
            "rows": rows,
            "epsilon": model.config.rms_norm_eps,
        }

    def _attention(self, name: str, rows: int) -> None:
        model, b, c = self.model, self.buffers, self.model.config
        q_width, kv_width = 2 * c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        stride, at = q_width + 2 * kv_width, b.projected.data_ptr()
        parts = {"q": (at, stride), "k": (at + 4 * q_width, stride), "v": (at + 4 * (q_width + kv_width), stride)}
        self._append(name, parts, rows, 0)
        model.launch(
            *("attention", self.attention.attend),
            q_gate=at,
            q_stride=stride,
            q_norm=model.weights.address(f"{name}.self_attn.q_norm.weight"),
            y=b.mixed.data_ptr(),
            **self._cache(name, rows, 0),
        )
        y = b.mixed.view(-1)[: b.rows * q_width // 2].view(b.rows, q_width // 2)
        self._linear("attention out", y, [model.store(f"{name}.self_attn.o_proj", b.x, epilogue=ADD)], rows)

    def _mlp(self, name: str, rows: int) -> None:
        model, b, c, mlp = self.model, self.buffers, self.model.config, f"{name}.mlp"
        self._norm(f"{name}.post_attention_layernorm", rows, rest=c.is_moe)
        dense = f"{mlp}.shared_expert" if c.is_moe else mlp
        segments = [model.store(f"{dense}.gate_proj", b.act, up=f"{dense}.up_proj", epilogue=SWIGLU)]
        if not c.is_moe:
            self._linear("MLP up", b.normed, segments, rows)
            self._linear("MLP down", b.act, [model.store(f"{dense}.down_proj", b.x, epilogue=ADD)], rows)
            return
        segments += [
            model.store(f"{mlp}.gate", b.router_logits, precise=1),
            model.store(f"{mlp}.shared_expert_gate", b.shared_gate, precise=1),
        ]
        self._linear("router, shared up", b.normed, segments, rows, rest=b.rest.data_ptr())
        self._linear("shared down", b.act, [model.store(f"{dense}.down_proj", b.shared)], rows)
        format = FORMATS[model.weights.format_of(f"{mlp}.experts")]
        gate_up, down = (model.expert_weights(f"{mlp}.experts.{part}_proj", format) for part in ("gate_up", "down"))
        model.launch(
            *("experts", self.experts.run),
            logits=b.router_logits.data_ptr(),
            x=b.normed.data_ptr(),
            gate_up=tuple(address or 0 for address in gate_up),
            down=tuple(address or 0 for address in down),
            format=format,
            inner=c.moe_intermediate_size,
            hidden=c.hidden_size,
            rows=rows,
            shared=b.shared.data_ptr(),
            shared_gate=b.shared_gate.data_ptr(),
            shared_gate_stride=1,
            residual=b.x.data_ptr(),
            scratch=b.scratch.data_ptr(),
        )

    def main(self, rows: int) -> None:
        """A chunk: buffers.tokens -> buffers.hidden[1 : rows + 1] after the final norm, logits of the last row in
        model.buffers.logits[0]. The caller clears COMMIT afterwards."""
        model, b, c = self.model, self.buffers, self.model.config
        embedding = model.weights.address("embed_tokens.weight")
        model.launch("embed", model.sampling.embed, b.tokens.data_ptr(), embedding, b.x.data_ptr(), rows)
        for i, kind in enumerate(c.layer_types):
            self._norm(f"layers.{i}.input_layernorm", rows)
            if kind == FULL:
                self._attention(f"layers.{i}", rows)
            else:
                self._delta_net(f"layers.{i}", rows)
            self._mlp(f"layers.{i}", rows)
        weight = model.weights.address("norm.weight")
        model.launch(
            *("norm", self.linear.norm, b.x.data_ptr(), weight, b.normed.data_ptr(), rows, c.hidden_size),
            c.rms_norm_eps,
            exact=b.hidden[1:].data_ptr(),
        )
        given = model.input(b.x[rows - 1 :], 1, "norm")
        model.launch("lm_head", model.linear.linear, given, [model.store(model.head, model.buffers.logits)])

    def head(self, rows: int, first: int, offset: int) -> None:
        """The head's keys and values of hidden[first : first + rows] with buffers.next_tokens, at position + offset."""
        model, b, name = self.model, self.buffers, "mtp.layers.0"
        w, c = model.weights.address, model.config
        model.launch(
            *("head inputs", model.sampling.mtp_inputs, b.next_tokens.data_ptr(), w("embed_tokens.weight")),
            *(w("mtp.pre_fc_norm_embedding.weight"), b.hidden[first:].data_ptr(), w("mtp.pre_fc_norm_hidden.weight")),
            *(b.pair.data_ptr(), rows, c.rms_norm_eps),
        )
        b.pair_half[:rows].copy_(b.pair[:rows])
        self._linear("head fc", b.pair_half, [model.store("mtp.fc", b.x)], rows)
        self._norm(f"{name}.input_layernorm", rows)
        width, at = c.num_key_value_heads * c.head_dim, b.projected.data_ptr()
        self._append(name, {"k": (at, 2 * width), "v": (at + 4 * width, 2 * width)}, rows, offset)
