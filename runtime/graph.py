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

from engines.cuda import CudaEngine
from engines.cuda_memory import PREFILL_CHUNK
from export.errors import UserError
from plugins.sampling.cuda import CONTROL_WORDS, COUNT, ERROR, seed_words
from runtime.sampling import Sampler

IN_FLIGHT = 2  # rounds launched and not yet read; each has a graph and a place for its results


class GraphDecoder:
    """A runtime.rounds.Decoding. Rounds leave the device a round further than it says, see `settle`; with in_flight=1
    they do not, and only then what they emitted can be cut and continued. simulate: a benchmark's acceptance."""

    def __init__(
        self,
        engine: CudaEngine,
        capacity: int,
        mtp_k: int,
        sampler: Sampler,
        drafter: Sampler | None = None,
        simulate: float | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self.engine, self.mtp_k, self.simulate, self.in_flight = engine, mtp_k, simulate, in_flight
        self.sampling, self.drafting = sampler.config, (drafter or sampler).config
        engine.start(capacity, window=mtp_k + 1)
        self.model = engine.model
        self.model.buffers.seed.copy_(torch.tensor(seed_words(self.sampling.seed), dtype=torch.int32))
        results = self.model.buffers.results
        self.host = [
            torch.zeros(results.shape, dtype=results.dtype, pin_memory=results.is_cuda) for _ in range(in_flight)
        ]
        self.graphs: list[tuple[torch.cuda.CUDAGraph, torch.cuda.Event]] = []
        self.position = self.launched = self.read = 0
        self.accepted = 0  # rows of the last round, which the next call commits
        self.head_tokens: list[int] = []  # what followed the rows that the head has not seen
        if results.is_cuda:  # a round on its way still writes to `host`
            weakref.finalize(self, torch.cuda.synchronize)

    def reset(self) -> None:
        """In place: the captured rounds stay. Cache slots need nothing, they are written before they are read."""
        self.settle()
        for memory in self.model.state.recurrent.values():
            for tensor in memory:
                tensor.zero_()
        self.model.buffers.control.zero_()
        self.position = self.accepted = 0
        self.head_tokens = []

    def _append_to_head(self, token: int) -> None:
        """The rows of the last round, or the prompt's last one, into the head's cache; `token` follows them."""
        prefilled, following = self.engine.prefilled, [*self.head_tokens[:-1], token]
        rows = len(following)
        self.engine._control(POSITION=self.position - rows)
        prefilled.buffers.hidden[:rows].copy_(self.model.buffers.hidden[:rows])
        prefilled.buffers.next_tokens[:rows].copy_(torch.tensor(following, dtype=torch.int32))
        prefilled.head(rows, 0, 0)

    def prefill(self, prompt: Sequence[int], update: Callable[[float, float], None] | None = None) -> int:
        """Run the prompt through the model in chunks and sample the first token. After rounds it goes on at `position`;
        the first chunk commits what is pending."""
        assert self.in_flight == 1 or not self.position
        engine, model = self.engine, self.model
        prefilled, b, begin = engine.prefilled, model.buffers, self.position
        tokens = torch.tensor(prompt, dtype=torch.int32)
        if self.mtp_k and self.head_tokens:
            self._append_to_head(prompt[0])
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            rows, hidden = len(chunk), prefilled.buffers.hidden
            engine._control(POSITION=begin + start, COMMIT=0 if start else self.accepted)
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
        last = begin + len(tokens)
        if self.mtp_k:
            b.hidden[:1].copy_(prefilled.buffers.hidden[:1])
        engine._control(POSITION=last, COMMIT=0, HEAD_ROWS=1, HEAD_POSITION=last - 1, HEAD_LAST=0)
        model.sample_first(self.sampling)
        self.position, self.accepted, self.last = last, 0, int(b.verify_tokens[0])
        self.head_tokens = [self.last]
        self._check(int(b.control[ERROR]))
        return self.last

    def capture(self) -> None:
        """Record the round, once for every place of its results."""
        self.model.warm_up(self.mtp_k)
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # it could end another decoder, which would wait for the device: not allowed during a capture
        try:
            for place in range(self.in_flight):
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
            self.wait(self.read % self.in_flight)
            self.read += 1

    def round(self, count: int) -> tuple[list[int], list[int]]:
        """One round -> (drafts, the tokens they became). Always K drafts; `count` cuts what is given back."""
        while self.launched < self.read + self.in_flight:
            self.launch(self.launched % self.in_flight)
            self.launched += 1
        place, rows = self.read % self.in_flight, self.mtp_k + 1
        self.wait(place)
        self.read += 1
        control, tokens, drafts = (part.tolist() for part in self.host[place].split([CONTROL_WORDS, rows, rows]))
        self._check(control[ERROR])
        emitted = tokens[: control[COUNT]]
        self.position += len(emitted)
        self.accepted, self.head_tokens, self.last = len(emitted), emitted, emitted[-1]
        return drafts[:count], emitted[: count + 1]

    def cut(self, kept: int) -> None:
        dropped = self.accepted - kept
        assert kept > 0 and dropped >= 0
        if not dropped:
            return
        assert self.in_flight == 1  # else the next round has committed them
        self.accepted, self.position = kept, self.position - dropped
        self.head_tokens = self.head_tokens[:kept]
        self.last = self.head_tokens[-1]
        self.engine._control(POSITION=self.position, COMMIT=kept, HEAD_ROWS=kept, HEAD_LAST=kept - 1)
        self.model.buffers.verify_tokens[:1] = self.last
        self.model.buffers.head_tokens[kept:] = self.last

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise UserError("the logits are not finite: the checkpoint holds NaN or infinity; download it again")
