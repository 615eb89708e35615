"""The model on a GPU as sequences of kernel launches: embed, verify, draft, sample, accept; prefill.

Every method enqueues launches on torch's current stream and returns at once, reads its scalars (position, rows to
commit) from device memory, and allocates nothing, so that a sequence can be captured into a CUDA graph and replayed.

    model = CudaModel(config, DeviceWeights.load(path, formats), Options())
    model.start(capacity=4096, rows=3)
    model.verify(rows=3)                  # buffers.verify_tokens -> buffers.logits, buffers.hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engines import cuda_memory
from engines.cuda_memory import RoundBuffers, State, gdn_sizes, octets
from engines.cuda_weights import DeviceWeights
from export.config import FULL, ModelConfig
from export.errors import UserError
from plugins.gated_attention import cuda as attention
from plugins.gated_attention import inverse_frequencies
from plugins.gated_delta_net import cuda as gdn
from plugins.kernels import Module, cached_kernels
from plugins.linear import cuda as linear
from plugins.linear.cuda import ADD, FORMATS, MAX_EXPERTS, MAX_ROWS, MAX_TOP_K, SWIGLU, Ahead, Input, Segment
from plugins.moe_experts import cuda as experts
from plugins.sampling import cuda as sampling_cuda

if TYPE_CHECKING:
    from runtime.sampling import SamplingConfig

LEAST_CAPABILITY = (8, 0)
AHEAD = 6  # of the second-level cache, what a launch fetches ahead
SPARE_SHARED = 4 << 10  # bytes of a multiprocessor's shared memory outside the two rooms
DRAFT_HEAD = "mtp.draft_head"  # the quantized copy of a bfloat16 lm_head


@dataclass(frozen=True)
class Options:
    """fp8_cache: keys and values in E4M3. draft_vocab: drafts come from the first so many entries of the vocabulary
    only, which tokenizers number by frequency; 0: from all. It does not change the output."""

    fp8_cache: bool = False
    draft_vocab: int = 0

    def __post_init__(self) -> None:
        if self.draft_vocab < 0:
            raise UserError(f"--draft-vocab {self.draft_vocab}: expected 0 (all) or more")


@dataclass(frozen=True)
class Gpu:
    arch: str
    multiprocessors: int
    shared_bytes: int  # that one block may have
    cache_bytes: int  # second-level

    @property
    def rooms(self) -> tuple[int, int]:
        """Bytes of shared memory that successive launches of a layer take in turn, the first one first.

        A kernel's blocks start while those of the one before it still work. Left alone they crowd onto the
        multiprocessors that are free first, two on some and none on others. A block that fills one of two rooms of
        different sizes, the larger more than half, leaves space for one of the next kernel alone: one on each.
        Dense layers have an odd number of launches: their last and the next layer's first take the same room.
        """
        total = self.shared_bytes + 1024
        large = total // 2 + 1024
        return large, total - SPARE_SHARED - large

    @classmethod
    def current(cls, what: str = "the cuda target needs") -> Gpu:
        """what: the beginning of what is said without one. Raises UserError: no GPU, or one that is too old."""
        if not torch.cuda.is_available():
            raise UserError(f"{what} an NVIDIA GPU, and none is here; use engines of the cpu target")
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < LEAST_CAPABILITY:
            raise UserError(f"this GPU has compute capability {major}.{minor}; Tandem needs 8.0 or later")
        p: Any = torch.cuda.get_device_properties()
        return cls(f"sm_{major}{minor}", p.multi_processor_count, p.shared_memory_per_block_optin, p.L2_cache_size)


class Sample(NamedTuple):
    """How the token of every row of logits is found, at which position from the control block's on, and where it goes:
    addresses of int32 [T]. steering: what changes the logits before; the first row comes after `first` drafts."""

    kernels: sampling_cuda.SamplingKernels
    config: SamplingConfig
    offset: int
    outputs: list[int]
    steering: sampling_cuda.SteeringArguments | None = None
    first: int = 0


def check_sizes(config: ModelConfig, formats: dict[str, str]) -> None:
    """Raises UserError for sizes that the kernels cannot take."""
    c = config
    inputs = {"hidden_size": c.hidden_size, "num_attention_heads * head_dim": c.num_attention_heads * c.head_dim}
    if c.is_moe:
        inputs |= {"moe_intermediate_size": c.moe_intermediate_size}
        inputs |= {"shared_expert_intermediate_size": c.shared_expert_intermediate_size}
    else:
        inputs |= {"intermediate_size": c.intermediate_size}
    if c.linear_num_value_heads:
        inputs |= {"linear_num_value_heads * linear_value_head_dim": c.value_dim}
    for name, size in inputs.items():
        linear.check_k(size, "nvfp4" if "nvfp4" in formats.values() else "float", name)
    if c.num_experts > MAX_EXPERTS or c.num_experts_per_tok > MAX_TOP_K:
        raise UserError(
            f"{c.num_experts_per_tok} of {c.num_experts} experts a token: the kernels take at most "
            f"{MAX_TOP_K} of {MAX_EXPERTS}; use cpu"
        )
    for name, size, largest in (
        ("head_dim", c.head_dim, 256),
        ("linear_key_head_dim", c.linear_key_head_dim, 128),
        ("linear_value_head_dim", c.linear_value_head_dim, 128),
    ):
        if size % 16 or size > largest:
            raise UserError(f"{name} {size}: the kernels take multiples of 16 up to {largest}; use cpu")
    for name, valid in (
        ("num_attention_heads / num_key_value_heads", c.num_attention_heads <= 16 * c.num_key_value_heads),
        ("num_key_value_heads", c.num_key_value_heads <= 32),
        ("linear_num_value_heads", c.linear_num_value_heads <= linear.MAX_HEADS),
        ("linear_conv_kernel_dim", c.linear_conv_kernel_dim == 4),
    ):
        if not valid:
            raise UserError(f"{name}: not a size that there are kernels for; use cpu")


def rows_that_fit(config: ModelConfig, device_shared: int) -> int:
    """Rows of one call that the kernels' shared memory holds. device_shared: bytes that a block may have."""
    c = config
    widths = [c.hidden_size, c.num_attention_heads * c.head_dim, c.value_dim]
    widths += [2 * c.hidden_size] * c.mtp_num_hidden_layers + [c.intermediate_size] * (not c.is_moe)
    mixture = experts.ExpertsDecode(None, 1, device_shared, c.num_experts, c.num_experts_per_tok) if c.is_moe else None

    def fits(rows: int) -> bool:
        if max(linear.shared_bytes(rows, width) for width in widths) > device_shared - linear.STATIC:
            return False
        return not mixture or mixture.fits(rows, c.moe_intermediate_size, c.shared_expert_intermediate_size)

    return max((rows for rows in range(1, MAX_ROWS + 1) if fits(rows)), default=0)


