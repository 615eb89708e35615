"""What a GPU decodes at, against what its memory allows: `python -m runtime.bench --synthetic --config FILE`.

Every case runs real rounds, launched one ahead and read back by the host. The floor is the bytes that a step must move
(every weight it touches once, states, caches) at the copy bandwidth that the same run measured.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engines.cuda import CudaEngine
from engines.cuda_model import DRAFT_HEAD, CudaModel, Options
from engines.cuda_weights import DeviceWeights
from engines.manifest import VERSION, Manifest
from export.config import FULL, ModelConfig
from export.errors import UserError
from plugins.kernels import Kernel
from runtime.auto import AutoK
from runtime.graph import IN_FLIGHT, GraphDecoder
from runtime.sampling import Sampler, SamplingConfig
from runtime.session import most_drafts

CONTEXTS, PROMPTS = (128, 4096, 32768), (512, 4096)
ROUNDS, REPEATS = 40, 5
# The first launch of a layer that reads a tensor, by how its name begins after the layer's.
READ_BY = {
    "linear_attn.in_proj": "GDN in",
    "linear_attn.out_proj": "GDN out",
    "linear_attn.": "GDN mixer",
    "self_attn.q_norm": "attention",
    "self_attn.k_norm": "attention",
    "self_attn.o_proj": "attention out",
    "self_attn.": "attention in",
    "mlp.experts.gate_up_proj": "experts up",
    "mlp.experts.": "experts down",
    "mlp.shared_expert.down_proj": "experts down",
    "mlp.shared_expert": "router, shared up",
    "mlp.gate.": "router, shared up",
    "mlp.down_proj": "MLP down",
    "mlp.": "MLP up",
}


def synthetic_engine(config_file: Path, options: Options) -> CudaEngine:
    """Random weights of a config's shapes in NVIDIA's mixed layout: experts and lm_head NVFP4, mixers FP8."""
    config = ModelConfig.from_hf(config_file)
    weights = DeviceWeights.synthesize(config)
    manifest = Manifest(
        version=VERSION,
        target="cuda",
        config=config,
        formats=weights.formats,
        has_mtp=config.mtp_num_hidden_layers > 0,
        expanded=False,
        capacity=config.max_position_embeddings,
        versions={},
        source={},
        files={},
    )
    return CudaEngine.of(CudaModel(config, weights, options), manifest)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the GPU, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * len(source) / statistics.median(seconds[1:])


class Bytes:
    """What calls of the model must move at least."""

    def __init__(self, model: CudaModel) -> None:
        self.model, self.config = model, model.config

    def weights(self, *prefixes: str) -> float:
        tensors = self.model.weights.tensors.items()
        return sum(float(t.numel() * t.element_size()) for name, t in tensors if name.startswith(prefixes))

    def layers(self, prefix: str, rows: int) -> float:
        """Weights of layers on `rows` rows: of the experts only those that uniform routing touches."""
        names = [n for n in self.model.weights.tensors if n.startswith(prefix) and ".experts." in n]
        experts = self.weights(*names) if names else 0.0
        return self.weights(prefix) - experts * (1 - self.touched(rows))

    def touched(self, rows: int) -> float:
        """Share of the experts that `rows` rows choose, each at random."""
        c = self.config
        return 1 - (1 - c.num_experts_per_tok / c.num_experts) ** rows if c.is_moe else 0.0

    def cache(self, layers: int, context: int) -> float:
        c = self.config
        value = 1 if self.model.options.fp8_cache else 2
        return layers * 2 * c.num_key_value_heads * c.head_dim * value * context

    @property
    def attention_layers(self) -> int:
        return sum(kind == FULL for kind in self.config.layer_types)

    @property
    def states(self) -> float:
        """Of all GDN layers, read and written once."""
        c = self.config
        state = 4 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
        return 2 * (len(c.layer_types) - self.attention_layers) * state

    def verify(self, rows: int, context: int) -> float:
        weights = self.layers("layers.", rows) + self.weights(self.model.head)
        return weights + self.states + self.cache(self.attention_layers, context)

    def launches(self, rows: int, context: int) -> dict[str, float]:
        """The same by kind of launch, and what is too little for `verify` to count: the rows' embeddings and the last
        norm."""
        row = self.weights("embed_tokens.") / self.config.vocab_size
        found: dict[str, float] = defaultdict(float, {"embed": rows * row})
        for name, tensor in self.model.weights.tensors.items():
            if name.startswith("layers."):
                share = self.touched(rows) if ".experts." in name else 1.0
                found[self.read_by(name)] += share * tensor.nbytes
        found["GDN mixer"] += self.states
        found["attention"] += self.cache(self.attention_layers, context)
        found["lm_head"] = self.weights(self.model.head, "norm.")
        return {kind: count for kind, count in found.items() if count}

    def read_by(self, name: str) -> str:
        """The launch of a verify that reads a layer's tensor."""
        _, index, rest = name.split(".", 2)
        full = self.config.layer_types[int(index)] == FULL
        norms = {"input_layernorm": "attention in" if full else "GDN in"}
        norms |= {"post_attention_layernorm": "router, shared up" if self.config.is_moe else "MLP up"}
        return next(kind for begin, kind in (norms | READ_BY).items() if rest.startswith(begin))

    def draft(self, context: int) -> float:
        head = DRAFT_HEAD if self.model.draft_head == DRAFT_HEAD else self.model.head
        share = self.model.draft_vocab / self.config.vocab_size
        return (
            self.layers("mtp.layers.", 1) + self.weights("mtp.fc") + share * self.weights(head) + self.cache(1, context)
        )

    def round(self, mtp_k: int, context: int) -> float:
        return self.verify(mtp_k + 1, context) + mtp_k * self.draft(context)


