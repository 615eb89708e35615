"""A conversation whose history stays in the caches: a turn prefills only what is new.

    session = Session(engine, Tokenizer(directory), ChatTemplate(directory), sampler, mtp_k=2)
    messages = [{"role": "user", "content": "hello"}]
    for piece in session.say(messages, max_new_tokens=200): print(piece.text, end="")
    messages += [session.reply(), {"role": "user", "content": "and now?"}]

Every turn renders the whole conversation. Where its tokens go on from those that the caches hold, only the rest is run.
Where they do not (many templates drop the thinking of earlier turns), everything is run again: cache slots could be
rewound, the recurrent states of GDN layers could not. The tokens of a turn follow from the messages alone, so both run
the same tokens. The logits differ in rounding only, since what was decoded in rounds is then prefilled: on the cpu
target in the last bits of float32, on a GPU by the float16 activations of its prefill. Drafts change neither: a turn
ends in the same place, and the next one is prefilled in the same chunks, whatever K is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from engines import Engine
from export.bindings import GRAPHS
from export.errors import UserError
from runtime.rounds import Round, answer, check_request, open_decoder
from runtime.sampling import Sampler
from runtime.template import ChatTemplate, Message
from runtime.tokenizer import Tokenizer

TOKEN_IDS = "token_ids"  # of a message: what its content was decoded from
MARK = "\ufdd0"  # Unicode keeps it out of any text


class Piece(NamedTuple):
    """What a round adds to the text. It may add nothing yet: a character can be split over tokens."""

    text: str
    round: Round


class Session:
    """One conversation at a time on one engine. thinking: for templates that can switch it. capacity: positions.

    prompt: the tokens of the last turn, up to its answer. reused: how many of them the caches held already; `again`:
    the caches held something, and it was of no use. tokens: all of this turn, the answer included."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampler: Sampler,
        mtp_k: int = 2,
        thinking: bool | None = None,
        capacity: int = 0,
    ) -> None:
        """Raises UserError: a template that has no switch for thinking, too many drafts or positions."""
        if thinking is not None and not template.knows_thinking:
            flag = "--think" if thinking else "--no-think"
            raise UserError(f"{flag}: {template.path} has no `enable_thinking`, thinking cannot be switched; leave it")
        limit = engine.manifest.capacity
        if not 0 <= capacity <= limit:
            raise UserError(f"--capacity {capacity}: expected 1 to {limit}, what the engines were built for")
        check_request(engine, [0], 1, mtp_k)
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.variables = {} if thinking is None else {"enable_thinking": thinking}
        self.capacity = capacity or limit
        engine.load(*GRAPHS[: 4 if mtp_k else 2])
        self.decoder = open_decoder(engine, self.capacity, mtp_k, sampler, continued=True)
        self.prompt: list[int] = []
        self.tokens: list[int] = []
        self.text, self.reused, self.again = "", 0, False
        self.is_known = True  # whether the caches hold tokens[:decoder.position]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as tokens, up to where the next answer begins. The content of a message that brings its
        tokens becomes these, where the template shows it as it is: text can be split into tokens in many ways."""
        plain = [{key: value for key, value in m.items() if key != TOKEN_IDS} for m in messages]
        text = self.template.render(plain, **self.variables)
        ids: list[int] = []
        at = 0
        with_tokens = [i for i, m in enumerate(messages) if m.get(TOKEN_IDS)]
        for start, i in sorted(self._shown(plain, text, with_tokens)):
            ids += [*self.tokenizer.encode(text[at:start]), *messages[i][TOKEN_IDS]]
            at = start + len(plain[i]["content"])
        return ids + self.tokenizer.encode(text[at:])

    def _shown(self, messages: list[dict[str, Any]], text: str, which: list[int]) -> list[tuple[int, int]]:
        """Where in the text the contents of these messages stand, as (start, index), of those that do as they are."""
        if not which:
            return []
        marked = [m | {"content": MARK} if i in which else m for i, m in enumerate(messages)]
        parts = self.template.render(marked, **self.variables).split(MARK)
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
        return self._shown(messages, text, which[:half]) + self._shown(messages, text, which[half:])

    def say(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        update: Callable[[float, float], None] | None = None,
    ) -> Iterator[Piece]:
        """The answer to the conversation, a piece a round, at most as long as the capacity allows. It may be left at
        any piece. update(done, total): the prefill's progress. Raises UserError, and leaves the session as it was: the
        template refuses the messages, they are too long, or not text."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
        prompt = self.encode(messages)
        if len(prompt) >= self.capacity:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, with room for an answer it may have {self.capacity - 1} "
                "(the capacity of the caches, less one); say less or begin a new one"
            )
        room = min(max_new_tokens, self.capacity - len(prompt))
        check_request(self.engine, prompt, room, self.decoder.mtp_k)
        return self._answer(prompt, room, update)

    def _answer(self, prompt: list[int], count: int, update: Callable[[float, float], None] | None) -> Iterator[Piece]:
        held = self.tokens[: self.decoder.position]
        extends = self.is_known and len(prompt) > len(held) and prompt[: len(held)] == held
        self.is_known = False  # whenever the decoder works: it may be interrupted
        self.reused, self.again = (len(held), False) if extends else (0, bool(held))
        if not extends:
            self.decoder.reset()
        self.prompt, self.tokens, self.text = prompt, list(prompt), ""
        stop_ids = self.engine.manifest.config.eos_token_id
        queue: deque[int] = deque()
        stream = self.tokenizer.stream(prompt, _drain(queue))
        for r in answer(self.decoder, prompt[self.reused :], count, stop_ids, update):
            if len(self.tokens) > len(prompt):
                self.decoder.cut(len(r.tokens))
            self.tokens += r.tokens
            spoken = [token for token in r.tokens if token not in stop_ids]
            queue.extend(spoken)
            text = "".join(next(stream) for _ in spoken)
            if len(spoken) < len(r.tokens) or len(self.tokens) == len(prompt) + count:
                text += "".join(stream)  # a character that stays unfinished
            self.text += text
            self.is_known = True
            yield Piece(text, r)
            self.is_known = False
        self.is_known = True

    def reply(self) -> dict[str, Any]:
        """The last answer, or as much of it as was said, as a message for the conversation."""
        stop_ids = self.engine.manifest.config.eos_token_id
        spoken = [token for token in self.tokens[len(self.prompt) :] if token not in stop_ids]
        return {"role": "assistant", "content": self.text, TOKEN_IDS: spoken}


def _drain(queue: deque[int]) -> Iterator[int]:
    while queue:
        yield queue.popleft()
