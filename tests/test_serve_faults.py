"""Whatever goes wrong with one request, the server and the answers of others stay as they are.

pytest tests/test_serve_faults.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from export.errors import UserError
from runtime import app
from runtime.sampling import SamplingConfig
from runtime.session import Request, Session
from runtime.worker import Job
from tests.serving import JSON, Answer, Gate, Running, demo_engines, eventually, open_session, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CODE = "def add_numbers(a, b):\n    "
ENDLESS = {"prompt": CODE, "max_tokens": 900, "logit_bias": {"4091": -100, "4093": -100}, "seed": 1}
CONTROL = {"prompt": CODE, "max_tokens": 20, "temperature": 0}
SLACK = 48 << 20  # bytes: what allocators keep. A leak of one body in a hundred requests would be 100 MiB.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_engines(tmp_path_factory)


@pytest.fixture(scope="module")
def session(demo: Path) -> Session:
    return open_session(demo)


@pytest.fixture
def running(demo: Path, session: Session) -> Iterator[Running]:
    with serve(demo, session, queue=4, max_body=1 << 16) as running:
        yield running


def said(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["text"])


def is_idle(running: Running) -> bool:
    worker = running.service.worker
    return not worker.waiting and worker._running is None


def abort(connection: socket.socket) -> None:
    """Close at once, with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_waiting_gives_up_the_place(
    stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(running.service.session, monkeypatch)
    first = running.send(TEXT, **CONTROL)
    gate.wait()
    waiting = [running.send(TEXT, **CONTROL, stream=stream) for _ in range(3)]
    assert eventually(lambda: running.service.worker.waiting == 3)
    abort(waiting[0])
    waiting[1].close()
    assert eventually(lambda: running.service.worker.waiting == 1)
    gate.let(2)
    for connection in (first, waiting[2]):
        with connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
    assert len(gate.prompts) == 2
    assert eventually(lambda: running.metric("tandem_requests_total", endpoint=TEXT, status="499") == 2)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_the_answer(stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    session = running.service.session
    gate, rounds, verify = Gate(session, monkeypatch), [], session.engine.verify

    left = threading.Event()

    def counted(*args: Any) -> Any:
        if left.is_set():  # a round may be under way as the client leaves, no further one
            job = running.service.worker._running
            assert job and eventually(lambda: job.is_cancelled)
        rounds.append(args)
        return verify(*args)

    monkeypatch.setattr(session.engine, "verify", counted)
    connection = running.send(TEXT, **ENDLESS, stream=stream, mtp_k=0)
    gate.wait()
    gate.let(2)
    if stream:
        assert connection.recv(12) == b"HTTP/1.1 200"
    else:
        assert eventually(lambda: len(rounds) > 1)
    before = len(rounds)
    left.set()
    connection.close()
    assert eventually(lambda: running.service.worker._running is None)
    assert len(rounds) <= before + 2
    left.clear()
    assert said(running.post(TEXT, **CONTROL))


def test_a_stop_does_not_wait_for_bodies(demo: Path) -> None:
    with serve(demo, grace=60) as running:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
            connection.sendall(head.encode())
            assert eventually(lambda: running.service.coming == 1)
            running.stop()
            assert connection.recv(12) == b"HTTP/1.1 503"  # within the 20 seconds, not after the 60


def test_who_leaves_ends_the_prefill(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, worker = running.service.session.engine, running.service.worker
    began, go_on, prefill = threading.Event(), threading.Event(), engine.prefill
    rows = []

    def held(tokens: Any, *args: Any) -> Any:
        rows.append(len(tokens))
        began.set()
        assert go_on.wait(60)
        return prefill(tokens, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", held)
        connection = running.send(TEXT, prompt=[5] * 700, max_tokens=4)
        assert began.wait(60)
        job = worker._running
        connection.close()
        assert job and eventually(lambda: job.is_cancelled)
        go_on.set()
        assert eventually(lambda: is_idle(running))
    assert rows == [256]
    assert said(running.post(TEXT, **CONTROL))


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_one_requests_own(stream: bool, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    session = running.service.session
    before = said(running.post(TEXT, **CONTROL))
    verify = session.engine.verify

    def fail_at(call: int, error: BaseException) -> Callable[..., Any]:
        calls = iter(range(1 << 30))

        def failing(*args: Any) -> Any:
            if next(calls) == call:
                raise error
            return verify(*args)

        return failing

    for call, error, mention in (
        (0, RuntimeError("a mistake"), "log"),
        (3, RuntimeError("a mistake"), "log"),
        (3, UserError("the logits are not finite"), "not finite"),
        (3, MemoryError(), "log"),
        (3, BaseException("a mistake"), "log"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(session.engine, "verify", fail_at(call, error))
            answer = running.post(TEXT, **CONTROL, stream=stream)
        if stream:  # its first token came before
            assert answer.status == 200
            last = json.loads(answer.body.decode().split("\n\n")[-2].removeprefix("data: "))
            assert set(last) == {"error"} and last["error"]["type"] == "server_error"
        else:
            assert answer.status == 500 and answer.error["type"] == "server_error"
        assert mention in answer.body.decode() and "a mistake" not in answer.body.decode()
        assert said(running.post(TEXT, **CONTROL)) == before
    with monkeypatch.context() as patch:
        patch.setattr(session, "answer", lambda *_: raise_now(UserError("no such thing")))
        answer = running.post(TEXT, **CONTROL, stream=stream)
        assert answer.status == 400 and answer.error["message"] == "no such thing"
    with monkeypatch.context() as patch:
        patch.setattr(running.service, "prepare", lambda *_: raise_now(RuntimeError("a mistake")))
        answer = running.post(TEXT, **CONTROL, stream=stream)
        assert answer.status == 500 and answer.error["type"] == "server_error"
    assert said(running.post(TEXT, **CONTROL)) == before


def raise_now(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("queue", [0, 2])
def test_a_full_queue(queue: int, demo: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    with serve(demo, session, queue=queue) as running, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(running.send(TEXT, **CONTROL))]
        gate.wait()
        connections += [stack.enter_context(running.send(TEXT, **CONTROL)) for _ in range(queue)]
        assert eventually(lambda: running.service.worker.waiting == queue)
        assert running.metric("tandem_queue_length") == queue
        for stream in (False, True):
            answer = running.post(TEXT, **CONTROL, stream=stream)
            assert answer.status == 429 and answer.headers["Retry-After"] == "1"
            assert answer.error["code"] == "queue_full" and answer.error["type"] == "rate_limit_error"
        assert running.post(TEXT, prompt="").status == 429  # before anything is read
        gate.let(queue + 2)
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in connections)
        assert said(running.post(TEXT, **CONTROL))


def test_clients_at_once_are_served_in_order(demo: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32, those that find a place get the text that they would get alone, and the others are told to come back."""
    assert session.tokenizer
    clients, places = 32, 19
    prompts = [session.tokenizer.encode(f"def function_{i}(") for i in range(clients)]
    alone = []
    for i, prompt in enumerate(prompts):
        request = Request(SamplingConfig(temperature=1.0, seed=i), 8, mtp_k=0)
        list(session.answer(prompt, request, reuse=False))
        alone.append(session.text)
    gate, asked = Gate(session, monkeypatch), []
    with serve(demo, session, queue=places) as running, ThreadPoolExecutor(clients) as pool:
        worker, submit = running.service.worker, running.service.worker.submit

        def noted(job: Job) -> Job:
            submit(job)
            asked.append(list(job.prompt))
            return job

        monkeypatch.setattr(worker, "submit", noted)
        together = threading.Barrier(clients)

        def ask(i: int) -> Answer:
            together.wait(60)
            return running.post(TEXT, prompt=prompts[i], max_tokens=8, seed=i, stream=bool(i % 2), mtp_k=i % 5)

        answers = [pool.submit(ask, i) for i in range(clients)]
        gate.wait()
        assert eventually(lambda: sum(each.done() for each in answers) == clients - places - 1)
        gate.let(clients)
        served = 0
        for i, each in enumerate(answers):
            answer = each.result()
            if answer.status == 429:
                continue
            parts = answer.events if i % 2 else [answer.json]
            assert "".join(part["choices"][0]["text"] for part in parts) == alone[i]
            served += 1
    assert served == places + 1 and gate.prompts == asked


def test_stopping_turns_away_who_waits(demo: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(session, monkeypatch)
    with serve(demo, session) as running, ThreadPoolExecutor(3) as pool:
        first = pool.submit(running.post, TEXT, **CONTROL)
        gate.wait()
        waiting = [pool.submit(running.post, TEXT, **CONTROL, stream=stream) for stream in (False, True)]
        assert eventually(lambda: running.service.worker.waiting == 2)
        running.stop()
        for each in waiting:
            answer = each.result()
            assert answer.status == 503 and "stopping" in answer.error["message"] and answer.headers["Retry-After"]
        gate.let()
        assert said(first.result())
        running.thread.join(30)
        assert not running.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            running.get("/health")
    assert len(gate.prompts) == 1


def test_no_one_can_be_asked_while_stopping(running: Running) -> None:
    running.service.worker.stop()
    assert running.get("/health").status == 503 and running.get("/health").json == {"status": "stopping"}
    assert running.post(TEXT, **CONTROL).status == 503


def test_bodies_that_do_not_come(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        connection.sendall(head + b'{"prompt"')
        assert connection.recv(12) == b"HTTP/1.1 408"


class Faults:
    """Requests that go wrong, each in a way of its own. `texts`: of those that did not."""

    def __init__(self, running: Running, rng: random.Random) -> None:
        self.running, self.rng, self.texts = running, rng, set[str]()
        self.kinds: tuple[Callable[[], None], ...] = (
            *(self.leave, self.leave_a_stream, self.leave_at_once, self.leave_a_body, self.too_long, self.endless),
            *(self.malformed, self.unknown, self.wrong, self.no_http, self.undeclared, self.none),
        )

    def check(self, status: int, path: str, body: bytes, headers: dict[str, str] = JSON) -> None:
        answer = self.running.ask("POST", path, body, headers)
        assert answer.status in (status, 429), answer
        assert answer.error["message"]

    def leave(self) -> None:
        abort(self.running.send(TEXT, **ENDLESS))

    def leave_a_stream(self) -> None:
        with self.running.send(TEXT, **ENDLESS, stream=True) as connection:
            for _ in range(self.rng.randrange(1, 4)):
                connection.recv(400)

    def leave_at_once(self) -> None:
        self.running.send(TEXT, **CONTROL).close()

    def leave_a_body(self) -> None:
        with socket.create_connection(("127.0.0.1", self.running.port)) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + b" " * self.rng.randrange(900))

    def too_long(self) -> None:
        self.check(413, CHAT, b" " * (1 << 20))

    def endless(self) -> None:
        body: Any = iter([b" " * 30_000] * 30)
        self.check(413, CHAT, body)

    def malformed(self) -> None:
        body = json.dumps(CONTROL).encode()
        self.check(400, TEXT, body[: self.rng.randrange(len(body))] + self.rng.choice((b"", b"\xff", b"[", b"NaN")))

    def unknown(self) -> None:
        self.check(400, TEXT, json.dumps(CONTROL | {"colour": "red"}).encode())

    def wrong(self) -> None:
        field = self.rng.choice(("prompt", "seed", "stop", "stream", "max_tokens", "mtp_k", "logit_bias", "top_p"))
        self.check(400, TEXT, json.dumps(CONTROL | {field: self.rng.choice(({"a": 1}, [[[]]], -7.5))}).encode())

    def no_http(self) -> None:
        with socket.create_connection(("127.0.0.1", self.running.port), timeout=60) as connection:
            connection.sendall(self.rng.randbytes(40) + b"\r\n\r\n")
            assert connection.recv(12) in (b"HTTP/1.1 400", b"")

    def undeclared(self) -> None:
        self.check(415, TEXT, b"{}", {"Content-Type": "text/plain"})

    def none(self) -> None:
        answer = self.running.post(TEXT, **CONTROL)
        if answer.status != 429:
            self.texts.add(said(answer))


def test_a_hundred_faults_leave_nothing_behind(running: Running) -> None:
    process = psutil.Process()
    faults = Faults(running, random.Random(torch.initial_seed()))
    before = said(running.post(TEXT, **CONTROL))

    def all_kinds(rounds: int) -> None:
        kinds = [kind for _ in range(rounds) for kind in faults.kinds][: 100 if rounds > 1 else None]
        faults.rng.shuffle(kinds)
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(kind) for kind in kinds]:
                done.result()
        assert eventually(lambda: is_idle(running) and not running.server.server_state.connections)

    all_kinds(1)  # what is made once is made now
    threads, files, memory = threading.active_count(), process.num_fds(), process.memory_info().rss
    all_kinds(9)
    assert said(running.post(TEXT, **CONTROL)) == before
    assert faults.texts == {before}
    assert eventually(lambda: process.num_fds() <= files), os.listdir("/proc/self/fd")
    assert threading.active_count() == threads
    grown = process.memory_info().rss - memory
    assert grown < SLACK, f"{grown >> 20} MiB"
    assert running.metric("tandem_queue_length") == 0
