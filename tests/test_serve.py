"""The server, over HTTP and the demo's engines: OpenAI's shapes, and the text that a session gives by itself.

pytest tests/test_serve.py
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from export.cli import run
from runtime import serve as command
from runtime import session as session_module
from runtime.app import PAGE_HEADERS
from runtime.fields import RequestError
from runtime.grammar import Grammars
from runtime.requests import parse_chat
from runtime.rounds import Round
from runtime.sampling import SamplingConfig
from runtime.service import Service, Settings
from runtime.session import Request, Session
from tests.serving import JSON, ROOT, Running, demo_engines, open_session, serve
from tests.test_chat import THINKING, template_file

ASKED = [{"role": "user", "content": "Write a function that adds two numbers."}]
CODE = "def add_numbers(a, b):\n    "
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 11}
DRAFTS = (0, 1, 2, 3, 4, "auto")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_engines(tmp_path_factory)


@pytest.fixture(scope="module")
def running(demo: Path) -> Iterator[Running]:
    with serve(demo) as running:
        yield running


@pytest.fixture(scope="module")
def direct(demo: Path) -> Session:
    """On engines of its own, and without drafts: what the server's texts have to be."""
    return open_session(demo, most=0)


def text_of(session: Session, prompt: list[int], count: int, request: dict[str, Any] | None = None, **more: Any) -> str:
    list(session.answer(prompt, Request(SamplingConfig(**(request or {})), count, **more), reuse=False))
    return session.text


