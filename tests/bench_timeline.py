"""Where the time of a round goes on a GPU, kernel by kernel, as it runs: python -m tests.bench_timeline [DRAFTS ...]

Random weights of demo/qwen3.6-35b-a3b.json. The first thread of every block notes the GPU's clock where it passes a
mark (plugins/marks.cuh), which makes a round some per cent slower. Times are µs after the end of the launch before,
the median over launches of one kind of the first, the median and the last block.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.cuda import CudaEngine
from engines.cuda_model import CudaModel, Options
from plugins.kernels import Module, _check, _driver
from plugins.linear.cuda import Segment
from runtime.bench_cuda import fill, synthetic_engine
from runtime.graph import WHOLE, GraphDecoder
from runtime.sampling import Sampler, SamplingConfig

CONFIG, CONTEXT, WARM_UP, RECORDS = Path("demo/qwen3.6-35b-a3b.json"), 128, 12, 1 << 16
MARKS = ("started", "asked", "waited", "chosen", "staged", "arrived", "multiplied", "ended")
RECORD = np.dtype([("kernel", "u4"), ("rows", "u4"), ("block", "u4"), ("processor", "u4"), ("at", "i8", len(MARKS))])
WAITED, ENDED = MARKS.index("waited"), MARKS.index("ended")
APART = 4000  # ns between two launches of one kernel, at least; more than between the blocks of one
Launch = tuple[str, np.ndarray[Any, Any]]


class TimedModel(CudaModel):
    """A model whose kernels note their marks. names: of launches, by the number that their kernel notes."""

    def __init__(self, *args: Any) -> None:
        self.names = {1: "experts up", 2: "experts down", 3: "GDN mixer", 4: "attention", 5: "attention, joined"}
        self.modules: list[Module] = []
        super().__init__(*args)

    def module(self, source: Path, macros: dict[str, int | str]) -> Module:
        module = super().module(source, {**macros, "TIMELINE": 1})
        if source.name in ("decode.cu", "kernel.cu") and source.parent.name != "sampling":
            self.modules.append(module)
        return module

    def launch(self, name: str, function: Any, *args: Any, **options: Any) -> None:
        if function == self.linear.linear:
            segments: list[Segment] = sorted(args[1], key=lambda segment: int(segment.format))
            self.names[int(segments[0].n) << 4 | len(segments)] = name
        super().launch(name, function, *args, **options)

    def globals(self, name: bytes) -> Iterator[tuple[int, int]]:
        for module in self.modules:
            yield _check(_driver().cuModuleGetGlobal(module._module, name))


def records(model: TimedModel, decoder: GraphDecoder) -> np.ndarray[Any, Any]:
    """Of all blocks of one round."""
    decoder.settle()
    torch.cuda.synchronize()
    for address, size in model.globals(b"mark_count"):
        _check(_driver().cuMemsetD8(address, 0, size))
    for address, size in model.globals(b"mark_records"):
        _check(_driver().cuMemsetD8(address, 0, size))
    decoder.launch(decoder.shape(decoder.mtp_k), WHOLE, 0)
    torch.cuda.synchronize()
    found = []
    for address, size in model.globals(b"mark_records"):
        part = np.zeros(RECORDS, RECORD)
        assert size == part.nbytes
        _check(_driver().cuMemcpyDtoH(part.ctypes.data, address, size))
        found.append(part[part["at"][:, WAITED] > 0])
    return np.concatenate(found)


def launches(model: TimedModel, blocks: np.ndarray[Any, Any]) -> list[Launch]:
    """The blocks of every launch, in order."""
    found = []
    for kernel in np.unique(blocks["kernel"]):
        own = blocks[blocks["kernel"] == kernel]
        own = own[np.argsort(own["at"][:, WAITED])]
        gaps = np.nonzero(np.diff(own["at"][:, WAITED]) > APART)[0] + 1
        found += [(model.names.get(int(kernel), str(kernel)), part) for part in np.split(own, gaps)]
    return sorted(found, key=lambda launch: np.median(launch[1]["at"][:, WAITED]))


def report(all_launches: list[Launch]) -> None:
    table: dict[str, list[tuple[float, dict[str, tuple[float, float, float]]]]] = defaultdict(list)
    before = None
    for name, blocks in all_launches:
        end = int(blocks["at"][:, ENDED].max())
        if before is not None and end:
            marks = {}
            for i, mark in enumerate(MARKS):
                at = (blocks["at"][:, i][blocks["at"][:, i] > 0] - before) / 1e3
                if len(at):
                    marks[mark] = (float(at.min()), float(np.median(at)), float(at.max()))
            processors = len(np.unique(blocks["processor"]))
            label = f"{name}, {blocks['rows'][0]} rows ({len(blocks)} blocks on {processors} multiprocessors)"
            table[label].append(((end - before) / 1e3, marks))
        before = end or before
    for label, found in sorted(table.items(), key=lambda item: -sum(span for span, _ in item[1])):
        spans = [span for span, _ in found]
        print(f"{np.median(spans):8.2f} us x {len(found):>3} = {sum(spans):7.1f}  {label}")
        for mark in MARKS:
            times = [marks[mark] for _, marks in found if mark in marks]
            if times:
                print(f"{mark:>22}: " + " / ".join(f"{value:.2f}" for value in np.median(np.array(times), axis=0)))


def main() -> None:
    plain = synthetic_engine(CONFIG, Options())
    model = TimedModel(plain.manifest.config, plain.model.weights, Options())
    engine = CudaEngine.of(model, plain.manifest)
    for drafts in [int(word) for word in sys.argv[1:]] or [0, 2]:
        capacity = CONTEXT + (WARM_UP + 3) * (drafts + 1)
        decoder = GraphDecoder(engine, capacity, drafts, Sampler(SamplingConfig()), simulate=0.7 if drafts else None)
        fill(engine)
        engine._control(POSITION=CONTEXT, COMMIT=1, HEAD_ROWS=1, HEAD_POSITION=CONTEXT - 1, HEAD_LAST=0)
        for _ in range(WARM_UP):
            decoder.round(drafts)
        found = launches(model, records(model, decoder))
        print(f"{drafts} drafts on {torch.cuda.get_device_name()}: {len(found)} launches")
        report(found)


if __name__ == "__main__":
    main()
