"""The draft/verify loop, eager: the readable truth of what a round does.

    d[1..K] <- the head, first on the rows of the last verify (true hidden states), then chained on its own
    y[0..K] <- main.verify on [last token, d[1..K]]
    t[i]    <- sample(y[i], position of that row's next token, the tokens before it)
    n       <- length of the longest prefix with t[i] == d[i + 1];  emit t[0..n]

A draft is accepted exactly when it equals what the main model samples in that place, so the tokens are those of
plain decoding, whatever K is. Rejected rows leave no trace: attention overwrites their slots, and the GDN layers
commit accepted rows only, at the next call (plugins/gated_delta_net).

    for round in generate(engine, prompt, max_new_tokens=64, mtp_k=2, sampler=sampler): print(round.tokens)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from engines import Engine
from export.bindings import CACHE_BLOCK
from export.errors import UserError
from runtime.auto import AutoK
from runtime.sampling import Floats, Sampler, TokenLogprob, logprob_of
from runtime.steering import GrammarError, Steering

PREFILL_CHUNK = 256  # rows of one main.prefill call
HEAD_CHUNK = 64  # rows that may queue up for the head in rounds without drafts


class Round(NamedTuple):
    """position: index of tokens[0] in the sequence, prompt included. drafts: what the head proposed.
    accepted: how many leading drafts were right. tokens: what was emitted. seconds: wall time. logprobs: of the tokens,
    where they were asked for. The first round of a sequence is its prefill: it has no drafts and emits one token."""

    position: int
    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    seconds: float
    logprobs: tuple[TokenLogprob, ...] = ()


class Decoding(Protocol):
    """One sequence on one engine: a `prefill`, then rounds, then perhaps a further prefill, and so on.

    mtp_k: the most drafts of a round. position: of the last sampled token, which no graph has seen yet; the caches hold
    those before it. logprobs: of the last prefill's or round's tokens, where they were asked for."""

    mtp_k: int
    position: int
    logprobs: list[TokenLogprob]

    def ask(self, sampler: Sampler, steering: Steering | None = None, logprobs: int | None = None) -> None:
        """How tokens are sampled from the next prefill on. logprobs: how many alternatives of each; None: none."""

    def reset(self) -> None:
        """Forget the sequence: the next prefill is its first."""

    def prefill(self, prompt: Sequence[int], update: Callable[[float, float], None] | None = None) -> int:
        """Run tokens through the model from `position` on, in place of the last sampled one, and sample the next."""

    def round(self, count: int, limit: int | None = None) -> tuple[list[int], list[int]]:
        """One round with `count` drafts -> (drafts, the tokens they became: one more than were accepted), of these at
        most `limit`."""

    def cut(self, kept: int) -> None:
        """Take back what the last round emitted beyond its first `kept` tokens: nothing of it is left, but in the
        steering, which ends with the answer."""


class Decoder:
    """The Decoding that is easy to read, for any engine."""

    def __init__(
        self, engine: Engine, capacity: int, mtp_k: int, sampler: Sampler, drafter: Sampler | None = None
    ) -> None:
        """drafter: how drafts are drawn, by default with the sampler's own noise; the text does not depend on it."""
        self.engine, self.mtp_k = engine, mtp_k
        self.capacity = -(-capacity // CACHE_BLOCK) * CACHE_BLOCK
        self.ask(sampler)
        self.drafter = drafter or sampler
        self.reset()

    def ask(self, sampler: Sampler, steering: Steering | None = None, logprobs: int | None = None) -> None:
        self.sampler = self.drafter = sampler
        self.steering, self.alternatives = steering, logprobs
        self.logprobs: list[TokenLogprob] = []

    def reset(self) -> None:
        self.engine.start(self.capacity, window=self.mtp_k + 1)
        self.position = 0  # of the last sampled token, which no graph has seen yet
        self.accepted = 0  # rows of the pending window to commit
        # What the head has not seen: true hidden states and the tokens that followed them.
        self.head_hidden = np.empty((0, self.engine.manifest.config.hidden_size), np.float32)
        self.head_tokens: list[int] = []

    def prefill(self, prompt: Sequence[int], update: Callable[[float, float], None] | None = None) -> int:
        """Run the prompt through the model in chunks and sample the first token. After rounds it goes on at `position`;
        the first call commits what is pending."""
        tokens, begin = np.asarray(prompt, np.int64), self.position
        if self.mtp_k and self.head_tokens:
            following = np.asarray([*self.head_tokens[:-1], tokens[0]], np.int64)
            self.engine.mtp_prefill(following, self.head_hidden, begin - len(following))
        carry = self.head_hidden[:0]
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            hidden, logits = self.engine.prefill(chunk, begin + start, self.accepted)
            self.accepted = 0
            if self.mtp_k:
                # Row p of the head pairs hidden p with token p + 1, so it lags one row behind, across chunks too.
                first = start - len(carry)
                rows = np.concatenate([carry, hidden])
                if len(rows) > 1:
                    self.engine.mtp_prefill(tokens[first + 1 : start + len(chunk)], rows[:-1], begin + first)
                carry = rows[-1:]
            if update:
                update(start + len(chunk), len(tokens))
        self.position = begin + len(tokens)
        self.logprobs = []
        self.last = self._emit(logits[0], self.position)
        self.head_hidden, self.head_tokens = carry, [self.last]
        return self.last

    def _emit(self, logits: Floats, position: int) -> int:
        """The main model's token at a position."""
        token = self.sampler.sample(self.steering.apply(logits) if self.steering else logits, position)
        if self.alternatives is not None:
            self.logprobs.append(logprob_of(logits, token, self.alternatives))
        if self.steering:
            self.steering.push(token)
        return token

    def draft(self, count: int) -> list[int]:
        """Propose the next `count` tokens."""
        if self.steering:
            drafts: list[int] = []
            # Where the grammar cannot go on from a draft, there are fewer: the answer itself may not come there.
            with self.steering.ahead(), contextlib.suppress(GrammarError):
                for draft in self._draft(count, self.steering):
                    drafts.append(draft)
            return drafts
        return list(self._draft(count, None))

    def _draft(self, count: int, steering: Steering | None) -> Iterator[int]:
        if count and len(self.head_tokens) > self.mtp_k + 1:
            self._fill_head(len(self.head_tokens) - 1)
        tokens, hidden = self.head_tokens, self.head_hidden
        row = self.position - len(tokens)
        for i in range(count):
            hidden, logits = self.engine.draft(np.asarray(tokens, np.int64), hidden, row, accepted=len(tokens))
            row += len(tokens)
            found = steering.apply(logits[0]) if steering else logits[0]
            tokens = [self.drafter.sample(found, self.position + 1 + i)]
            yield tokens[0]
            if steering:
                steering.push(tokens[0])

    def _fill_head(self, rows: int) -> None:
        """The first rows that the head has not seen into its cache."""
        tokens, hidden = self.head_tokens, self.head_hidden
        self.engine.mtp_prefill(np.asarray(tokens[:rows], np.int64), hidden[:rows], self.position - len(tokens))
        self.head_tokens, self.head_hidden = tokens[rows:], hidden[rows:]

    def round(self, count: int, limit: int | None = None) -> tuple[list[int], list[int]]:
        """One round with `count` drafts -> (drafts, the tokens they became: one more than were accepted)."""
        count = count if limit is None else min(count, limit - 1)
        drafts = self.draft(count)
        count = len(drafts)
        rows = np.asarray([self.last, *drafts], np.int64)
        hidden, logits = self.engine.verify(rows, self.position, self.accepted)
        self.logprobs = []
        tokens = [self._emit(logits[0], self.position + 1)]
        while len(tokens) <= count and tokens[-1] == drafts[len(tokens) - 1]:
            tokens.append(self._emit(logits[len(tokens)], self.position + 1 + len(tokens)))
        self.accepted = len(tokens)
        if count or not self.mtp_k:
            self.head_hidden, self.head_tokens = hidden[: len(tokens)].copy(), tokens
        else:  # nothing was drafted: the head has not seen its rows yet, and these queue up behind them
            self.head_hidden = np.concatenate([self.head_hidden, hidden])
            self.head_tokens = [*self.head_tokens, *tokens]
        self.position += len(tokens)
        self.last = tokens[-1]
        if len(self.head_tokens) > HEAD_CHUNK:
            self._fill_head(HEAD_CHUNK)
        return drafts, tokens

    def cut(self, kept: int) -> None:
        dropped = self.accepted - kept
        assert kept > 0 and dropped >= 0
        if dropped:  # rows that are not committed yet: enough to commit fewer
            self.accepted, self.position = kept, self.position - dropped
            self.head_hidden, self.head_tokens = self.head_hidden[:-dropped], self.head_tokens[:-dropped]
            self.last = self.head_tokens[-1]


def open_decoder(
    engine: Engine,
    capacity: int,
    mtp_k: int,
    sampler: Sampler,
    drafter: Sampler | None = None,
    continued: bool = False,
) -> Decoding:
    """A Decoder, or on a GPU the one whose rounds are CUDA graphs, which does the same. continued: there will be a
    `cut`, a second prefill, another number of drafts, steering or logprobs; on a GPU a round is then launched only once
    the one before is read."""
    if engine.manifest.target == "cpu":
        return Decoder(engine, capacity, mtp_k, sampler, drafter)
    from runtime.graph import IN_FLIGHT, GraphDecoder  # brings torch, which other targets decode without

    in_flight = 1 if continued else IN_FLIGHT
    return GraphDecoder(cast(Any, engine), capacity, mtp_k, sampler, drafter, in_flight=in_flight)


def check_request(engine: Engine, prompt: Sequence[int], max_new_tokens: int, mtp_k: int) -> None:
    """Raises UserError for what this engine cannot do."""
    manifest = engine.manifest
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= mtp_k < engine.max_rows:
        raise UserError(f"--mtp-k {mtp_k}: expected 0 to {engine.max_rows - 1}")
    if mtp_k and not manifest.has_mtp:
        raise UserError(f"--mtp-k {mtp_k}: this checkpoint has no MTP head; use --mtp-k 0")
    if not prompt:
        raise UserError("the prompt has no tokens; give at least one")
    if wrong := [token for token in prompt if not 0 <= token < manifest.config.vocab_size]:
        raise UserError(f"token id {wrong[0]}: outside the vocabulary (0 to {manifest.config.vocab_size - 1})")
    if len(prompt) + max_new_tokens > manifest.capacity:
        raise UserError(
            f"prompt ({len(prompt)} tokens) plus --max-new-tokens {max_new_tokens} exceeds the cache of "
            f"{manifest.capacity} positions; shorten one of them"
        )


def generate(
    engine: Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    mtp_k: int | AutoK,
    sampler: Sampler,
    stop_ids: Collection[int] = (),
    update: Callable[[float, float], None] | None = None,
    drafter: Sampler | None = None,
) -> Iterator[Round]:
    """Rounds until a stop id, which is emitted, or max_new_tokens. Raises UserError as `check_request`."""
    most = mtp_k if isinstance(mtp_k, int) else mtp_k.most
    check_request(engine, prompt, max_new_tokens, most)
    start = time.perf_counter()
    continued = isinstance(mtp_k, AutoK)
    decoder = open_decoder(engine, len(prompt) + max_new_tokens, most, sampler, drafter, continued)
    opening = time.perf_counter() - start
    rounds = answer(decoder, prompt, max_new_tokens, stop_ids, update, mtp_k)
    first = next(rounds)
    yield first._replace(seconds=first.seconds + opening)
    yield from rounds


def answer(
    decoder: Decoding,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    update: Callable[[float, float], None] | None = None,
    mtp_k: int | AutoK | None = None,
) -> Iterator[Round]:
    """A prefill at the decoder's position, and rounds until a stop id, which is emitted, or max_new_tokens.
    mtp_k: drafts of a round, by default as many as the decoder can."""
    count = decoder.mtp_k if mtp_k is None else mtp_k
    start = time.perf_counter()
    token = decoder.prefill(prompt, update)
    seconds = time.perf_counter() - start
    yield Round(decoder.position, (), 0, (token,), seconds, tuple(decoder.logprobs))
    left = max_new_tokens - 1
    stopped = token in stop_ids
    while left and not stopped:
        start, position = time.perf_counter(), decoder.position + 1
        # Never more than there are places left.
        chosen = count if isinstance(count, int) else count.choose()
        drafts, tokens = decoder.round(chosen, left)
        seconds = time.perf_counter() - start
        if isinstance(count, AutoK) and chosen < left:
            count.record(len(drafts), len(tokens) - 1, seconds)
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
        stopped = end is not None
        emitted = tokens[:end]
        accepted = min(len(tokens) - 1, len(emitted))
        left -= len(emitted)
        logprobs = tuple(decoder.logprobs[: len(emitted)])
        yield Round(position, tuple(drafts), accepted, tuple(emitted), seconds, logprobs)
