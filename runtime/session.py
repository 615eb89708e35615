"""Answers from one engine, one after another: tokens in, text out as it comes, with what was said kept in the caches.

    session = Session(engine, Tokenizer(directory), ChatTemplate(directory), mtp_k=2)
    messages = [{"role": "user", "content": "hello"}]
    for piece in session.say(messages, Request(SamplingConfig(), max_new_tokens=200)): print(piece.text, end="")
    messages += [session.reply(), {"role": "user", "content": "and now?"}]

A turn of a conversation renders all of it. Where its tokens go on from those that the caches hold, only the rest is
run. Where they do not (many templates drop the thinking of earlier turns), everything is run again: cache slots could
be rewound, the recurrent states of GDN layers could not. The tokens of a turn follow from the messages alone, so both
run the same tokens. The logits differ in rounding only, since what was decoded in rounds is then prefilled: on the cpu
target in the last bits of float32, on a GPU by the float16 activations of its prefill. Drafts change neither: a turn
ends in the same place, and the next one is prefilled in the same chunks, whatever K is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from engines import Engine
from export.bindings import GRAPHS
from export.errors import UserError
from runtime.auto import MOST, AutoK
from runtime.rounds import Round, answer, check_request, open_decoder
from runtime.sampling import Sampler, SamplingConfig, SettingError, TokenLogprob
from runtime.steering import Steering
from runtime.template import ChatTemplate, Message
from runtime.text import Segment, StopStrings
from runtime.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from runtime.grammar import Grammar

TOKEN_IDS = "token_ids"  # of a message: what its content was decoded from
MARK = "\ufdd0"  # Unicode keeps it out of any text
MAX_LOGPROBS = 20

MtpK = int | Literal["auto"]
Update = Callable[[float, float], None]


@dataclass(frozen=True)
class Request:
    """How an answer is found, and where it ends. mtp_k: drafts of a round, "auto" or at most the session's, which is
    the default. stop: the text ends before the first of these strings. logprobs: how many alternatives to each token, 0
    to 20; None: none at all. ignore_stop_ids: the model's own end is no end."""

    sampling: SamplingConfig
    max_new_tokens: int
    mtp_k: MtpK | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    ignore_stop_ids: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError("max_new_tokens", self.max_new_tokens, "at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise SettingError("logprobs", self.logprobs, f"an integer from 0 to {MAX_LOGPROBS}")
        if "" in self.stop:
            raise SettingError("stop", '""', "a text that is not empty")


class Piece(NamedTuple):
    """What a round adds to the text. It may add nothing yet: a character can be split over tokens, and what may be the
    beginning of a stop string waits."""

    segments: tuple[Segment, ...]
    round: Round

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the round's tokens, where they were asked for."""
        return self.round.logprobs


class Session:
    """One sequence at a time on one engine. mtp_k: the most drafts of a round, and how many it makes if a request says
    nothing else. capacity: positions, by default the engine's. thinking: for templates that can switch it.

    prompt: the tokens of the last turn, up to its answer. reused: how many of them the caches held already; `again`:
    the caches held something, and it was of no use. tokens: all of this turn, the answer included. text: the answer's.
    finish_reason: "stop" after a stop id or string, "length" at the end of the room; None: not finished."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        mtp_k: MtpK = 2,
        capacity: int = 0,
        thinking: bool | None = None,
        continued: bool = True,
    ) -> None:
        """tokenizer: None for tokens without text. continued: as runtime.rounds.open_decoder; without, there is one
        answer and no more. Raises UserError: a template without a switch for thinking, too many drafts or positions."""
        if thinking is not None and not (template and template.knows_thinking):
            flag, path = "--think" if thinking else "--no-think", template.path if template else "this checkpoint"
            raise UserError(f"{flag}: {path} has no `enable_thinking`, thinking cannot be switched; leave it")
        limit = engine.manifest.capacity
        if not 0 <= capacity <= limit:
            raise UserError(f"--capacity {capacity}: expected 1 to {limit}, what the engines were built for")
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.variables = {} if thinking is None else {"enable_thinking": thinking}
        self.capacity, self.mtp_k, self.continued = capacity or limit, mtp_k, continued
        most = most_drafts(engine, mtp_k)
        check_request(engine, [0], 1, most)
        self.auto = AutoK(most)
        engine.load(*GRAPHS[: 4 if most else 2])
        self.decoder = open_decoder(engine, self.capacity, most, Sampler(SamplingConfig()), continued=continued)
        self.prompt: list[int] = []
        self.tokens: list[int] = []
        self.text, self.reused, self.again = "", 0, False
        self.finish_reason: Literal["stop", "length"] | None = None
        self.turn = 0  # answers begun
        self.is_known = True  # whether the caches hold tokens[:decoder.position]

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The conversation as tokens, up to where the next answer begins. The content of a message that brings its
        tokens becomes these, where the template shows it as it is: text can be split into tokens in many ways.
        variables: of the template, beside the session's."""
        assert self.template and self.tokenizer
        variables = self.variables | variables
        plain = [{key: value for key, value in m.items() if key != TOKEN_IDS} for m in messages]
        text = self.template.render(plain, **variables)
        ids: list[int] = []
        at = 0
        with_tokens = [i for i, m in enumerate(messages) if m.get(TOKEN_IDS)]
        for start, i in sorted(self._shown(plain, text, with_tokens, variables)):
            ids += [*self.tokenizer.encode(text[at:start]), *messages[i][TOKEN_IDS]]
            at = start + len(plain[i]["content"])
        return ids + self.tokenizer.encode(text[at:])

    def _shown(
        self, messages: list[dict[str, Any]], text: str, which: list[int], variables: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """Where in the text the contents of these messages stand, as (start, index), of those that do as they are."""
        if not which:
            return []
        assert self.template
        marked = [m | {"content": MARK} if i in which else m for i, m in enumerate(messages)]
        parts = self.template.render(marked, **variables).split(MARK)
        contents = [messages[i]["content"] for i in which]
        joined = "".join(a + b for a, b in zip(parts, [*contents, ""], strict=False))
        if len(parts) == len(which) + 1 and joined == text:
            starts, at = [], 0
            for part, content in zip(parts, contents, strict=False):
                starts.append(at + len(part))
                at += len(part) + len(content)
            return list(zip(starts, which, strict=True))
        if len(which) == 1:
            return []
        half = len(which) // 2  # the template changes some of them: find out which
        halves = which[:half], which[half:]
        return [found for part in halves for found in self._shown(messages, text, part, variables)]

    def say(self, messages: Sequence[Message], request: Request, update: Update | None = None) -> Iterator[Piece]:
        """The answer to the conversation, at most as long as the capacity allows. Raises UserError, and leaves the
        session as it was: as `answer`, or the template refuses the messages, or they are not text."""
        variables = {}
        if request.grammar and self.template and self.template.knows_thinking:
            if self.variables.get("enable_thinking"):
                raise UserError("--think: an answer in JSON has no place for thinking; leave one of them out")
            variables = {"enable_thinking": False}
        prompt = self.encode(messages, **variables)
        if len(prompt) >= self.capacity:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, with room for an answer it may have {self.capacity - 1} "
                "(the capacity of the caches, less one); say less or begin a new one"
            )
        return self.answer(prompt, request, update, room=self.capacity - len(prompt))

    def answer(
        self,
        prompt: Sequence[int],
        request: Request,
        update: Update | None = None,
        reuse: bool = True,
        room: int | None = None,
    ) -> Iterator[Piece]:
        """The answer to a prompt, a piece a round; it may be left at any piece. update(done, total): the prefill's
        progress, which may raise to end it. reuse: what the caches hold of the prompt is not run again. room: tokens
        that an answer may have, fewer than the request says if need be. Raises UserError, and leaves the session as it
        was: the prompt is too long, or holds no token of the vocabulary; too many drafts."""
        count = request.max_new_tokens if room is None else min(room, request.max_new_tokens)
        mtp_k = self.mtp_k if request.mtp_k is None else request.mtp_k
        most = self.decoder.mtp_k
        if mtp_k != "auto" and not 0 <= mtp_k <= most:
            raise SettingError("mtp_k", mtp_k, f"auto, or an integer from 0 to {most}")
        check_request(self.engine, prompt, count, 0)
        if len(prompt) + count > self.capacity:
            raise SettingError("max_new_tokens", count, f"at most {self.capacity - len(prompt)} after this prompt")
        size = self.engine.manifest.config.vocab_size
        if wrong := [token for token, _ in request.sampling.logit_bias if not 0 <= token < size]:
            raise SettingError("logit_bias", wrong[0], f"token ids from 0 to {size - 1}")
        sampler, steering = Sampler(request.sampling), None
        if request.grammar or request.sampling.steers:
            steering = Steering(request.sampling, size, prompt, request.grammar)
        drafts = self.auto if mtp_k == "auto" else mtp_k
        ask = functools.partial(self.decoder.ask, sampler, steering, request.logprobs)
        return self._answer(list(prompt), request, count, drafts, ask, update, reuse)

    def _answer(
        self,
        prompt: list[int],
        request: Request,
        count: int,
        mtp_k: int | AutoK,
        ask: Callable[[], None],
        update: Update | None,
        reuse: bool,
    ) -> Iterator[Piece]:
        self.turn += 1
        turn = self.turn
        ask()
        held = self.tokens[: self.decoder.position]
        extends = reuse and self.is_known and len(prompt) > len(held) and prompt[: len(held)] == held
        self.is_known = False  # whenever the decoder works: it may be interrupted
        self.reused, self.again = (len(held), False) if extends else (0, bool(held))
        if not extends:
            self.decoder.reset()
        self.prompt, self.tokens, self.text, self.finish_reason = prompt, list(prompt), "", None
        stop_ids = () if request.ignore_stop_ids else self.engine.manifest.config.eos_token_id
        detokenizer = Detokenizer(self.tokenizer, prompt) if self.tokenizer else None
        text = StopStrings(request.stop)
        for r in answer(self.decoder, prompt[self.reused :], count, stop_ids, update, mtp_k):
            kept = 0
            for kept, token in enumerate(r.tokens, 1):
                if token in stop_ids:
                    self.finish_reason = "stop"
                elif detokenizer:
                    text.push(Segment(detokenizer.push(token), kept * (kept <= r.accepted)))
                if text.is_over:
                    self.finish_reason = "stop"
                if self.finish_reason:
                    break
            self.tokens += r.tokens[:kept]
            if self.continued and len(self.tokens) > len(prompt) + 1:
                self.decoder.cut(kept)
            if not self.finish_reason and len(self.tokens) == len(prompt) + count:
                self.finish_reason = "length"
            if self.finish_reason and detokenizer:
                text.end(detokenizer.rest())
            segments = tuple(text.take())
            self.text += "".join(segment.text for segment in segments)
            self.is_known = True
            cut = r._replace(tokens=r.tokens[:kept], accepted=min(r.accepted, kept), logprobs=r.logprobs[:kept])
            yield Piece(segments, cut)
            if self.turn != turn:
                raise RuntimeError("another answer has begun: this one cannot go on")
            self.is_known = False
            if self.finish_reason:
                break
        self.is_known = True

    def reply(self) -> dict[str, Any]:
        """The last answer, or as much of it as was said, as a message for the conversation."""
        stop_ids = self.engine.manifest.config.eos_token_id
        spoken = [token for token in self.tokens[len(self.prompt) :] if token not in stop_ids]
        return {"role": "assistant", "content": self.text, TOKEN_IDS: spoken}


def most_drafts(engine: Engine, mtp_k: MtpK) -> int:
    """The most drafts of a round that a session with this K may make."""
    if mtp_k != "auto":
        return mtp_k
    return min(MOST, engine.max_rows - 1) if engine.manifest.has_mtp else 0