def fill(engine: CudaEngine) -> None:
    """States and caches with numbers: zeros would flatter."""
    state = engine.model.state
    for cache in state.kv.values():
        if cache.dtype == torch.float16:
            cache.normal_()
        else:
            cache.random_(0, 0x7E)
    for tensors in state.recurrent.values():
        for tensor in tensors:
            tensor.normal_(std=0.1)


def auto_case(engine: CudaEngine, context: int, simulate: float, bandwidth: float) -> dict[str, Any]:
    """K by itself, from nothing known on, over as many rounds as the fixed ones have together."""
    most, rounds = most_drafts(engine, "auto"), ROUNDS * REPEATS
    capacity = context + (rounds + 1) * (most + 1)
    decoder = GraphDecoder(engine, capacity, most, Sampler(SamplingConfig()), simulate=simulate, in_flight=1)
    fill(engine)
    engine._control(POSITION=context, COMMIT=1, HEAD_ROWS=1, HEAD_POSITION=context - 1, HEAD_LAST=0)
    decoder.position, auto, emitted, moved = context, AutoK(most), 0, 0.0
    sizes = Bytes(engine.model)
    seconds = 0.0
    for _ in range(rounds):
        count, start = auto.choose(), time.perf_counter()
        tokens = decoder.round(count)[1]
        spent = time.perf_counter() - start
        auto.record(count, len(tokens) - 1, spent)
        if auto.seen[count] > 1:  # the first of a K captures its graph
            seconds, emitted, moved = seconds + spent, emitted + len(tokens), moved + sizes.round(count, context)
    counted = rounds - sum(seen > 0 for seen in auto.seen)
    return {
        "context": context,
        "mtp_k": "auto",
        "ms": 1e3 * seconds / counted,
        "tokens_per_round": emitted / counted,
        "tokens_per_second": emitted / seconds,
        "megabytes": moved / counted / 1e6,
        "share_of_floor": moved / bandwidth / seconds,
        "rounds_by_k": auto.seen,
    }


def decode_case(engine: CudaEngine, context: int, mtp_k: int, simulate: float, bandwidth: float) -> dict[str, Any]:
    sampler = Sampler(SamplingConfig())
    capacity = context + (ROUNDS + 3) * (mtp_k + 1)
    decoder = GraphDecoder(engine, capacity, mtp_k, sampler, simulate=simulate if mtp_k else None)
    fill(engine)
    launched = Kernel.launched
    decoder.capture(decoder.shape(mtp_k))
    launches = (Kernel.launched - launched) // IN_FLIGHT
    spans, emitted = [], 0
    for repeat in range(REPEATS + 1):
        decoder.settle()
        engine._control(POSITION=context, COMMIT=1, HEAD_ROWS=1, HEAD_POSITION=context - 1, HEAD_LAST=0)
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        for _ in range(ROUNDS):
            count += len(decoder.round(mtp_k)[1])
        if repeat:
            spans.append(time.perf_counter() - start)
            emitted = count
    seconds = statistics.median(spans) / ROUNDS
    moved = Bytes(engine.model).round(mtp_k, context)
    return {
        "context": context,
        "mtp_k": mtp_k,
        "ms": 1e3 * seconds,
        "tokens_per_round": emitted / ROUNDS,
        "tokens_per_second": emitted / ROUNDS / seconds,
        "megabytes": moved / 1e6,
        "share_of_floor": moved / bandwidth / seconds,
        "launches": launches,
        "memory_gb": torch.cuda.memory_allocated() / 1e9,
    }


def prefill_case(engine: CudaEngine, length: int, mtp_k: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, engine.manifest.config.vocab_size, (length,), generator=generator).tolist()
    spans = []
    for _ in range(REPEATS + 1):
        decoder = GraphDecoder(engine, length + 64, mtp_k, Sampler(SamplingConfig()))
        torch.cuda.synchronize()
        start = time.perf_counter()
        decoder.prefill(prompt)
        spans.append(time.perf_counter() - start)
    seconds = statistics.median(spans[1:])
    return {"tokens": length, "ms": 1e3 * seconds, "tokens_per_second": length / seconds}