def content(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_chat_with_the_openai_client(running: Running, direct: Session) -> None:
    prompt = direct.encode(ASKED)
    wanted = text_of(direct, prompt, 60, SAMPLED)
    with running.client() as client:
        options: dict[str, Any] = {"model": "demo", "messages": ASKED, "max_tokens": 60, "temperature": 0.9}
        options |= {"top_p": 0.95, "seed": 11, "extra_body": {"top_k": 30}}
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert whole.id.startswith("chatcmpl-") and whole.object == "chat.completion" and whole.model == "demo"
    (choice,) = whole.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", wanted)
    assert choice.finish_reason == direct.finish_reason and choice.logprobs is None
    usage = whole.usage
    assert usage and usage.prompt_tokens == len(prompt) and usage.completion_tokens == len(direct.tokens) - len(prompt)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    *parts, last, final = chunks
    assert {chunk.id for chunk in chunks} == {parts[0].id} and parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * len(parts)
    assert last.choices[0].finish_reason == choice.finish_reason and not last.choices[0].delta.content
    assert final.choices == [] and final.usage == usage and last.usage is None


def test_completions_with_the_openai_client(running: Running, direct: Session) -> None:
    assert direct.tokenizer
    prompt = direct.tokenizer.encode(CODE)
    wanted = text_of(direct, prompt, 16)
    with running.client() as client:
        for given in (CODE, [CODE], prompt):
            whole = client.completions.create(model="demo", prompt=given, temperature=0)
            assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
            assert (whole.choices[0].text, whole.choices[0].finish_reason) == (wanted, "length")
            assert whole.usage and whole.usage.prompt_tokens == len(prompt) and whole.usage.completion_tokens == 16
        chunks = list(client.completions.create(model="demo", prompt=CODE, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.object == "text_completion" and chunk.usage is None for chunk in chunks)


CASES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "steered": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "min_p": 0.02,
        "logit_bias": {"300": 5, "13": -100},
    },
    "stopped": {"stop": ["return", "e a"]},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_text_depends_neither_on_drafts_nor_on_streaming(
    case: str, running: Running, direct: Session, demo: Path
) -> None:
    fields = {"messages": ASKED, "max_tokens": 40, **SAMPLED, **CASES[case]}
    sampling = {name: value for name, value in fields.items() if name in SamplingConfig.__dataclass_fields__}
    if bias := sampling.get("logit_bias"):
        sampling["logit_bias"] = tuple((int(token), value) for token, value in bias.items())
    config = direct.engine.manifest.config
    grammars = Grammars(demo, config.vocab_size, config.eos_token_id)
    more = {
        "stop": tuple(fields.get("stop", ())),
        "grammar": grammars.json_schema(SCHEMA) if case == "schema" else None,
    }
    wanted = text_of(direct, direct.encode(ASKED), 40, sampling, **more)
    assert len(wanted) > 15 and (case != "stopped" or direct.finish_reason == "stop")
    drafted = 0
    for mtp_k in DRAFTS:
        whole = running.post("/v1/chat/completions", **fields, mtp_k=mtp_k).json
        assert whole["choices"][0]["message"]["content"] == wanted, mtp_k
        assert whole["choices"][0]["finish_reason"] == direct.finish_reason
        drafted += whole["usage"]["drafted"]
        events = running.post("/v1/chat/completions", **fields, mtp_k=mtp_k, stream=True).events
        assert content(events) == wanted, mtp_k
    assert drafted > 20


def test_the_text_is_that_of_the_command(running: Running, demo: Path) -> None:
    flags = {"--temperature": 0.8, "--seed": 3, "--presence-penalty": 0.4, "--mtp-k": 3, "--max-new-tokens": 30}
    arguments = [str(each) for pair in flags.items() for each in pair]
    shell = [
        sys.executable,
        "-m",
        "runtime.decode",
        "--engines",
        str(demo),
        "--threads",
        "1",
        "--prompt",
        CODE,
        "--json",
    ]
    result = subprocess.run([*shell, *arguments], cwd=ROOT, capture_output=True, timeout=300)
    said = json.loads(result.stdout.decode().splitlines()[-1])
    fields = {"temperature": 0.8, "seed": 3, "presence_penalty": 0.4, "mtp_k": 3, "max_tokens": 30}
    answer = running.post("/v1/completions", prompt=CODE, **fields).json
    assert answer["choices"][0]["text"] == said["text"]
    usage = answer["usage"]
    for name in ("rounds", "drafted", "accepted", "accepted_per_position"):
        assert usage[name] == said[name], name


@pytest.mark.parametrize("seed", range(3))
def test_json_answers_are_of_their_schema(seed: int, running: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    fields = {"messages": ASKED, "max_tokens": 200, "seed": seed}
    choice = running.post("/v1/chat/completions", **fields, response_format=wanted).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    found = json.loads(choice["message"]["content"])
    assert set(found) == {"name", "count"} and isinstance(found["name"], str) and len(found["name"]) <= 8
    assert isinstance(found["count"], int) and 1 <= found["count"] <= 9
    fields |= {"temperature": 0, "logit_bias": {str(token): 0 for token in range(3)}, "frequency_penalty": 1}
    choice = running.post("/v1/chat/completions", **fields, response_format={"type": "json_object"}).json["choices"][0]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("mtp_k", [0, 3])
def test_characters_arrive_whole(mtp_k: int, running: Running) -> None:
    said = "naïve ☃ 漢字 🙂🙃 \u2028 ends"
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": said}}}
    fields = {"messages": ASKED, "response_format": schema, "mtp_k": mtp_k, "seed": 1}
    answer = running.post("/v1/chat/completions", **fields, stream=True)
    texts = [event["choices"][0]["delta"].get("content", "") for event in answer.events]
    assert json.loads("".join(texts)) == said
    assert len(texts) > 5 and not any("\ufffd" in text for text in texts)
    assert answer.body.isascii()


def test_any_bytes_stream_to_the_same_text(running: Running, direct: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are pieces of characters, or no text at all, in rounds of any length."""
    assert direct.tokenizer
    rng, tokenizer = random.Random(torch.initial_seed()), direct.tokenizer
    pieces = [token for token in range(4000) if not tokenizer.bytes_of(token).isascii()]
    pieces += tokenizer.encode("🙂漢é☃ text")
    for _ in range(8):
        tokens = rng.choices(pieces, k=24) + tokenizer.encode("🙂漢 é")

        def scripted(decoder: Any, prompt: list[int], count: int, *_: Any, said: list[int] = tokens) -> Iterator[Round]:
            at = 0
            while at < len(said):
                size = rng.randint(1, 4) if at else 1
                yield Round(len(prompt) + at, (), 0, tuple(said[at : at + size]), 1e-3)
                at += size

        with monkeypatch.context() as patch:
            patch.setattr(session_module, "answer", scripted)
            patch.setattr(running.service.session.decoder, "cut", lambda kept: None)
            fields = {"prompt": CODE, "max_tokens": len(tokens)}
            whole = running.post("/v1/completions", **fields).json["choices"][0]["text"]
            events = running.post("/v1/completions", **fields, stream=True).events
        assert "".join(event["choices"][0]["text"] for event in events) == whole
        assert whole == tokenizer._decode(tokens)


def test_details_tell_which_tokens_were_drafted(running: Running) -> None:
    fields = {"messages": ASKED, "max_tokens": 50, "temperature": 0, "mtp_k": 3, "details": True}
    whole = running.post("/v1/chat/completions", **fields).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = running.post("/v1/chat/completions", **fields, **options).events
    for event in events:
        if event["choices"]:
            said = event["choices"][0]["delta"].get("content", "")
            assert "".join(token["text"] for token in event["tandem"]["tokens"]) == said
    tokens = [token for event in events for token in event["tandem"]["tokens"]]
    assert tokens == whole["tandem"]["tokens"]
    assert "".join(token["text"] for token in tokens) == whole["choices"][0]["message"]["content"]
    assert {token["draft"] for token in tokens} <= {0, 1, 2, 3} and any(token["draft"] for token in tokens)
    counts, usage = events[-1]["tandem"], events[-1]["usage"]
    assert {name: counts[name] for name in counts if "seconds" not in name} | {"tokens": 0} == {
        **{name: whole["tandem"][name] for name in counts if "seconds" not in name},
        "tokens": 0,
    }
    assert usage == whole["usage"] and counts["completion_tokens"] == usage["completion_tokens"]
    assert usage["accepted_per_position"] == counts["accepted_per_position"] and usage["rounds"] == counts["rounds"]
    assert usage["drafted"] == sum(counts["drafted_per_position"]) and usage["accepted"] > 0
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] == usage["drafted"]
    for earlier, later in itertools.pairwise(events):
        assert earlier["tandem"]["completion_tokens"] <= later["tandem"]["completion_tokens"]
    assert counts["prefill_seconds"] > 0 and counts["decode_seconds"] > 0


def test_logprobs_in_chat(running: Running, direct: Session) -> None:
    pieces = list(direct.answer(direct.encode(ASKED), Request(SamplingConfig(**SAMPLED), 80, logprobs=2), reuse=False))
    wanted = [each for piece in pieces for each in piece.round.logprobs if each.token not in (4091, 4093)]
    with running.client() as client:
        options: dict[str, Any] = {"messages": ASKED, "model": "demo", "max_tokens": 80, "temperature": 0.9, "seed": 11}
        options |= {"top_p": 0.95, "extra_body": {"top_k": 30}, "logprobs": True, "top_logprobs": 2}
        choice = client.chat.completions.create(**options).choices[0]
        chunks = list(client.chat.completions.create(**options, stream=True))
    assert choice.logprobs and choice.logprobs.content
    streamed = [each for chunk in chunks if (found := chunk.choices[0].logprobs) for each in found.content or ()]
    assert [each.model_dump() for each in streamed] == [each.model_dump() for each in choice.logprobs.content]
    assert b"".join(bytes(each.bytes or ()) for each in choice.logprobs.content).decode() == choice.message.content
    assert len(wanted) == len(choice.logprobs.content)
    for ours, entry in zip(wanted, choice.logprobs.content, strict=True):
        assert math.isclose(entry.logprob, ours.logprob, abs_tol=1e-4) and entry.logprob <= 0
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.top_logprobs[0].logprob >= entry.logprob
        assert entry.token.encode() == bytes(entry.bytes or ())


def test_logprobs_of_completions(running: Running) -> None:
    with running.client() as client:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": "naïve ☃ 漢字 🙂 end"}}}
        options: dict[str, Any] = {"model": "demo", "prompt": CODE, "seed": 5, "extra_body": {"response_format": form}}
        options["max_tokens"] = 40
        choice = client.completions.create(**options, logprobs=2).choices[0]
        none = client.completions.create(**options).choices[0]
        only = client.completions.create(**options, logprobs=0).choices[0]
    assert choice.text == none.text == only.text and none.logprobs is None
    found = choice.logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) > 12
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob <= max(top.values()) and len(top) in (2, 3)
    assert choice.text == '"naïve ☃ 漢字 🙂 end"' and found.tokens[-1] == '"'
    assert any(token.startswith("bytes:") for token in found.tokens)
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[start:].startswith(token)
    assert only.logprobs and only.logprobs.top_logprobs
    assert [list(top) for top in only.logprobs.top_logprobs] == [[token] for token in found.tokens]


def test_pages_of_other_hosts_read_nothing(demo: Path) -> None:
    """A browser that was led here by another host's name says that name."""
    with serve(demo, names={"localhost", "127.0.0.1", "::1"}) as running:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
            assert running.ask("GET", "/v1/models", headers={"Host": host}).status == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:1", ""):
            for path in ("/v1/models", "/", "/metrics"):
                answer = running.ask("GET", path, headers={"Host": host})
                assert answer.status == 403 and "localhost" in answer.error["message"]


def test_the_model_health_and_the_page(running: Running) -> None:
    with running.client() as client:
        (model,) = client.models.list().data
        assert client.models.retrieve("demo") == model and model.object == "model"
        assert model.model_extra == {
            "tandem": {"mtp_k": 2, "max_mtp_k": 4, "capacity": 1024, "chat": True, "thinking": False}
        }
        with pytest.raises(openai.NotFoundError, match="other"):
            client.models.retrieve("other")
    assert running.get("/health").json == {"status": "ok"}
    for path, kind, mention in (
        ("/", "html", b"<title>"),
        ("/page.css", "css", b"{"),
        ("/page.js", "javascript", b"fetch"),
    ):
        page = running.get(path)
        assert page.status == 200 and kind in page.headers["Content-Type"] and mention in page.body
        assert page.headers["Content-Security-Policy"] == PAGE_HEADERS["Content-Security-Policy"]
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        assert page.headers["X-Content-Type-Options"] == "nosniff" and page.headers["Cache-Control"] == "no-store"
    for path in ("/page", "/../serve.py", "/v1", "/v1/models/", "/page.js/"):
        answer = running.get(path)
        assert answer.status == 404 and answer.error["message"]
    answer = running.get("/v1/chat/completions")
    assert answer.status == 405 and answer.headers["Allow"] == "POST" and "GET" in answer.error["message"]


def test_metrics_count_what_was_done(demo: Path) -> None:
    with serve(demo) as running:
        usage = running.post("/v1/completions", prompt=CODE, temperature=0, max_tokens=30, mtp_k=2).json["usage"]
        running.post("/v1/completions", prompt="")
        running.get("/nowhere")
        text = running.get("/metrics").body.decode()
    for line in (
        'tandem_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'tandem_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'tandem_requests_total{endpoint="other",status="404"} 1.0',
        f"tandem_prompt_tokens_total {usage['prompt_tokens']}.0",
        "tandem_completion_tokens_total 30.0",
        f"tandem_rounds_total {usage['rounds']}.0",
        f'tandem_accepted_total{{position="2"}} {usage["accepted_per_position"][1]}.0',
        "tandem_queue_length 0.0",
        "tandem_time_to_first_token_seconds_count 1.0",
        "tandem_request_seconds_count 1.0",
    ):
        assert line in text.splitlines(), line
    drafted = [float(each) for each in re.findall(r"^tandem_drafted_total\{.*\} (.*)$", text, re.MULTILINE)]
    assert sum(drafted) == usage["drafted"]


def test_keys(demo: Path) -> None:
    with serve(demo, keys=(b"one", b"two")) as running:
        for key in ("one", "two"):
            with running.client(api_key=key) as client:
                assert client.models.list().data
        with running.client(api_key="on") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        for header in ({}, {"Authorization": "one"}, {"Authorization": "Basic one"}, {"Authorization": "Bearer "}):
            answer = running.ask("POST", "/v1/completions", b"{}", JSON | header)
            assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.error["code"] == "invalid_api_key"
        assert running.get("/v1/nowhere").status == 401
        assert [running.get(path).status for path in ("/", "/health", "/metrics")] == [200] * 3


def test_requests_that_are_refused(running: Running) -> None:
    too_long = {"messages": [{"role": "user", "content": "word " * 1100}]}
    answer = running.post("/v1/chat/completions", **too_long)
    assert answer.status == 400 and (answer.error["param"], answer.error["code"]) == (
        "messages",
        "context_length_exceeded",
    )
    answer = running.post("/v1/completions", prompt=[5] * 1024)
    assert answer.status == 400 and (answer.error["param"], answer.error["code"]) == (
        "prompt",
        "context_length_exceeded",
    )
    assert running.post("/v1/completions", prompt=[5] * 1023).json["usage"]["completion_tokens"] == 1
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = running.ask("POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": kind})
        assert answer.status == 415 and "application/json" in answer.error["message"]
    answer = running.ask("POST", "/v1/completions", b" " * ((1 << 20) + 1), JSON)
    assert answer.status == 413 and "1048576" in answer.error["message"]
    chunks: Any = iter([b" " * 70_000] * 40)
    answer = running.ask("POST", "/v1/completions", chunks, JSON)  # in chunks, of no length told
    assert answer.status == 413
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert running.ask("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1}', charset).status == 200
    unusable = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "banana"}}}
    for stream in (False, True):
        answer = running.post("/v1/chat/completions", messages=ASKED, response_format=unusable, stream=stream)
        assert answer.status == 400 and answer.error["param"] == "response_format"
    with running.client() as client:
        with pytest.raises(openai.BadRequestError, match="top_p") as caught:
            client.chat.completions.create(model="demo", messages=ASKED, top_p=2)  # type: ignore[arg-type]
        assert caught.value.param == "top_p"
        with pytest.raises(openai.NotFoundError, match="gpt"):
            client.completions.create(model="gpt", prompt="a")


