"""What stands behind the server's endpoints: one session, a queue before it, and what a request becomes on its way in.

service = Service(session, Grammars(directory, vocab_size, stop_ids), Settings("demo"))
ask, prompt, request = service.prepare(body, parse_chat)
job = service.worker.submit(Job(prompt, request, post))
service.close()
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from export.errors import UserError
from runtime.fields import RequestError
from runtime.grammar import Grammar, Grammars
from runtime.metrics import Metrics
from runtime.replies import Counts, Speaker
from runtime.requests import Ask, Served
from runtime.sampling import SettingError
from runtime.session import MtpK, Request, Session
from runtime.worker import Worker

Parse = Callable[[bytes, Served], Ask]


@dataclasses.dataclass(frozen=True)
class Settings:
    """model: the name that clients use. mtp_k: of requests that say nothing. queue: how many may wait. max_body: bytes.
    keys: one of them is needed, if there are any. reuse: whether caches are kept between requests. names: hosts that
    requests may be for; none: any."""

    model: str
    mtp_k: MtpK = 2
    queue: int = 64
    max_body: int = 1 << 20
    keys: Collection[bytes] = ()
    reuse: bool = False
    names: Collection[str] = ()


class Prepared(NamedTuple):
    ask: Ask
    prompt: list[int]
    request: Request


class Service:
    """Shared by the endpoints of one app; `close` it at the end."""

    def __init__(self, session: Session, grammars: Grammars, settings: Settings) -> None:
        assert session.tokenizer
        self.session, self.grammars, self.settings = session, grammars, settings
        config = session.engine.manifest.config
        self.served = Served(settings.model, config.vocab_size, session.decoder.mtp_k)
        self.speaker = Speaker(settings.model, session.tokenizer, config.eos_token_id)
        session.tokenizer.bytes_of(0)  # so that no request waits for what is made at the first call
        self.worker = Worker(session, settings.queue, settings.reuse)
        self.metrics = Metrics(lambda: self.worker.waiting)
        self.stopping = asyncio.Event()
        self.coming = 0  # requests that are not in the queue yet
        self._preparer = ThreadPoolExecutor(1, "prepare")  # one: in the order they came

    def admits(self, authorization: bytes) -> bool:
        """Whether a request with this header may come in."""
        scheme, _, given = authorization.partition(b" ")
        matches = [hmac.compare_digest(key, given.strip()) for key in self.settings.keys]
        return not matches or (scheme.lower() == b"bearer" and any(matches))

    def describe(self) -> dict[str, Any]:
        """The model, as /v1/models lists it."""
        template = self.session.template
        tandem = {
            "mtp_k": self.settings.mtp_k,
            "max_mtp_k": self.served.max_mtp_k,
            "capacity": self.session.capacity,
            "chat": template is not None,
            "thinking": template is not None and template.knows_thinking,
        }
        return {"id": self.served.model, "object": "model", "created": 0, "owned_by": "tandem", "tandem": tandem}

    async def prepare_aside(self, body: bytes, parse: Parse) -> Prepared:
        """`prepare`, without holding up others' answers."""
        return await asyncio.get_running_loop().run_in_executor(self._preparer, self.prepare, body, parse)

    def prepare(self, body: bytes, parse: Parse) -> Prepared:
        """Raises RequestError."""
        ask = parse(body, self.served)
        field = "messages" if ask.messages else "prompt"
        try:
            prompt = self._encode(ask)
        except UserError as error:
            raise RequestError(400, f"{field}: {error}", field) from None
        room = self.session.capacity - len(prompt)
        if not prompt or room < 1:
            raise RequestError(
                400,
                f"{field}: {len(prompt)} tokens, expected 1 to {self.session.capacity - 1}, which leaves room for an "
                f"answer in the {self.session.capacity} positions of this server",
                field,
                "context_length_exceeded" if prompt else None,
            )
        count = room if ask.max_new_tokens is None else min(ask.max_new_tokens, room)
        mtp_k = self.settings.mtp_k if ask.mtp_k is None else ask.mtp_k
        try:
            request = Request(ask.sampling, count, mtp_k, ask.stop, ask.logprobs, self._grammar(ask))
        except SettingError as error:
            raise RequestError(400, f"{error.name}: expected {error.expected}", error.name) from None
        return Prepared(ask, prompt, request)

    def _encode(self, ask: Ask) -> list[int]:
        if not ask.messages:
            return self.speaker.tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else list(ask.prompt)
        template, variables = self.session.template, {}
        if template is None:
            raise UserError("this model was not made to chat; use /v1/completions")
        if ask.thinking is not None and not template.knows_thinking:
            name = "chat_template_kwargs.enable_thinking"
            raise RequestError(400, f"{name}: this model's template has no such switch; leave it out", name)
        if template.knows_thinking and (ask.thinking is not None or ask.format != "text"):
            variables = {"enable_thinking": bool(ask.thinking)}
        try:
            return self.session.encode(ask.messages, **variables)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{template.path}: ")) from None  # a path of ours

    def _grammar(self, ask: Ask) -> Grammar | None:
        if ask.format == "text":
            return None
        try:
            if isinstance(ask.format, str):
                return self.grammars.json_object()
            return self.grammars.json_schema(ask.format)
        except UserError as error:
            raise RequestError(400, f"response_format: {error}", "response_format") from None

    def counts(self, prepared: Prepared) -> Counts:
        mtp_k = prepared.request.mtp_k
        return Counts(len(prepared.prompt), mtp_k if isinstance(mtp_k, int) else self.served.max_mtp_k)

    def close(self) -> None:
        """Ends its threads; what runs is cancelled."""
        self.worker.close()
        self._preparer.shutdown()
