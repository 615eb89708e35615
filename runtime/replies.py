"""Answers in the shapes of OpenAI's API, whole or in chunks, and what was counted on the way.

    reply = ChatReply(ask, Speaker("demo", tokenizer, stop_ids), Counts(prompt_tokens=12, positions=2))
    chunk = reply.add(piece)        # of a stream; None where there is nothing to tell yet
    reply.last(done)                # the chunks that end it
    reply.whole(done)               # or all of it as one

Beyond OpenAI: `usage` counts rounds and drafts, and with `details` a `tandem` object tells which tokens were drafted.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.requests import Ask
from runtime.rounds import Round
from runtime.sampling import TokenLogprob
from runtime.session import Piece
from runtime.text import Segment
from runtime.tokenizer import Tokenizer
from runtime.worker import Done

IMPOSSIBLE = -9999.0  # the logarithm of no probability at all: JSON has no infinity


@dataclass(frozen=True)
class Speaker:
    """Who answers. model: its name. stop_ids: tokens that are no part of a text."""

    model: str
    tokenizer: Tokenizer
    stop_ids: Collection[int]


class Counts:
    """What an answer took so far. positions: of drafts in a round, at most."""

    def __init__(self, prompt_tokens: int, positions: int) -> None:
        self.prompt_tokens, self.completion_tokens, self.rounds, self.reused = prompt_tokens, 0, 0, 0
        self.drafted, self.accepted = [0] * positions, [0] * positions
        self.prefill_seconds = self.decode_seconds = 0.0

    def add(self, r: Round) -> None:
        """The first round is the prefill: it emits a token, and counts neither as a round nor as decoding time."""
        if self.completion_tokens == 0:
            self.prefill_seconds = r.seconds
        else:
            self.rounds += 1
            self.decode_seconds += r.seconds
        self.completion_tokens += len(r.tokens)
        for i in range(len(r.drafts)):
            self.drafted[i] += 1
            self.accepted[i] += r.accepted > i

    def usage(self) -> dict[str, Any]:
        drafted, accepted = sum(self.drafted), sum(self.accepted)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "rounds": self.rounds,
            "drafted": drafted,
            "accepted": accepted,
            "accepted_per_position": list(self.accepted),
        }

    def details(self, segments: Sequence[Segment]) -> dict[str, Any]:
        return {
            "tokens": [segment._asdict() for segment in segments],
            "completion_tokens": self.completion_tokens,
            "rounds": self.rounds,
            "drafted_per_position": list(self.drafted),
            "accepted_per_position": list(self.accepted),
            "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }


class Reply:
    """One answer, as it grows. What the two endpoints do alike."""

    prefix = object = chunk_object = ""

    def __init__(self, ask: Ask, speaker: Speaker, counts: Counts) -> None:
        self.ask, self.speaker, self.counts = ask, speaker, counts
        self.head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": speaker.model}
        self.segments: list[Segment] = []
        self.logprobs: list[TokenLogprob] = []
        self.chunks = 0

    def add(self, piece: Piece) -> dict[str, Any] | None:
        """Take a piece -> its chunk, for a stream."""
        self.counts.add(piece.round)
        given = [each for each in piece.round.logprobs if each.token not in self.speaker.stop_ids]
        if not self.ask.stream:
            self.segments += piece.segments
            self.logprobs += given
            return None
        if not (piece.text or given or self.ask.details):
            return None
        logprobs = None if self.ask.logprobs is None else self._logprobs(given)
        return self._chunk(self._delta(piece.text, logprobs, None), piece.segments)

    def last(self, done: Done) -> list[dict[str, Any]]:
        """The chunks that end a stream."""
        self.counts.reused = done.reused
        chunks = [self._chunk(self._delta("", None, done.finish_reason), ())]
        if self.ask.include_usage:
            chunks.append({**self.head, "object": self.chunk_object, "choices": [], "usage": self.counts.usage()})
            if self.ask.details:
                chunks[-1]["tandem"] = self.counts.details(())
        return chunks

    def whole(self, done: Done) -> dict[str, Any]:
        """The answer of a request without `stream`."""
        self.counts.reused = done.reused
        logprobs = None if self.ask.logprobs is None else self._logprobs(self.logprobs)
        text = "".join(segment.text for segment in self.segments)
        choice = {"index": 0, **self._content(text), "logprobs": logprobs, "finish_reason": done.finish_reason}
        result = {**self.head, "object": self.object, "choices": [choice], "usage": self.counts.usage()}
        return result | ({"tandem": self.counts.details(self.segments)} if self.ask.details else {})

    def _chunk(self, choice: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
        self.chunks += 1
        chunk: dict[str, Any] = {**self.head, "object": self.chunk_object, "choices": [choice]}
        if self.ask.include_usage:
            chunk["usage"] = None
        if self.ask.details:
            chunk["tandem"] = self.counts.details(segments)
        return chunk

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        delta = {"role": "assistant"} if not self.chunks else {}
        if not finish_reason:
            delta["content"] = text
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any]:
        entries = [
            {**self._entry(token, logprob), "top_logprobs": [self._entry(*other) for other in top]}
            for token, logprob, top in given
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.speaker.tokenizer.bytes_of(token)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, IMPOSSIBLE), "bytes": list(data)}


class CompletionReply(Reply):
    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.offset = 0  # characters that the tokens so far make
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, given: Sequence[TokenLogprob]) -> dict[str, Any]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in given:
            name, probability = self._name(token), max(logprob, IMPOSSIBLE)
            others = {self._name(other): max(value, IMPOSSIBLE) for other, value in top}
            result["tokens"].append(name)
            result["token_logprobs"].append(probability)
            result["top_logprobs"].append({**others, name: probability})
            result["text_offset"].append(self.offset)
            self.offset += len(self.decoder.decode(self.speaker.tokenizer.bytes_of(token)))
        return result

    def _name(self, token: int) -> str:
        """Its text, or its bytes where they are no text by themselves: names must differ to be keys."""
        data = self.speaker.tokenizer.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