def test_thinking_is_switched_and_json_has_none(demo: Path, tmp_path: Path) -> None:
    session = open_session(demo, template_file(tmp_path, THINKING))
    config = session.engine.manifest.config
    service = Service(session, Grammars(demo, config.vocab_size, config.eos_token_id), Settings("demo"))
    try:
        assert service.describe()["tandem"]["thinking"]
        seen = {}
        for thinking, form in ((None, "text"), (True, "text"), (False, "text"), (None, "json_object")):
            fields: dict[str, Any] = {"messages": ASKED, "response_format": {"type": form}}
            if thinking is not None:
                fields["chat_template_kwargs"] = {"enable_thinking": thinking}
            seen[thinking, form] = service.prepare(json.dumps(fields).encode(), parse_chat).prompt
        off = session.encode(ASKED, enable_thinking=False)
        assert seen[None, "text"] == seen[True, "text"] == session.encode(ASKED) != off
        assert seen[False, "text"] == seen[None, "json_object"] == off
        late = [*ASKED, {"role": "system", "content": "no"}]
        with pytest.raises(RequestError, match=r"^messages: System message must be at the beginning") as caught:
            service.prepare(json.dumps({"messages": late}).encode(), parse_chat)
        assert caught.value.status == 400
        session.template = None
        with pytest.raises(RequestError, match=r"^messages: .*/v1/completions"):
            service.prepare(json.dumps({"messages": ASKED}).encode(), parse_chat)
    finally:
        service.close()


