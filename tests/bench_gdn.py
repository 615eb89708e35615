"""Times the Gated DeltaNet kernels on a GPU at the sizes of Qwen3.6-35B-A3B: python -m tests.bench_gdn

Decode: microseconds a layer in a CUDA graph over 30 layers, whose states (60 MB) do not stay in the cache.
Prefill: microseconds of each kernel, alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from plugins.gated_delta_net.cuda import RING, SOURCE, GatedDeltaNet, Memory, Sizes, Weights
from plugins.kernels import Module, cached_kernels

SIZES = Sizes(num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128)
LAYERS, REPEATS = 30, 30


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


class Layers:
    def __init__(self) -> None:
        heads, k_dim, v_dim = SIZES.num_v_heads, SIZES.head_k_dim, SIZES.head_v_dim
        self.rings = torch.randn(LAYERS, RING, SIZES.row_stride, device="cuda")
        self.states = torch.randn(LAYERS, heads, k_dim, v_dim, device="cuda")
        self.weights = [
            torch.randn(LAYERS, *shape, device="cuda") for shape in [(SIZES.z_offset, 4), (heads,), (heads,), (v_dim,)]
        ]

    def addresses(self, layer: int) -> tuple[Memory, Weights]:
        memory = Memory(self.rings[layer].data_ptr(), self.states[layer].data_ptr())
        return memory, Weights(*(weight[layer].data_ptr() for weight in self.weights))


class Timed:
    """A module whose kernels note how long they took."""

    def __init__(self, module: Module) -> None:
        self.module, self.times = module, dict[str, list[float]]()

    def kernel(self, name: str) -> Any:
        kernel, times = self.module.kernel(name), self.times.setdefault(name, [])

        class Launcher:
            def launch(self, *args: Any, **options: Any) -> None:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                kernel.launch(*args, **options)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)

        return Launcher()


def decode(module: Module, layers: Layers, rows: int, commit: int) -> float:
    """Microseconds a layer."""
    mixer = GatedDeltaNet(module, SIZES)
    o = torch.empty(rows, SIZES.value_width, device="cuda")
    squares = torch.empty(rows * SIZES.num_v_heads * mixer.head_parts, device="cuda")
    position, pending = (torch.tensor([value], dtype=torch.int32, device="cuda") for value in (100, commit))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for layer in range(LAYERS):
            memory, weights = layers.addresses(layer)
            scalars = (position.data_ptr(), pending.data_ptr())
            mixer.decode(
                memory, weights, *scalars, rows=rows, y=o.data_ptr(), squares=squares.data_ptr(), stream=stream
            )
    graph.replay()
    return median_us(graph.replay) / LAYERS


def prefill(module: Module, layers: Layers, rows: int) -> dict[str, float]:
    """Microseconds by kernel."""
    timed = Timed(module)
    mixer = GatedDeltaNet(timed, SIZES)
    projections = torch.randn(rows, SIZES.row_stride, device="cuda")
    scratch = torch.empty(mixer.scratch_bytes(rows), dtype=torch.uint8, device="cuda")
    y = torch.empty(rows, SIZES.value_width, dtype=torch.float16, device="cuda")
    position, pending = (torch.tensor([value], dtype=torch.int32, device="cuda") for value in (100, 3))
    scalars, stream = (position.data_ptr(), pending.data_ptr()), torch.cuda.current_stream().cuda_stream
    for i in range(REPEATS):
        memory, weights = layers.addresses(i % LAYERS)
        tensors = {"y": y.data_ptr(), "scratch": scratch.data_ptr()}
        mixer.prefill(
            projections.data_ptr(), memory, weights, *scalars, rows=rows, epsilon=1e-6, stream=stream, **tensors
        )
    return {name: statistics.median(times[1:]) for name, times in timed.times.items()}


def main() -> None:
    layers = Layers()  # before the module: torch makes the context
    major, minor = torch.cuda.get_device_capability()
    module = Module(cached_kernels(SOURCE, f"sm_{major}{minor}", SIZES.macros()))
    print(torch.cuda.get_device_name())
    for rows in (1, 3, 5, 8):
        times = ", ".join(
            f"commit {commit}: {decode(module, layers, rows, commit):.2f} us" for commit in sorted({0, 1, rows})
        )
        print(f"gdn_decode T = {rows}: {times}")
    for rows in (512, 2048):
        for name, time in prefill(module, layers, rows).items():
            print(f"prefill T = {rows}: {name} {time:.1f} us")


if __name__ == "__main__":
    main()
