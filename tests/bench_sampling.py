"""Times the kernels of plugins/sampling on a GPU, at the sizes of Qwen3.6-35B-A3B: µs per launch, as in a round.

PYTHONPATH=. python tests/bench_sampling.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from plugins.sampling.cuda import (
    CONTROL_WORDS,
    COUNT,
    ERROR,
    SOURCE,
    SamplingKernels,
    SteeringArguments,
    defines,
    seed_words,
)
from runtime.sampling import SamplingConfig
from tests.backends import GPU

VOCAB, HIDDEN = 248320, 2048
LAUNCHES, REPLAYS = 50, 15
CONFIGS = {
    "greedy": SamplingConfig(),
    "temperature": SamplingConfig(temperature=0.7),
    "top_k 20": SamplingConfig(temperature=0.7, top_k=20),
    "top_k 20, top_p 0.95": SamplingConfig(temperature=0.7, top_k=20, top_p=0.95),
    "top_p 0.95": SamplingConfig(temperature=0.7, top_p=0.95),
    "min_p 0.05": SamplingConfig(temperature=0.7, min_p=0.05),
    "top_k 50000, top_p 0.95": SamplingConfig(temperature=0.7, top_k=50000, top_p=0.95),
}


def microseconds(launch: Callable[[int], None]) -> float:
    """Median over replays of a graph of LAUNCHES calls of launch(stream)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(stream.cuda_stream)
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(LAUNCHES):
            launch(torch.cuda.current_stream().cuda_stream)
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(times)


def logits(kind: str, rows: int) -> Tensor:
    """peaked: as a model's, a few likely tokens over a broad floor. flat: barely any difference. equal: none."""
    x = torch.randn(rows, VOCAB) * {"peaked": 2.5, "flat": 0.02, "equal": 0.0}[kind]
    if kind == "peaked":
        x[:, :: VOCAB // 40] += 10
    return x.cuda()


def steering_times(kernels: SamplingKernels, rows: int) -> dict[str, float]:
    """Of penalties and a bias, without and with a mask."""
    given, out, bias = logits("peaked", rows), torch.empty(rows, VOCAB, device="cuda"), torch.zeros(VOCAB).cuda()
    params = torch.tensor([1.1, 0.5, 0.2], device="cuda")
    occurrences = (torch.rand(VOCAB) < 0.01).int().cuda()  # a long prompt's
    tokens = torch.arange(rows, dtype=torch.int32, device="cuda")
    allowed = torch.randint(-(2**31), 2**31, (rows, VOCAB // 32), dtype=torch.int32, device="cuda")
    a, b, c, d, e, f, g = (t.data_ptr() for t in (given, out, bias, params, occurrences, tokens, allowed))
    times = {}
    for name, mask in (("steer", 0), ("steer, mask", g)):
        steering = SteeringArguments(occurrences=e, params=d, bias=c, allowed=mask, allowed_stride=VOCAB // 32)
        times[name] = microseconds(partial(kernels.steer, a, rows, f, 0, steering, b))
    return times


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: needs an NVIDIA GPU")
    kernels = SamplingKernels(GPU.module(SOURCE, defines(HIDDEN)), VOCAB)
    scratch = torch.zeros(kernels.scratch_bytes(rows=3), dtype=torch.uint8, device="cuda")
    control = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device="cuda")
    seed = torch.tensor(seed_words(1), dtype=torch.int32, device="cuda")
    tokens, drafts, verify, head, out = (torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(5))
    table = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)
    norms, hidden = torch.randn(2, HIDDEN, device="cuda"), torch.randn(3, HIDDEN, device="cuda")
    x = torch.empty(3, 2 * HIDDEN, device="cuda")
    a, b, c, d, e, f = (t.data_ptr() for t in (tokens, table, norms[0], hidden, norms[1], x))
    g, h, i, j, k, words = (t.data_ptr() for t in (drafts, verify, head, out, control, seed))
    error, rest = control[ERROR:].data_ptr(), scratch.data_ptr()
    print(torch.cuda.get_device_name())
    print(f"accept {microseconds(partial(kernels.accept, a, g, 2, words, k, h, i, j)):.2f}")
    counted = torch.zeros(VOCAB, dtype=torch.int32, device="cuda")
    control[COUNT] = 3
    print(f"count {microseconds(partial(kernels.count, a, k, counted.data_ptr())):.2f}")
    for rows in (1, 3):
        print(f"T = {rows}")
        print(f"  {'embed':32} {microseconds(partial(kernels.embed, a, b, f, rows)):8.2f}")
        print(f"  {'mtp_inputs':32} {microseconds(partial(kernels.mtp_inputs, a, b, c, d, e, f, rows, 1e-6)):8.2f}")
        for name, time in steering_times(kernels, rows).items():
            print(f"  {name:32} {time:8.2f}")
        for kind in ("peaked", "flat", "equal"):
            given = logits(kind, rows)
            for name, config in CONFIGS.items():
                launch = partial(kernels.sample, given.data_ptr(), rows, config, k, 1, words, [g], error, rest)
                print(f"  {kind + ': ' + name:32} {microseconds(launch):8.2f}")
    assert int(control[ERROR]) == 0


if __name__ == "__main__":
    main()