def test_caches_are_kept_only_if_asked(demo: Path) -> None:
    for reuse in (False, True):
        with serve(demo, reuse=reuse) as running:
            session = running.service.session
            first = running.post("/v1/completions", prompt=CODE, max_tokens=20, temperature=0).json
            assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            going_on = [*session.tokens, 5]
            second = running.post("/v1/completions", prompt=going_on, max_tokens=4, temperature=0).json
            cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == (len(going_on) - 2 if reuse else 0)


class Process:
    """The command itself."""

    def __init__(self, demo: Path, *flags: object) -> None:
        shell = [sys.executable, "-m", "runtime.serve", "--engines", str(demo), "--threads", "1", "--port", "0"]
        self.process = subprocess.Popen(
            [*shell, *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.fullmatch(r"Tandem serves demo at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
        self.url = f"http://127.0.0.1:{found[1]}/v1"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key="none", base_url=self.url, max_retries=0, timeout=60)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answer_finish(number: signal.Signals, demo: Path, direct: Session) -> None:
    wanted = text_of(direct, direct.encode(ASKED), 250, {"temperature": 0}, ignore_stop_ids=False)
    process = Process(demo, "--mtp-k", 1, "--grace", 50)
    with process.client() as client:
        options: dict[str, Any] = {"model": "demo", "messages": ASKED, "max_tokens": 250, "temperature": 0}
        stream = iter(client.chat.completions.create(**options, stream=True))
        chunks = [next(stream)]
        process.process.send_signal(number)
        chunks += list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == direct.finish_reason
    assert process.end() == (0, "", "")


@pytest.mark.parametrize(("grace", "signals"), [(0, [signal.SIGTERM]), (100, [signal.SIGTERM, signal.SIGINT])])
def test_an_answer_that_takes_longer_than_the_grace_is_cut(grace: int, signals: list[int], demo: Path) -> None:
    """A second signal is the end of the grace."""
    process = Process(demo, "--mtp-k", 0, "--grace", grace)
    with process.client() as client:
        options: dict[str, Any] = {"model": "demo", "prompt": CODE, "max_tokens": 30_000, "temperature": 1}
        bias = {"4091": -100, "4093": -100}  # no end
        stream = iter(client.completions.create(**options, logit_bias=bias, stream=True))
        next(stream)
        for number in signals:
            process.process.send_signal(number)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
    assert process.end() == (0, "", "")


def test_bad_starts_are_one_line(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, blank, good = tmp_path / "empty", tmp_path / "blank", tmp_path / "good"
    empty.write_text("\n \n")
    blank.write_text("fine\nnot fine\n")
    good.write_text("one\n\ntwo\n")
    assert command.read_keys(good) == (b"one", b"two")
    none = tmp_path / "none"
    monkeypatch.setattr(command.Server, "run", lambda *_, **__: pytest.fail("it serves"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, mentions in (
            (["--engines", none, "--port", port], (f"--port {port}", "in use")),
            (["--engines", none, "--api-key-file", empty], (empty, "no key")),
            (["--engines", none, "--api-key-file", blank], (blank, "line 2")),
            (["--engines", none, "--api-key-file", none], (none, "No such file")),
            (["--engines", none, "--host", "no.such.host.invalid"], ("--host no.such.host.invalid",)),
            (["--engines", none, "--host", "203.0.113.1"], ("--host 203.0.113.1",)),
            (["--engines", none, "--port", 0], (none, "make engines")),
            (["--engines", demo, "--port", 0, "--mtp-k", 17], ("--mtp-k 17",)),
            (["--engines", demo, "--port", 0, "--mtp-k", -1], ("--mtp-k -1",)),
            (["--engines", demo, "--port", 0, "--capacity", 1 << 20], ("--capacity",)),
            *(([flag, -1], (flag,)) for flag in ("--port", "--queue", "--max-body", "--grace")),
            (["--port", 70_000], ("--port 70000",)),
            (["--grace", "nan"], ("--grace nan",)),
            (["--mtp-k", "most"], ("--mtp-k", "auto")),
            (["--colour", 1], ("--colour",)),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", *map(str, flags)])
            with pytest.raises(SystemExit) as caught:
                run(command.main)
            shown = capsys.readouterr()
            assert caught.value.code == 2, shown.err
            assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ")
            assert all(str(mention) in shown.err for mention in mentions), shown.err