def check_room(config: ModelConfig, device_shared: int, target: str) -> None:
    """Raises UserError: not even a row fits the target's shared memory."""
    if not rows_that_fit(config, device_shared):
        kilobytes = device_shared >> 10
        raise UserError(f"--target {target}: this model is too wide for its {kilobytes} KB of shared memory; use cpu")


class CudaModel:
    def __init__(self, config: ModelConfig, weights: DeviceWeights, options: Options) -> None:
        check_sizes(config, weights.formats)
        self.config, self.weights, self.options, self.gpu = config, weights, options, Gpu.current()
        c, count = config, self.gpu.multiprocessors
        self.draft_vocab = min(options.draft_vocab or c.vocab_size, c.vocab_size)
        self.head = "embed_tokens" if c.tie_word_embeddings else "lm_head"
        self.draft_head = self.head
        if c.mtp_num_hidden_layers and weights.format_of(self.head) == "float" and c.hidden_size % 64 == 0:
            if f"{DRAFT_HEAD}.weight" not in weights.tensors:
                weights.add_quantized(DRAFT_HEAD, self.head)
            self.draft_head = DRAFT_HEAD
        self.expert_macros: dict[str, int | str] = {
            "NUM_EXPERTS": max(c.num_experts, 1),
            "TOP_K": max(c.num_experts_per_tok, 1),
        }
        self.linear = linear.LinearDecode(self.module(linear.SOURCE, {}), count, self.gpu.shared_bytes)
        if c.is_moe:
            compiled = self.module(experts.SOURCE, self.expert_macros)
            self.experts = experts.ExpertsDecode(
                compiled, count, self.gpu.shared_bytes, c.num_experts, c.num_experts_per_tok
            )
        sizes = gdn_sizes(c)
        self.gdn = gdn.GatedDeltaNet(self.module(gdn.SOURCE, sizes.macros()), sizes)
        self.attention_sizes = attention.Sizes(
            c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim, options.fp8_cache
        )
        self.attention = attention.Decode(
            self.module(attention.DECODE_SOURCE, self.attention_sizes.defines),
            *(self.attention_sizes, count, self.gpu.shared_bytes),
        )
        sampling = self.module(sampling_cuda.SOURCE, sampling_cuda.defines(c.hidden_size))
        self.sampling = sampling_cuda.SamplingKernels(sampling, c.vocab_size)
        self.draft_sampling = sampling_cuda.SamplingKernels(sampling, self.draft_vocab)
        self.frequencies = inverse_frequencies(c.rotary_dim, c.rope_theta).to(cuda_memory.DEVICE)
        # What is launched, by name, while a benchmark asks for it.
        self.recorded: list[tuple[str, Callable[[], None]]] | None = None

    def module(self, source: Path, macros: dict[str, int | str]) -> Module:
        return Module(cached_kernels(source, self.gpu.arch, macros))

    @property
    def max_rows(self) -> int:
        """Rows of one call that the kernels' shared memory holds on this GPU."""
        return rows_that_fit(self.config, self.gpu.shared_bytes)

    def start(self, capacity: int, rows: int) -> None:
        """Fresh state for `capacity` positions, and buffers for calls of up to `rows` rows, at most `max_rows`."""
        assert rows <= self.max_rows
        self.__dict__.pop("state", None)  # its memory, before the next takes as much
        self.state = State(self.config, capacity, self.options.fp8_cache)
        self.buffers = RoundBuffers(self.config, rows, self.draft_vocab, self.gdn.head_parts)
        self.attention_scratch = octets(self.attention.scratch_bytes(capacity))
        self.sampling_scratch = octets(self.sampling.scratch_bytes(rows))

    def launch(self, name: str, function: Callable[..., None], *args: Any, **options: Any) -> None:
        def call() -> None:
            function(*args, stream=cuda_memory.stream(), **options)

        if self.recorded is not None:
            self.recorded.append((name, call))
        call()

    def warm_up(self, drafts: int, head_rows: int, rows: int) -> None:
        """Before so many drafts, the first of them after `head_rows` rows, and a verify of `rows` rows, 0 for none, are
        captured: nothing is left to do once kernels are loaded."""

    def control(self, word: int) -> int:
        """The address of a word of the control block."""
        return self.buffers.control.data_ptr() + 4 * word

    # ---- one layer ----

    def input(self, x: Tensor, rows: int, norm: str | None = None) -> Input:
        given = Input(x=x.data_ptr(), epsilon=self.config.rms_norm_eps, x_stride=x.shape[-1], k=x.shape[-1], rows=rows)
        if norm:
            given.norm_weight = self.weights.address(f"{norm}.weight")
        given.position = self.control(sampling_cuda.POSITION)
        return given

    def segment(self, name: str, out: int, out_stride: int, up: str | None = None, **fields: int) -> Segment:
        w, format = self.weights, self.weights.format_of(name)
        suffixes = {"float": {}, "fp8": {"scale_2": ".weight_scale"}}.get(
            format, {"scale": ".weight_scale", "scale_2": ".weight_scale_2"}
        )
        segment = Segment(out=out, out_stride=out_stride, format=FORMATS[format], **fields)
        segment.n = segment.n or len(w.tensors[f"{name}.weight"])
        for field, suffix in {"weight": ".weight", **suffixes}.items():
            setattr(segment, field, w.address(name + suffix))
            if up:
                setattr(segment, f"{field}_up", w.address(up + suffix))
        return segment

    def store(self, name: str, out: Tensor, **fields: Any) -> Segment:
        return self.segment(name, out.data_ptr(), out.shape[-1], **fields)

    def add(self, label: str, given: Input, name: str, x: Tensor, room: int) -> None:
        """x += the product."""
        segments = [self.store(name, x, epilogue=ADD)]
        self.launch(label, self.linear.linear, given, segments, residual=x.data_ptr(), room=room)

    def gdn_weights(self, name: str) -> gdn.Weights:
        return gdn.Weights(*(self.weights.address(f"{name}.{n}") for n in gdn.WEIGHT_NAMES))

    def delta_net(self, name: str, rows: int) -> None:
        b, sizes, mixer = self.buffers, self.gdn.sizes, f"{name}.linear_attn"
        first, second = self.gpu.rooms
        state, ring = self.state.recurrent[name]
        segments = [
            self.segment(f"{mixer}.in_proj_{part}", ring.data_ptr() + 4 * at, sizes.row_stride, ring_mask=gdn.RING - 1)
            for part, at in sizes.places.items()
        ]
        given = self.input(b.x, rows, f"{name}.input_layernorm")
        self.launch("GDN in", self.linear.linear, given, segments, room=first)
        memory = gdn.Memory(ring.data_ptr(), state.data_ptr())
        scalars = self.control(sampling_cuda.POSITION), self.control(sampling_cuda.COMMIT)
        y, squares = b.mixed.data_ptr(), b.squares.data_ptr()
        weights = self.gdn_weights(mixer)
        self.launch("GDN mixer", self.gdn.decode, memory, weights, *scalars, rows, y, squares, room=second)
        gated = self.input(b.mixed, rows)
        gated.head_squares, gated.head_dim, gated.head_parts = squares, sizes.head_v_dim, self.gdn.head_parts
        self.add("GDN out", gated, f"{mixer}.out_proj", b.x, first)

    def attend(self, name: str, x: Tensor, rows: int, position: int, offset: int, query_row: int = 0) -> None:
        """Projections, attention and its gate: x -> buffers.attended. query_row: see attention.Decode."""
        b, mixer = self.buffers, f"{name}.self_attn"
        parts = {"q": b.q, "k": b.k, "v": b.v}
        segments = [self.store(f"{mixer}.{part}_proj", out) for part, out in parts.items()]
        given = self.input(x, rows, f"{name}.input_layernorm")
        self.launch("attention in", self.linear.linear, given, segments, room=self.gpu.rooms[0])
        rows_of = {part: out.data_ptr() for part, out in zip(("q_gate", "k", "v"), parts.values(), strict=True)}
        self.launch(
            "attention",
            self.attention.launch,
            **rows_of,
            **{f"{part}_stride": out.shape[-1] for part, out in parts.items()},
            **{norm: self.weights.address(f"{mixer}.{norm}.weight") for norm in ("q_norm", "k_norm")},
            inverse_frequencies=self.frequencies.data_ptr(),
            position=position,
            position_offset=offset,
            kv_cache=self.state.kv[name].data_ptr(),
            capacity=self.state.capacity,
            rows=rows,
            y=b.attended.data_ptr(),
            scratch=self.attention_scratch.data_ptr(),
            epsilon=self.config.rms_norm_eps,
            query_row=query_row,
        )

    def mlp(self, name: str, x: Tensor, rows: int) -> None:
        c, b, mlp, norm = self.config, self.buffers, f"{name}.mlp", f"{name}.post_attention_layernorm"
        first, second = self.gpu.rooms
        given = self.input(x, rows, norm)
        if not c.is_moe:
            pair = self.store(f"{mlp}.gate_proj", b.shared_act, up=f"{mlp}.up_proj", epilogue=SWIGLU)
            given.late = True  # as experts_up: once a layer, see common.cuh
            self.launch("MLP up", self.linear.linear, given, [pair], room=second)
            self.add("MLP down", self.input(b.shared_act, rows), f"{mlp}.down_proj", x, first)
            return
        shared = f"{mlp}.shared_expert"
        down = self.segment(f"{shared}.down_proj", x.data_ptr(), x.shape[-1])
        segments = [
            self.store(f"{mlp}.gate", b.router_logits),
            self.store(f"{shared}.gate_proj", b.shared_act, up=f"{shared}.up_proj", epilogue=SWIGLU),
            self.store(f"{mlp}.shared_expert_gate", b.shared_gate),
        ]
        given.late = True  # experts_up reads x before it waits
        ahead = self.ahead(name)
        self.launch("router, shared up", self.linear.linear, given, segments, room=second, ahead=ahead[0])
        format = FORMATS[self.weights.format_of(f"{mlp}.experts")]
        up, out = (self.expert_weights(f"{mlp}.experts.{part}_proj", format) for part in ("gate_up", "down"))
        act, inner = b.act.data_ptr(), c.moe_intermediate_size
        logits = b.router_logits.data_ptr()
        arguments_up = experts.UpArguments(given, logits, *up, act, format, inner, ahead=ahead[1])
        self.launch("experts up", self.experts.up, arguments_up, room=first)
        arguments = experts.DownArguments(logits, *out, act, down, b.shared_act.data_ptr(), b.shared_gate.data_ptr())
        arguments.x, arguments.format, arguments.inner, arguments.rows = x.data_ptr(), format, inner, rows
        arguments.shared_inner, arguments.hidden = c.shared_expert_intermediate_size, c.hidden_size
        self.launch("experts down", self.experts.down, arguments, room=second)

    def ahead(self, name: str) -> tuple[Ahead, Ahead]:
        """What a layer's router and experts_up, which leave memory idle, fetch of the weights that are next."""
        prefix, index = name.rsplit(".", 1)
        following, skip = int(index) + 1, 0
        if prefix == "mtp.layers":
            names = [self.draft_head]
        elif following == self.config.num_hidden_layers:
            names = [self.head]
        else:
            full = self.config.layer_types[following] == FULL
            parts = "self_attn.q self_attn.k self_attn.v" if full else "linear_attn.in_proj_qkv linear_attn.in_proj_z"
            names = [f"layers.{following}.{part}{'_proj' * full}" for part in parts.split()]
            skip = self.linear.under_way  # blocks fetch this themselves, before they wait
        weights = [self.weights.tensors[f"{name}.weight"] for name in names]
        regions = [(weight.data_ptr(), weight.nbytes) for weight in weights]
        size = self.gpu.cache_bytes // AHEAD
        return Ahead.of(regions, skip, size), Ahead.of(regions, skip + size, size)

    def expert_weights(self, name: str, format: int) -> list[int | None]:
        names = [f"{name}.{part}" for part in ("weight", "weight_scale", "weight_scale_2")]
        return [self.weights.address(n) if format == FORMATS["nvfp4"] or n == names[0] else None for n in names]

    # ---- the graphs ----

    def verify(
        self, rows: int, sampling: SamplingConfig | None = None, steering: sampling_cuda.SteeringArguments | None = None
    ) -> None:
        """buffers.verify_tokens at the control block's position -> buffers.logits and hidden; with `sampling` also
        buffers.sampled."""
        c, b = self.config, self.buffers
        embedding = self.weights.address("embed_tokens.weight")
        self.launch("embed", self.sampling.embed, b.verify_tokens.data_ptr(), embedding, b.x.data_ptr(), rows)
        for i, kind in enumerate(c.layer_types):
            name = f"layers.{i}"
            if kind == FULL:
                self.attend(name, b.x, rows, self.control(sampling_cuda.POSITION), 0)
                given = self.input(b.attended, rows)
                self.add("attention out", given, f"{name}.self_attn.o_proj", b.x, self.gpu.rooms[0])
            else:
                self.delta_net(name, rows)
            self.mlp(name, b.x, rows)
        given = self.input(b.x, rows, "norm")
        sample = self.of_rows(sampling, steering) if sampling else None
        self.project("lm_head", given, self.store(self.head, b.logits), b.hidden, b.logits, sample)

    def of_rows(self, sampling: SamplingConfig, steering: sampling_cuda.SteeringArguments | None) -> Sample:
        """How the rows of a verify are sampled."""
        return Sample(self.sampling, sampling, 1, [self.buffers.sampled.data_ptr()], steering)

    def of_draft(
        self, index: int, sampling: SamplingConfig | None, steering: sampling_cuda.SteeringArguments | None
    ) -> Sample | None:
        """How a draft is. The mask of the first is known before the round, those of others are not."""
        if not sampling:
            return None
        b = self.buffers
        places = (b.drafts, index), (b.verify_tokens, index + 1), (b.draft_token, 0)
        outputs = [buffer.data_ptr() + 4 * at for buffer, at in places]
        if steering and index:
            steering = steering.unmasked()
        return Sample(self.draft_sampling, sampling, 1 + index, outputs, steering, index)

    def draft(
        self,
        rows: int,
        index: int,
        sampling: SamplingConfig | None = None,
        steering: sampling_cuda.SteeringArguments | None = None,
    ) -> None:
        """The head's draft number `index`, from 0: buffers.draft_logits; with `sampling` also its token, to where the
        next draft, the verify and the acceptance look for it. The first takes the `rows` rows of the last verify, of
        which HEAD_ROWS are true; later ones the draft before."""
        b, name = self.buffers, "mtp.layers.0"
        first = index == 0
        rows = rows if first else 1
        tokens, hidden = (b.head_tokens, b.hidden) if first else (b.draft_token, b.head_hidden)
        w = self.weights.address
        self.launch(
            *("head inputs", self.sampling.mtp_inputs, tokens.data_ptr(), w("embed_tokens.weight")),
            *(w("mtp.pre_fc_norm_embedding.weight"), hidden.data_ptr(), w("mtp.pre_fc_norm_hidden.weight")),
            *(b.pair.data_ptr(), rows, self.config.rms_norm_eps),
        )
        x, room = b.head_x, self.gpu.rooms[1]
        self.launch("head fc", self.linear.linear, self.input(b.pair, rows), [self.store("mtp.fc", x)], room=room)
        # Only the last true row is drafted from; the others leave their keys and values.
        position, offset = (sampling_cuda.HEAD_POSITION, 0) if first else (sampling_cuda.POSITION, index - 1)
        last = self.control(sampling_cuda.HEAD_LAST) if first else 0
        self.attend(name, x, rows, self.control(position), offset, query_row=last)
        out = [self.store(f"{name}.self_attn.o_proj", b.draft_x, epilogue=ADD)]
        given = self.input(b.attended, 1)
        row, room = last or None, self.gpu.rooms[0]
        self.launch("attention out", self.linear.linear, given, out, residual=x.data_ptr(), residual_row=row, room=room)
        self.mlp(name, b.draft_x, 1)
        head = self.store(self.draft_head, b.draft_logits, n=self.draft_vocab)
        given = self.input(b.draft_x, 1, "mtp.norm")
        sample = self.of_draft(index, sampling, steering)
        self.project("draft head", given, head, b.head_hidden, b.draft_logits, sample)

    def project(
        self, label: str, given: Input, head: Segment, hidden: Tensor, logits: Tensor, sample: Sample | None = None
    ) -> None:
        """An lm_head: logits, the normed rows to `hidden`, and the rows' tokens, those of the largest logits by the
        same launch, others by sampling's own."""
        best = None
        if sample and sample.config.temperature == 0 and not sample.steering:
            tokens = sampling_cuda.Tokens.of(sample.outputs)
            scratch, error = self.sampling_scratch.data_ptr(), self.control(sampling_cuda.ERROR)
            best = linear.BestArguments(scratch, error, tokens, sample.kernels.vocab_size)
        normed = hidden.data_ptr()
        self.launch(label, self.linear.linear, given, [head], normed=normed, best=best)
        if sample and not best:
            self.sample(sample, logits, int(given.rows))

    def sample(self, sample: Sample, logits: Tensor, rows: int) -> None:
        position, error = self.control(sampling_cuda.POSITION), self.control(sampling_cuda.ERROR)
        if sample.steering:
            steered, given = self.buffers.steered, (self.buffers.verify_tokens.data_ptr(), sample.first)
            arguments = logits.data_ptr(), rows, *given, sample.steering, steered.data_ptr()
            self.launch("steer", sample.kernels.steer, *arguments)
            logits = steered
        self.launch(
            *("sample", sample.kernels.sample, logits.data_ptr(), rows, sample.config, position, sample.offset),
            *(self.buffers.seed.data_ptr(), sample.outputs, error, self.sampling_scratch.data_ptr()),
        )

    def accept(self, mtp_k: int, simulate: float | None = None) -> None:
        """buffers.sampled against buffers.drafts -> out_tokens, the control block, the next round's inputs."""
        b = self.buffers
        self.launch(
            *("accept", self.sampling.accept, b.sampled.data_ptr(), b.drafts.data_ptr(), mtp_k, b.seed.data_ptr()),
            *(b.control.data_ptr(), b.verify_tokens.data_ptr(), b.head_tokens.data_ptr(), b.out_tokens.data_ptr()),
            simulate=simulate,
        )

    def count(self) -> None:
        """The round's tokens into buffers.occurrences."""
        b = self.buffers
        addresses = b.out_tokens.data_ptr(), b.control.data_ptr(), b.occurrences.data_ptr()
        self.launch("count", self.sampling.count, *addresses)

    def sample_first(self, sampling: SamplingConfig, steering: sampling_cuda.SteeringArguments | None = None) -> None:
        """The token after a prompt, at the control block's position: into the next verify and the head."""
        b = self.buffers
        outputs = [b.verify_tokens.data_ptr(), b.head_tokens.data_ptr()]
        self.sample(Sample(self.sampling, sampling, 0, outputs, steering), b.logits, 1)