def profile(engine: CudaEngine, rows: int, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Each kind of launch of a verify alone: all its instances in one graph, so that weights come from memory."""
    model = engine.model
    GraphDecoder(engine, context + 64, rows - 1, Sampler(SamplingConfig()))
    fill(engine)
    engine._control(POSITION=context, COMMIT=1)
    model.buffers.verify_tokens.copy_(torch.arange(rows))  # rows that differ, and choose different experts
    model.verify(rows)  # so that every launch finds its inputs
    recorded: list[Any] = []
    model.recorded = recorded
    model.verify(rows)
    model.recorded = None
    moved = Bytes(model).launches(rows, context)
    table = []
    for label in dict.fromkeys(name for name, _ in recorded):
        calls = [call for name, call in recorded if name == label]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        spans = []
        for _ in range(REPEATS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            spans.append(start.elapsed_time(end) * 1e3)
        microseconds = statistics.median(spans[1:])
        entry = {"launch": label, "count": len(calls), "us_each": microseconds / len(calls), "us": microseconds}
        share = moved[label] / bandwidth / (1e-6 * microseconds)
        table.append({**entry, "bytes": moved[label], "share_of_floor": share})
    return table


def cases(contexts: Sequence[int], ks: Sequence[int]) -> Iterator[tuple[int, int]]:
    for context in contexts:
        for mtp_k in ks:
            if mtp_k <= 2 or context == contexts[0]:  # more drafts: at one context, it is the same everywhere
                yield context, mtp_k


def measure(engine: CudaEngine, simulate: float, contexts: Sequence[int] | None, profiled: bool) -> dict[str, Any]:
    """contexts: None for those of CONTEXTS that the model has positions for. Raises UserError: one that it has not."""
    most = engine.manifest.capacity - (ROUNDS + 3) * 5
    for context in contexts or ():
        if context > most:
            raise UserError(f"--contexts {context}: the model has positions for {most} and the rounds after them")
    contexts = contexts or [context for context in CONTEXTS if context <= most]
    bandwidth = copy_bandwidth()
    weights = engine.model.weights.bytes
    ks = range(min(5, engine.max_rows)) if engine.manifest.has_mtp else range(1)
    print(f"copies at {bandwidth / 1e9:.0f} GB/s; weights {weights / 1e9:.2f} GB; drafts accepted with p = {simulate}")
    header = ("context", "K", "ms", "tokens/round", "tokens/s", "MB", "of floor", "launches", "GB")
    print(("{:>8} {:>2} {:>7} {:>13} {:>9} {:>6} {:>9} {:>9} {:>6}").format(*header), flush=True)
    decoded = []
    for context in contexts[:1]:
        decode_case(engine, context, 0, simulate, bandwidth)  # not counted: clocks rise with the first work
    for context, mtp_k in cases(contexts, list(ks)):
        r = decode_case(engine, context, mtp_k, simulate, bandwidth)
        decoded.append(r)
        print(
            f"{context:>8} {mtp_k:>2} {r['ms']:>7.3f} {r['tokens_per_round']:>13.2f} {r['tokens_per_second']:>9.0f} "
            f"{r['megabytes']:>6.0f} {r['share_of_floor']:>9.1%} {r['launches']:>9} {r['memory_gb']:>6.2f}",
            flush=True,
        )
    if engine.manifest.has_mtp:
        decoded.append(r := auto_case(engine, contexts[0], simulate, bandwidth))
        print(
            f"{r['context']:>8} auto: {r['ms']:.3f} ms, {r['tokens_per_round']:.2f} tokens a round, "
            f"{r['tokens_per_second']:.0f} tokens/s; rounds by K {r['rounds_by_k']}",
            flush=True,
        )
    prefilled = []
    for length in PROMPTS:
        r = prefill_case(engine, length, 2 if engine.manifest.has_mtp else 0)
        prefilled.append(r)
        print(
            f"prefill of {length}: {r['ms']:.1f} ms to the first token, {r['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
    result: dict[str, Any] = {"copy_gb_per_second": bandwidth / 1e9, "weights_gb": weights / 1e9}
    result |= {"simulated_acceptance": simulate, "decode": decoded, "prefill": prefilled}
    if profiled:
        for rows in (1, 3):
            result[f"profile_{rows}"] = table = profile(engine, rows, contexts[0], bandwidth)
            print(f"verify of {rows} rows, every kind of launch by itself:")
            for entry in table:
                print(
                    f"  {entry['launch']:<20} {entry['count']:>3} x {entry['us_each']:>7.2f} us = {entry['us']:>8.1f}"
                    f"  {entry['bytes'] / 1e6:>8.1f} MB {entry['share_of_floor']:>7.1%}"
                )
    return result | {"hardware": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}}
