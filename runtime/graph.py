"""Rounds on a GPU, each one launch: drafts, verify, acceptance and commit captured into a CUDA graph.

Does what runtime.rounds.Decoder does, token for token, over the same kernels; the host only launches the graph and
reads the round's tokens back. A round finds all that it needs on the device, so the next one is launched before this
one is read: the GPU does not wait for the host. `runtime.rounds.generate` uses it for engines of the cuda target.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import torch

from engines.cuda import PREFILL_CHUNK, CudaEngine
from export.errors import UserError
from plugins.sampling.cuda import CONTROL_WORDS, COUNT, ERROR, seed_words
from runtime.sampling import Sampler

IN_FLIGHT = 2  # rounds launched and not yet read; each has a graph and a place for its results


class GraphDecoder:
    """One sequence. `prefill` once, then `round` as often as wanted; it leaves the device a round further than it says,
    see `settle`. simulate: a benchmark's acceptance."""

    def __init__(
        self,
        engine: CudaEngine,
        capacity: int,
        mtp_k: int,
        sampler: Sampler,
        drafter: Sampler | None = None,
        simulate: float | None = None,
    ) -> None:
        self.engine, self.mtp_k, self.simulate = engine, mtp_k, simulate
        self.sampling, self.drafting = sampler.config, (drafter or sampler).config
        engine.start(capacity, window=mtp_k + 1)
        self.model = engine.model
        self.model.buffers.seed.copy_(torch.tensor(seed_words(self.sampling.seed), dtype=torch.int32))
        results = self.model.buffers.results
        self.host = [
            torch.zeros(results.shape, dtype=results.dtype, pin_memory=results.is_cuda) for _ in range(IN_FLIGHT)
        ]
        self.graphs: list[tuple[torch.cuda.CUDAGraph, torch.cuda.Event]] = []
        self.position = self.launched = self.read = 0
        if results.is_cuda:  # a round on its way still writes to `host`
            weakref.finalize(self, torch.cuda.synchronize)

    def prefill(self, prompt: Sequence[int], update: Callable[[float, float], None] | None = None) -> int:
        """Run the prompt through the model in chunks and sample the first token."""
        engine, model = self.engine, self.model
        prefilled, b = engine.prefilled, model.buffers
        tokens = torch.tensor(prompt, dtype=torch.int32)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            rows, hidden = len(chunk), prefilled.buffers.hidden
            engine._control(POSITION=start, COMMIT=0)
            prefilled.buffers.tokens[:rows].copy_(chunk)
            prefilled.main(rows)
            if self.mtp_k:
                # Row p of the head pairs hidden p with token p + 1, so it lags one row behind, across chunks too.
                first = 0 if start else 1
                count = rows - first
                if count:
                    following = tokens[start + first : start + rows]
                    prefilled.buffers.next_tokens[:count].copy_(following)
                    prefilled.head(count, first, first - 1)
                hidden[:1].copy_(hidden[rows : rows + 1])
            if update:
                update(start + rows, len(tokens))
        last = len(tokens)
        if self.mtp_k:
            b.hidden[:1].copy_(prefilled.buffers.hidden[:1])
        engine._control(POSITION=last, COMMIT=0, HEAD_ROWS=1, HEAD_POSITION=last - 1, HEAD_LAST=0)
        model.sample_first(self.sampling)
        self.position, self.last = last, int(b.verify_tokens[0])
        self._check(int(b.control[ERROR]))
        return self.last

    def capture(self) -> None:
        """Record the round, once for every place of its results."""
        self.model.warm_up(self.mtp_k)
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # it could end another decoder, which would wait for the device: not allowed during a capture
        try:
            for place in range(IN_FLIGHT):
                self.graphs.append((torch.cuda.CUDAGraph(), torch.cuda.Event()))
                with torch.cuda.graph(self.graphs[place][0]):
                    self.enqueue(place)
        finally:
            if collecting:
                gc.enable()

    def launch(self, place: int) -> None:
        if not self.graphs:
            self.capture()
        graph, done = self.graphs[place]
        graph.replay()
        done.record()

    def wait(self, place: int) -> None:
        """Until the results of the round launched last for `place` are on the host."""
        self.graphs[place][1].synchronize()

    def enqueue(self, place: int) -> None:
        self.model.round(self.mtp_k, self.sampling, self.drafting, self.simulate)
        self.host[place].copy_(self.model.buffers.results, non_blocking=True)

    def settle(self) -> None:
        """Wait for the round that is not read yet and drop it. It has committed every row before `position`, so nothing
        is pending any more; the control block is still its own."""
        while self.read < self.launched:
            self.wait(self.read % IN_FLIGHT)
            self.read += 1

    def round(self, count: int) -> tuple[list[int], list[int]]:
        """One round -> (drafts, the tokens they became). Always K drafts; `count` cuts what is given back."""
        while self.launched < self.read + IN_FLIGHT:
            self.launch(self.launched % IN_FLIGHT)
            self.launched += 1
        place, rows = self.read % IN_FLIGHT, self.mtp_k + 1
        self.wait(place)
        self.read += 1
        control, tokens, drafts = (part.tolist() for part in self.host[place].split([CONTROL_WORDS, rows, rows]))
        self._check(control[ERROR])
        emitted = tokens[: control[COUNT]]
        self.position += len(emitted)
        return drafts[:count], emitted[: count + 1]

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise UserError("the logits are not finite: the checkpoint holds NaN or infinity; download it again")
