"""What a GPU decodes at, against what its memory allows: `python -m runtime.bench --synthetic --config FILE`.

Every case runs real rounds, launched one ahead and read back by the host. The floor is the bytes that a step must move
(every weight it touches once, states, caches) at the copy bandwidth that the same run measured.
"""

from __future__ import annotations

import statistics
import time
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
from runtime.graph import IN_FLIGHT, GraphDecoder
from runtime.sampling import Sampler, SamplingConfig

CONTEXTS, PROMPTS = (128, 4096, 32768), (512, 4096)
ROUNDS, REPEATS = 40, 5


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
        c = self.config
        names = [n for n in self.model.weights.tensors if n.startswith(prefix) and ".experts." in n]
        experts = self.weights(*names) if names else 0.0
        touched = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** rows if c.is_moe else 0.0
        return self.weights(prefix) - experts * (1 - touched)

    def cache(self, layers: int, context: int) -> float:
        c = self.config
        value = 1 if self.model.options.fp8_cache else 2
        return layers * 2 * c.num_key_value_heads * c.head_dim * value * context

    def verify(self, rows: int, context: int) -> float:
        c = self.config
        attention = sum(kind == FULL for kind in c.layer_types)
        state = 4 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
        states = 2 * (len(c.layer_types) - attention) * state  # read and written once
        return self.layers("layers.", rows) + self.weights(self.model.head) + states + self.cache(attention, context)

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


def decode_case(engine: CudaEngine, context: int, mtp_k: int, simulate: float, bandwidth: float) -> dict[str, Any]:
    sampler = Sampler(SamplingConfig())
    capacity = context + (ROUNDS + 3) * (mtp_k + 1)
    decoder = GraphDecoder(engine, capacity, mtp_k, sampler, simulate=simulate if mtp_k else None)
    fill(engine)
    launched = Kernel.launched
    decoder.capture()
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
    model.verify(rows)  # so that every launch finds its inputs
    recorded: list[Any] = []
    model.recorded = recorded
    model.verify(rows)
    model.recorded = None
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
        table.append({"launch": label, "count": len(calls), "us_each": microseconds / len(calls), "us": microseconds})
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
                )
    return result | {"hardware": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}}
