"""A server over the demo's engines in a thread of this process, for tests, and plain HTTP to talk to it.

with serve(engines, queue=2) as running: running.post("/v1/completions", prompt="def")
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from engines.build import build
from engines.onnxruntime import OnnxRuntimeEngine
from runtime.grammar import Grammars
from runtime.serve import Server, listen
from runtime.service import Service, Settings
from runtime.session import Session
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer
from tests.test_decode import ROOT

CHECKPOINT = ROOT / "demo" / "checkpoint"
JSON = {"Content-Type": "application/json"}


_built: list[Path] = []


def demo_engines(factory: pytest.TempPathFactory) -> Path:
    """The demo's engine directory, built once in a process."""
    if not _built:
        directory = factory.mktemp("build") / "demo" / "cpu"
        build(CHECKPOINT, directory)
        _built.append(directory)
    return _built[0]


def open_session(directory: Path, template: Path | None = None, capacity: int = 1024, most: int = 4) -> Session:
    engine = OnnxRuntimeEngine(directory, threads=1)
    return Session(engine, Tokenizer(directory), ChatTemplate(template or directory), most, capacity)


@dataclass
class Answer:
    """Of plain HTTP."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, with nothing but its four fields."""
        assert set(self.json) == {"error"} and set(self.json["error"]) == {"message", "type", "param", "code"}
        return dict(self.json["error"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream that came to its end."""
        *parts, end, rest = self.body.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        return [json.loads(part.removeprefix("data: ")) for part in parts]


class Running:
    """A server that runs. port: where."""

    def __init__(self, service: Service, grace: float = 10) -> None:
        self.service = service
        self.server = Server(service, grace)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # not main
        self.server.announce = lambda *_: None  # type: ignore[method-assign]
        self.listener = listen("127.0.0.1", 0)  # connections wait here until the server takes them
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()

    def stop(self) -> None:
        """As a signal does."""
        self.server.should_exit = True

    def close(self) -> None:
        self.stop()
        self.thread.join(30)
        self.service.close()
        assert not self.thread.is_alive()

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, **fields: Any) -> Answer:
        return self.ask("POST", path, json.dumps(fields).encode(), JSON)

    def send(self, path: str, **fields: Any) -> socket.socket:
        """A request whose answer is not waited for. The connection, to be closed or read from."""
        body = json.dumps(fields).encode()
        lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall("\r\n".join((*lines, "", "")).encode() + body)
        return connection

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def serve(directory: Path, session: Session | None = None, grace: float = 10, **settings: Any) -> Iterator[Running]:
    session = session or open_session(directory)
    config = session.engine.manifest.config
    grammars = Grammars(directory, config.vocab_size, config.eos_token_id)
    running = Running(Service(session, grammars, Settings("demo", **settings)), grace)
    try:
        yield running
    finally:
        running.close()


def eventually(condition: Callable[[], bool]) -> bool:
    """For what other threads do soon, and what no event tells."""
    deadline = time.monotonic() + 20
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds


class Gate:
    """Holds up a session's answers: each waits at its beginning until it is let through. prompts: of those begun."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        self.arrived, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self._answer = session.answer
        monkeypatch.setattr(session, "answer", self._wait)

    def _wait(self, prompt: list[int], *args: Any) -> Any:
        self.prompts.append(prompt)
        self.arrived.release()
        assert self.open.acquire(timeout=60)
        return self._answer(prompt, *args)

    def wait(self) -> None:
        """Until an answer has begun."""
        assert self.arrived.acquire(timeout=60)

    def let(self, count: int = 1) -> None:
        self.open.release(count)
