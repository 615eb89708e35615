"""Rounds on a GPU, each one launch: drafts, verify, acceptance and commit captured into a CUDA graph.

Does what runtime.rounds.Decoder does, token for token, over the same kernels; the host only launches the graph and
reads the round's tokens back. A round finds all that it needs on the device, so the next one is launched before this
one is read: the GPU does not wait for the host. `runtime.rounds.open_decoder` makes it for engines on a GPU.

With a grammar a round is three graphs: the masks of its rows depend on the drafts, and the host makes them while the
verify runs.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from engines.cuda import CudaEngine
from engines.cuda_memory import PREFILL_CHUNK
from export.errors import UserError
from plugins.sampling.cuda import CONTROL_WORDS, COUNT, ERROR, seed_words
from runtime.sampling import Sampler, SamplingConfig, TokenLogprob, logprob_of
from runtime.steering import GrammarError, Steering

IN_FLIGHT = 2  # rounds launched and not yet read; each has a graph and a place for its results
MAX_GRAPHS = 64  # kept; a round of another shape than these is captured again
WHOLE, DRAFTS, VERIFY, FINISH = "whole", "drafts", "verify", "finish"  # what a graph holds of a round


class Shape(NamedTuple):
    """What is captured with a round."""

    drafts: int
    sampling: SamplingConfig
    drafting: SamplingConfig
    steered: bool
    masked: bool


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    done: torch.cuda.Event


class GraphDecoder:
    """A runtime.rounds.Decoding. Rounds leave the device a round further than it says, see `settle`; with in_flight=1
    they do not, and only then what they emitted can be cut and continued, drafts be more or fewer than in the round
    before, tokens be steered or their logprobs be had. simulate: a benchmark's acceptance."""

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
        engine.start(capacity, window=mtp_k + 1)
        self.model = engine.model
        b = self.model.buffers
        self.host = [pinned(b.results) for _ in range(in_flight)]
        self.host_drafts, self.host_allowed = pinned(b.drafts), pinned(b.allowed)
        self.graphs: OrderedDict[tuple[Shape, str, int], Graph] = OrderedDict()
        self.position = self.launched = self.read = 0
        self.accepted = 0  # rows of the last round, which the next call commits
        self.head_tokens: list[int] = []  # what followed the rows that the head has not seen
        self.queued: list[int] = []  # the same of earlier rows, of rounds without drafts; they wait in `prefilled`
        self.under_way: Shape | None = None  # of rounds that are launched and not read
        self.ask(sampler)
        self.drafting = _captured(drafter or sampler)
        if b.results.is_cuda:  # a round on its way still writes to `host`
            weakref.finalize(self, torch.cuda.synchronize)

    def ask(self, sampler: Sampler, steering: Steering | None = None, logprobs: int | None = None) -> None:
        assert self.in_flight == 1 or (steering is None and logprobs is None)
        self.settle()
        self.sampling = self.drafting = _captured(sampler)
        self.steering, self.alternatives = steering, logprobs
        self.logprobs: list[TokenLogprob] = []
        self.masked = steering is not None and steering.state is not None
        b, seed = self.model.buffers, sampler.config.seed
        b.seed.copy_(torch.tensor(seed_words(seed), dtype=torch.int32))
        self.steered = b.steering(self.masked) if steering else None
        if steering:
            c = steering.config
            b.penalties.copy_(torch.tensor([c.repetition_penalty, c.presence_penalty, c.frequency_penalty]))
            b.occurrences.copy_(torch.from_numpy(steering.occurrences))
            b.bias.copy_(torch.from_numpy(steering.bias))

    def reset(self) -> None:
        """In place: the captured rounds stay. Cache slots need nothing, they are written before they are read."""
        self.settle()
        for memory in self.model.state.recurrent.values():
            for tensor in memory:
                tensor.zero_()
        self.model.buffers.control.zero_()
        self.position = self.accepted = 0
        self.head_tokens, self.queued = [], []

    # ---- the head's rows ----

    def _append_to_head(self, following: list[int], position: int) -> None:
        """Rows that wait in prefilled.buffers.hidden into the head's cache."""
        b, rows = self.engine.prefilled.buffers, len(following)
        b.next_tokens[:rows].copy_(torch.tensor(following, dtype=torch.int32))
        self.engine._control(POSITION=position)
        self.engine.prefilled.head(rows, 0, 0)
        self.engine._control(POSITION=self.position)

    def _queue(self) -> None:
        """The rows of the last round, which the next verify overwrites, behind those that wait for the head."""
        assert self.in_flight == 1
        b, rows = self.engine.prefilled.buffers, len(self.head_tokens)
        if len(self.queued) + rows > b.rows:
            self._flush()
        start = len(self.queued)
        b.hidden[start : start + rows].copy_(self.model.buffers.hidden[:rows])
        self.queued += self.head_tokens
        self.head_tokens = []

    def _flush(self) -> None:
        if self.queued:
            self._append_to_head(self.queued, self.position - len(self.head_tokens) - len(self.queued))
            self.queued = []

    def prefill(self, prompt: Sequence[int], update: Callable[[float, float], None] | None = None) -> int:
        """Run the prompt through the model in chunks and sample the first token. After rounds it goes on at `position`;
        the first chunk commits what is pending."""
        assert self.in_flight == 1 or not self.position
        engine, model = self.engine, self.model
        prefilled, b, begin = engine.prefilled, model.buffers, self.position
        tokens = torch.tensor(prompt, dtype=torch.int32)
        if self.mtp_k and self.head_tokens:
            self.head_tokens[-1] = prompt[0]
            self._queue()
            self._flush()
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
        if self.masked:
            self._allow([])
        model.sample_first(self.sampling, self.steered)
        self.position, self.accepted, self.last = last, 0, int(b.verify_tokens[0])
        self.head_tokens = [self.last]
        self._check(int(b.control[ERROR]))
        self._emitted([self.last])
        if self.steering:
            b.occurrences[self.last] += 2
        return self.last

    # ---- rounds ----

    def shape(self, drafts: int) -> Shape:
        """Of a round that comes next."""
        steered = self.steered is not None
        return Shape(drafts, self.sampling, self.drafting, steered, self.masked)

    def capture(self, shape: Shape, part: str = WHOLE) -> None:
        """Record the round, once for every place of its results."""
        self.warm_up(shape, part)
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # it could end another decoder, which would wait for the device: not allowed during a capture
        try:
            for place in range(self.in_flight):
                graph = Graph(torch.cuda.CUDAGraph(), torch.cuda.Event())
                with torch.cuda.graph(graph.graph):
                    self.enqueue(shape, part, place)
                self.graphs[shape, part, place] = graph
        finally:
            if collecting:
                gc.enable()
        while len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)

    def warm_up(self, shape: Shape, part: str) -> None:
        """What will be captured once outside of it, in the middle of a sequence, and without a trace."""
        if part != FINISH:
            drafts = 0 if part == VERIFY else shape.drafts
            rows = 0 if part == DRAFTS else shape.drafts + 1
            self.model.warm_up(drafts, self.mtp_k + 1, rows)

    def launch(self, shape: Shape, part: str, place: int) -> None:
        key = shape, part, place
        if key not in self.graphs:
            self.capture(shape, part)
        self.graphs.move_to_end(key)
        self.graphs[key].graph.replay()
        self.graphs[key].done.record()

    def wait(self, shape: Shape, part: str, place: int) -> None:
        """Until what this launch leaves is on the host."""
        self.graphs[shape, part, place].done.synchronize()

    def enqueue(self, shape: Shape, part: str, place: int) -> None:
        model, b = self.model, self.model.buffers
        steering = b.steering(shape.masked) if shape.steered else None
        if part in (WHOLE, DRAFTS):
            for index in range(shape.drafts):  # the first after as many rows as there may be, right ones and others
                model.draft(self.mtp_k + 1, index, shape.drafting, steering)
        if part == DRAFTS:
            self.host_drafts.copy_(b.drafts, non_blocking=True)
        if part in (WHOLE, VERIFY):
            model.verify(shape.drafts + 1, shape.sampling if part == WHOLE else None, steering)
        if part == FINISH:
            model.sample(model.of_rows(shape.sampling, steering), b.logits, shape.drafts + 1)
        if part in (WHOLE, FINISH):
            model.accept(shape.drafts, self.simulate)
            if steering:
                model.count()
            self.host[place].copy_(b.results, non_blocking=True)

    def settle(self) -> None:
        """Wait for the round that is not read yet and drop it. It has committed every row before `position`, so nothing
        is pending any more; the control block is still its own."""
        while self.read < self.launched:
            assert self.under_way
            self.wait(self.under_way, WHOLE, self.read % self.in_flight)
            self.read += 1

    def round(self, count: int, limit: int | None = None) -> tuple[list[int], list[int]]:
        """One round -> (drafts, the tokens they became). Always of `count` drafts; limit cuts what is given back."""
        if self.mtp_k and not count:
            self._queue()
        else:
            self._flush()
        shape = self.shape(count)
        place = self.read % self.in_flight
        if shape.masked:
            self._launch_masked(shape)
            self.wait(shape, FINISH, place)
        else:
            assert self.read == self.launched or shape == self.under_way
            self.under_way = shape
            while self.launched < self.read + self.in_flight:
                self.launch(shape, WHOLE, self.launched % self.in_flight)
                self.launched += 1
            self.wait(shape, WHOLE, place)
            self.read += 1
        rows = self.model.buffers.rows
        control, tokens, drafts = (part.tolist() for part in self.host[place].split([CONTROL_WORDS, rows, rows]))
        self._check(control[ERROR])
        emitted = tokens[: control[COUNT]]
        self.position += len(emitted)
        self.accepted, self.last, self.head_tokens = len(emitted), emitted[-1], list(emitted)
        self._emitted(emitted)
        return drafts[:count][: limit and limit - 1], emitted[:limit]

    def _launch_masked(self, shape: Shape) -> None:
        """The round in three parts: the grammar sees the drafts before the rows are sampled."""
        self._allow([])
        self.launch(shape, DRAFTS, 0)
        self.launch(shape, VERIFY, 0)
        self.wait(shape, DRAFTS, 0)
        self._allow(self.host_drafts[: shape.drafts].tolist())
        self.launch(shape, FINISH, 0)

    def _allow(self, drafts: list[int]) -> None:
        """The masks of a row and of those after each draft, as far as the grammar takes them."""
        assert self.steering and self.steering.state
        self.host_allowed.fill_(-1)  # everything: rows behind a draft against the grammar are never emitted
        state = self.steering.state.copy()
        for row in range(len(drafts) + 1):
            try:
                allowed = state.allowed()
            except GrammarError:
                if not row:
                    raise
                break
            if allowed is not None:
                self.host_allowed[row].numpy()[:] = allowed.view("int32")
            with contextlib.suppress(GrammarError):  # the answer itself may not come there
                if row < len(drafts) and state.push(drafts[row]):
                    continue
            break
        count = len(drafts) + 1
        self.model.buffers.allowed[:count].copy_(self.host_allowed[:count], non_blocking=True)

    def _emitted(self, tokens: list[int]) -> None:
        """What is to be known of the main model's tokens."""
        if self.steering:
            for token in tokens:
                self.steering.push(token)
        if self.alternatives is not None:
            logits = self.model.buffers.logits[: len(tokens)].cpu().numpy()
            self.logprobs = [
                logprob_of(row, token, self.alternatives) for row, token in zip(logits, tokens, strict=True)
            ]

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


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A place on the host for it."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _captured(sampler: Sampler) -> SamplingConfig:
    """What of the settings is captured with a round; the rest lies in device memory."""
    c = sampler.config
    return SamplingConfig(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)
