"""Times of gated attention's kernels at the real model's sizes: `python -m tests.bench_attention [--fp8]`.

Decode is attention_decode and attention_combine, as a CUDA graph of LAYERS of them over caches of their own: at 4096
positions and up these do not fit in L2. Prefill is attention_append and attention_prefill. Medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from plugins.gated_attention import inverse_frequencies
from plugins.gated_attention.cuda import DECODE_SOURCE, PREFILL_SOURCE, Decode, Prefill, Sizes
from plugins.kernels import Module, cached_kernels

LAYERS, REPEATS, EPSILON = 20, 15, 1e-6


def graph_time(launch: Callable[[int, int], None], layers: int) -> float:
    """Microseconds for each launch(layer, stream), replayed as one graph."""
    for layer in range(layers):
        launch(layer, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            launch(layer, torch.cuda.current_stream().cuda_stream)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times)


class Bench:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        properties: Any = torch.cuda.get_device_properties(0)
        torch.cuda.synchronize()
        arch = f"sm_{properties.major}{properties.minor}"
        shared = properties.shared_memory_per_block_optin
        count = properties.multi_processor_count
        self.decode = Decode(Module(cached_kernels(DECODE_SOURCE, arch, sizes.defines)), sizes, count, shared)
        self.prefill = Prefill(Module(cached_kernels(PREFILL_SOURCE, arch, sizes.defines)), sizes)
        self.norm = torch.randn(sizes.head_dim, device="cuda")
        self.frequencies = inverse_frequencies(sizes.rotary_dim, 1e7).cuda()

    def caches(self, count: int, capacity: int) -> list[torch.Tensor]:
        shape = (2, self.sizes.num_kv_heads, capacity, self.sizes.head_dim)
        dtype = torch.float8_e4m3fn if self.sizes.fp8 else torch.float16
        return [torch.randn(shape, device="cuda", dtype=torch.float16).to(dtype) for _ in range(count)]

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, kv_heads, dim = self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.head_dim
        widths = (2 * heads * dim, kv_heads * dim, kv_heads * dim)
        q_gate, k, v = (torch.randn(count, width, device="cuda") for width in widths)
        return q_gate, k, v

    def decode_time(self, positions: int, count: int) -> float:
        sizes, capacity = self.sizes, positions
        caches, (q_gate, k, v) = self.caches(LAYERS, capacity), self.rows(count)
        position = torch.tensor([positions - count], dtype=torch.int32, device="cuda")
        y = torch.empty(count, sizes.num_heads * sizes.head_dim, device="cuda")
        scratch = torch.empty(self.decode.scratch_bytes(capacity), dtype=torch.uint8, device="cuda")

        def launch(layer: int, stream: int) -> None:
            self.decode.launch(
                q_gate=q_gate.data_ptr(),
                q_stride=q_gate.shape[1],
                k=k.data_ptr(),
                k_stride=k.shape[1],
                v=v.data_ptr(),
                v_stride=v.shape[1],
                q_norm=self.norm.data_ptr(),
                k_norm=self.norm.data_ptr(),
                inverse_frequencies=self.frequencies.data_ptr(),
                position=position.data_ptr(),
                kv_cache=caches[layer].data_ptr(),
                capacity=capacity,
                rows=count,
                y=y.data_ptr(),
                scratch=scratch.data_ptr(),
                epsilon=EPSILON,
                stream=stream,
            )

        return graph_time(launch, LAYERS)

    def prefill_times(self, start: int, count: int) -> tuple[float, float]:
        """Of append, and of attention."""
        capacity = -(-(start + count) // 64) * 64
        (cache,), (q_gate, k, v) = self.caches(1, capacity), self.rows(count)
        position = torch.tensor([start], dtype=torch.int32, device="cuda")
        y = torch.empty(count, self.sizes.num_heads * self.sizes.head_dim, device="cuda", dtype=torch.float16)

        def append(_: int, stream: int) -> None:
            self.prefill.append(
                k=k.data_ptr(),
                k_stride=k.shape[1],
                v=v.data_ptr(),
                v_stride=v.shape[1],
                k_norm=self.norm.data_ptr(),
                inverse_frequencies=self.frequencies.data_ptr(),
                position=position.data_ptr(),
                kv_cache=cache.data_ptr(),
                capacity=capacity,
                rows=count,
                epsilon=EPSILON,
                stream=stream,
            )

        def attend(_: int, stream: int) -> None:
            self.prefill.attend(
                q_gate=q_gate.data_ptr(),
                q_stride=q_gate.shape[1],
                q_norm=self.norm.data_ptr(),
                inverse_frequencies=self.frequencies.data_ptr(),
                position=position.data_ptr(),
                kv_cache=cache.data_ptr(),
                capacity=capacity,
                rows=count,
                y=y.data_ptr(),
                epsilon=EPSILON,
                stream=stream,
            )

        return graph_time(append, 5), graph_time(attend, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fp8", action="store_true", help="a KV cache in E4M3")
    sizes = Sizes(16, 2, 256, 64, fp8=parser.parse_args().fp8)
    bench = Bench(sizes)
    for positions in (128, 4096, 32768):
        for count in (1, 3, 5):
            time = bench.decode_time(positions, count)
            rate = sizes.cache_bytes(positions) / time / 1e3
            print(f"decode   {positions:6} positions  T {count}     {time:8.2f} us  {rate:7.0f} GB/s")
    for start in (0, 2048):
        for count in (512, 2048):
            append, time = bench.prefill_times(start, count)
            products = 4 * sizes.num_heads * sizes.head_dim * (count * start + count * (count + 1) // 2)
            rate = products / time / 1e6
            print(f"prefill  {start:6} + {count:4}  append {append:6.1f} us  {time:8.1f} us  {rate:7.0f} TFLOP/s")


if __name__ == "__main__":
    main()
