"""The page at /, in a browser: against a server that says what a script has it say, and against the real one.

pytest tests/test_page.py
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio.to_thread
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from runtime.session import Session
from tests.serving import Running, demo_engines, open_session, serve
from tests.test_decode import ROOT

PAGE = ROOT / "runtime" / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install the package chromium (apt install chromium)")

MODEL = {"mtp_k": 2, "max_mtp_k": 4, "capacity": 576, "chat": True, "thinking": False}
HELLO = [[("Hello", 0)], [(",", 1), (" wor", 2), ("ld", 0)], [("\n    ", 1), ("naïve 漢字 🙂", 0)]]
Tokens = Sequence[tuple[str, int]]


def events(rounds: Sequence[Tokens], reason: str | None = "stop", drafts: int = 2) -> list[bytes]:
    """A streamed answer as the server sends it, a piece a round: lists of (text, draft). Without a reason it breaks."""
    drafted, accepted = [0] * drafts, [0] * drafts
    said: list[dict[str, Any]] = []
    done = 0
    for i, tokens in enumerate(rounds):
        done += len(tokens)
        drafted = [n + (i > 0) for n in drafted]
        accepted = [n + any(draft == k for _, draft in tokens) for k, n in enumerate(accepted, 1)]
        tandem = {"tokens": [{"text": text, "draft": draft} for text, draft in tokens], "completion_tokens": done}
        tandem |= {"rounds": i, "drafted_per_position": drafted, "accepted_per_position": accepted}
        tandem |= {"prompt_tokens": 31, "prefill_seconds": 0.05, "decode_seconds": 0.02 * i}
        delta = {"content": "".join(text for text, _ in tokens)}
        said.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "tandem": tandem})
    if reason:
        said.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {"prompt_tokens": 31, "completion_tokens": done, "total_tokens": 31 + done, "rounds": len(rounds) - 1}
        said.append({"choices": [], "usage": usage})
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in said]
    return [*lines, b"data: [DONE]\n\n"] if reason else lines


class Fake:
    """A server whose answers are a script: lists of bytes to send, of Events to wait for, or a Response."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {}
        self.key: str | None = None
        self.script: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.complete, methods=["POST"])]
        routes += [Route(path, self.file) for path in ("/", "/page.css", "/page.js")]
        self.app = Starlette(routes=routes)

    async def file(self, request: Request) -> Response:
        policy = {"Content-Security-Policy": "default-src 'self'"}
        return FileResponse(PAGE / (request.url.path[1:] or "index.html"), headers=policy)

    def refusal(self, request: Request) -> Response | None:
        given = request.headers.get("Authorization", "no key")
        return None if self.key is None or given == f"Bearer {self.key}" else error(401, f"{given}: no")

    async def models(self, request: Request) -> Response:
        data = [{"id": "demo", "object": "model", "tandem": MODEL | self.model}]
        return self.refusal(request) or JSONResponse({"object": "list", "data": data})

    async def complete(self, request: Request) -> Response:
        if refused := self.refusal(request):
            return refused
        self.asked.append(await request.json())
        said = self.script.pop(0)
        return said if isinstance(said, Response) else StreamingResponse(speak(said), media_type="text/event-stream")


async def speak(said: Sequence[bytes | threading.Event]) -> Any:
    for item in said:
        if isinstance(item, bytes):
            yield item
        else:
            await anyio.to_thread.run_sync(item.wait, 60, abandon_on_cancel=True)


def error(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "t", "param": None, "code": None}}, status, headers)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in its queue until the server is there
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def fake_server() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with serving(fake.app) as url:
        yield fake, url


@pytest.fixture
def fake(fake_server: tuple[Fake, str]) -> Fake:
    fake = fake_server[0]
    fake.model, fake.key, fake.script, fake.asked = {}, None, [], []
    return fake


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A fresh page that is not open yet, and afterwards: it asked nobody else, and nothing went wrong unnoticed."""
    context = browser.new_context(base_url=url, **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    hosts: set[str] = set()
    wrong: list[str] = []
    page.on("request", lambda request: hosts.add("/".join(request.url.split("/")[:3])))
    page.on("pageerror", lambda thrown: wrong.append(str(thrown)))
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    try:
        yield page
    finally:
        context.close()
    assert hosts == {url}
    refusals = "Failed to load resource: the server responded with a status of "  # the browser's note on any of them
    assert [text for text in wrong if not text.startswith(refusals)] == []


@pytest.fixture
def page(browser: Browser, fake: Fake, fake_server: tuple[Fake, str]) -> Iterator[Page]:
    with watched(browser, fake_server[1]) as page:
        yield page


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def spans(page: Page) -> list[tuple[str, int, int]]:
    """(text, draft, round) of the last answer's tokens; their classes say the same as the numbers."""
    found = page.locator(".answer").last.locator(".text > span").all()
    for span in found:
        draft = span.get_attribute("data-draft")
        assert span.get_attribute("class") == ("token verified" if draft == "0" else f"token draft draft-{draft}")
    numbers = "spans => spans.map(s => [s.textContent, Number(s.dataset.draft), Number(s.dataset.round)])"
    return [tuple(span) for span in page.locator(".answer").last.locator(".text > span").evaluate_all(numbers)]


def finished(page: Page, count: int = 1) -> None:
    expect(page.locator(".answer .note:not(:empty)")).to_have_count(count)
    expect(page.locator(".answer[aria-busy]")).to_have_count(0)


def figure(page: Page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def test_an_answer_grows_token_by_token(page: Page, fake: Fake) -> None:
    sent = events(HELLO)
    gate, end = threading.Event(), threading.Event()
    fake.script = [[*sent[:2], gate, sent[2], end, *sent[3:]]]
    page.goto("/")
    say(page, "hi")
    answer = page.locator(".answer .text")
    expect(answer).to_have_text("Hello, world")
    expect(page.locator("#per-round")).to_have_text("3.00")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(answer).to_have_text("Hello, world\n    naïve 漢字 🙂", use_inner_text=True)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    end.set()
    finished(page)
    assert spans(page) == [(text, draft, i) for i, tokens in enumerate(HELLO) for text, draft in tokens]
    assert page.locator(".asked .text").inner_text() == "hi"
    figures = {"per-round": "2.50", "rate": "125", "completion": "6 tokens, 2 rounds", "prompt": "31 tokens"}
    assert {name: figure(page, name) for name in figures} == figures
    assert figure(page, "first").endswith(("ms", "s"))
    assert page.locator("#bars").inner_text().split() == ["draft", "1", "100", "%", "draft", "2", "50", "%"]
    assert page.locator(".fill").evaluate_all("bars => bars.map(bar => bar.style.width)") == ["100%", "50%"]
    assert page.locator(".note").inner_text() == "6 tokens · 2.50 per round · 125 per second"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_chunks_may_break_anywhere(newline: bytes, page: Page, fake: Fake) -> None:
    page.add_init_script("""
        const whole = window.fetch;
        const bytes = { transform(chunk, out) { for (const byte of chunk) out.enqueue(new Uint8Array([byte])); } };
        window.fetch = async (...request) => {
            const { body, status, headers } = await whole(...request);
            return new Response(body.pipeThrough(new TransformStream(bytes)), { status, headers });
        };""")
    fake.script = [[b": a comment\n\nevent: x\n".replace(b"\n", newline)]]
    sent = events(HELLO)
    lines = json.dumps(json.loads(sent[0][6:]), indent=1).splitlines()
    sent[0] = "".join(f"data:{' ' * (i % 2)}{line}\n" for i, line in enumerate(lines)).encode() + b"\n"
    fake.script[0] += [event.replace(b"\n", newline) for event in sent]
    page.goto("/")
    say(page, "hi")
    finished(page)
    assert spans(page) == [(text, draft, i) for i, tokens in enumerate(HELLO) for text, draft in tokens]


def test_a_chunk_may_hold_several_rounds(page: Page, fake: Fake) -> None:
    first, second, third, *rest = [json.loads(event[6:]) for event in events(HELLO)[:-1]]
    third["tandem"]["tokens"] = second["tandem"]["tokens"] + third["tandem"]["tokens"]
    third["choices"][0]["delta"]["content"] = "".join(token["text"] for token in third["tandem"]["tokens"])
    said = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in (first, third, *rest)]
    fake.script = [[*said, b"data: [DONE]\n\n"]]
    page.goto("/")
    say(page, "hi")
    finished(page)
    assert spans(page) == [(text, draft, i) for i, tokens in enumerate(HELLO) for text, draft in tokens]


def test_markup_is_text(page: Page, fake: Fake) -> None:
    markup = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;<b>b</b>'
    fake.script = [events([[(markup, 0)], [("</span>", 1), ("<i>", 0)]]), error(400, markup)]
    page.goto("/")
    say(page, markup)
    finished(page)
    assert page.locator(".asked .text").text_content() == markup
    assert page.locator(".answer .text").text_content() == markup + "</span><i>"
    say(page, "again")
    expect(page.get_by_role("alert")).to_have_text(f"400: {markup}")
    assert page.title() == "Tandem" and page.locator("main img, main b, main i, footer img").count() == 0


def test_every_turn_sends_the_conversation(page: Page, fake: Fake) -> None:
    fake.script = [events(HELLO), events([[("yes", 0)]], "length"), events(HELLO)]
    page.goto("/")
    page.get_by_label("Message", exact=True).fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("    two")
    page.keyboard.press("Enter")
    finished(page)
    say(page, "three")
    finished(page, 2)
    text = "Hello, world\n    naïve 漢字 🙂"
    history = [{"role": "user", "content": "one\n    two"}, {"role": "assistant", "content": text}]
    assert fake.asked[0]["messages"] == history[:1]
    assert fake.asked[1]["messages"] == [*history, {"role": "user", "content": "three"}]
    assert page.locator(".note").last.inner_text() == "1 token · cut at its limit"
    assert figure(page, "per-round") == figure(page, "rate") == ""
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#log > *")).to_have_count(0)
    say(page, "four")
    finished(page)
    assert fake.asked[2]["messages"] == [{"role": "user", "content": "four"}]


def test_the_settings_are_sent(page: Page, fake: Fake) -> None:
    fake.script = [events(HELLO), events(HELLO)]
    fake.model = {"mtp_k": "auto", "thinking": True}
    page.goto("/")
    say(page, "a")
    finished(page)
    page.get_by_role("button", name="Settings").click()
    settings = page.get_by_role("dialog", name="Settings")
    drafts = settings.get_by_label("Drafts per round")
    assert drafts.locator("option").all_inner_texts() == ["auto", "0", "1", "2", "3", "4"]
    settings.get_by_label("Temperature").fill("1.25")
    settings.get_by_label("Tokens of an answer, at most").fill("77")
    drafts.select_option("3")
    settings.get_by_label("Seed").fill("")
    settings.get_by_label("System message").fill("Be short.")
    settings.get_by_label("Think before answering").uncheck()
    page.keyboard.press("Escape")
    expect(settings).to_be_hidden()
    say(page, "b")
    finished(page, 2)
    first, second = fake.asked
    common = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}, "details": True}
    chosen = {"temperature": 0.6, "max_tokens": 512, "seed": 0, "mtp_k": "auto"}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    assert first == common | chosen | thinking | {"messages": first["messages"]}
    chosen = {"temperature": 1.25, "max_tokens": 77, "mtp_k": 3, "chat_template_kwargs": {"enable_thinking": False}}
    assert second == common | chosen | {"messages": second["messages"]}
    assert second["messages"][0] == {"role": "system", "content": "Be short."} and len(second["messages"]) == 4


def test_without_a_switch_for_thinking_there_is_none(page: Page, fake: Fake) -> None:
    fake.script = [events(HELLO)]
    page.goto("/")
    say(page, "a")
    finished(page)
    assert "chat_template_kwargs" not in fake.asked[0] and fake.asked[0]["mtp_k"] == 2
    page.get_by_role("button", name="Settings").click()
    assert not page.get_by_label("Think before answering").is_visible()


@pytest.mark.parametrize("way", ["Stop", "Escape"])
def test_stop_keeps_what_was_said(way: str, page: Page, fake: Fake) -> None:
    never = threading.Event()
    fake.script = [[*events(HELLO)[:2], never], events(HELLO)]
    page.goto("/")
    say(page, "one")
    expect(page.locator(".answer .text")).to_have_text("Hello, world")
    if way == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press(way)
    finished(page)
    assert page.locator(".note").inner_text() == "4 tokens · 3.00 per round · 150 per second · stopped"
    assert not page.get_by_role("alert").is_visible()
    page.keyboard.type("two")  # the field has the focus
    page.keyboard.press("Enter")
    finished(page, 2)
    said = [message["content"] for message in fake.asked[1]["messages"]]
    assert said == ["one", "Hello, world", "two"]
    never.set()


def test_stopped_before_the_first_token(page: Page, fake: Fake) -> None:
    never = threading.Event()
    fake.script = [[b": wait\n\n", never], [never]]
    page.goto("/")
    for _ in range(2):
        with page.expect_request("**/completions"):
            say(page, "one")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_label("Message", exact=True)).to_have_value("one")
        expect(page.locator("#log > *")).to_have_count(0)
    assert [len(request["messages"]) for request in fake.asked] in ([1], [1, 1])
    never.set()


def test_a_new_conversation_during_an_answer(page: Page, fake: Fake) -> None:
    never = threading.Event()
    fake.script = [[*events(HELLO)[:2], never], events([[("new", 0)]])]
    page.goto("/")
    say(page, "one")
    expect(page.locator(".answer .text")).to_have_text("Hello, world")
    page.get_by_role("button", name="New conversation").click()
    say(page, "two")
    finished(page)
    assert page.locator(".text").all_inner_texts() == ["two", "new"]
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["two"]
    never.set()


def test_refusals_are_shown_and_the_conversation_kept(page: Page, fake: Fake) -> None:
    broken = [*events(HELLO, reason=None)[:2], b'data: {"error": {"message": "the engine failed"}}\n\n']
    page.goto("/")
    fake.script = [events(HELLO), error(429, "too many requests wait", **{"Retry-After": "7"})]
    fake.script += [
        error(400, "temperature: expected a number from 0 to 2"),
        broken,
        events(HELLO, None),
        events(HELLO),
    ]
    say(page, "one")
    finished(page)
    message, alert = page.get_by_label("Message", exact=True), page.get_by_role("alert")
    say(page, "two")
    expect(alert).to_have_text("429: too many requests wait (again in 7 s)")
    expect(page.locator("#per-round")).to_have_text("2.50")  # of the answer that is there
    expect(message).to_have_value("two")
    page.keyboard.press("Enter")
    expect(alert).to_have_text("400: temperature: expected a number from 0 to 2")
    expect(page.locator("#log > *")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(alert).to_have_text("the engine failed")
    finished(page, 2)
    assert page.locator(".note").last.inner_text().endswith("broken off")
    say(page, "three")
    expect(alert).to_have_text("The connection was closed before the answer ended.")
    finished(page, 3)
    say(page, "four")
    finished(page, 4)
    expect(alert).to_be_hidden()
    said = [message["content"] for message in fake.asked[-1]["messages"]]
    whole = "Hello, world\n    naïve 漢字 🙂"
    assert said == ["one", whole, "two", "Hello, world", "three", whole, "four"]


def test_a_server_that_is_gone(page: Page, fake: Fake) -> None:
    page.goto("/")
    expect(page.locator("#model")).to_have_text("demo")
    page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    say(page, "one")
    expect(page.get_by_role("alert")).to_have_text("502: <h1>Bad gateway</h1>")
    expect(page.get_by_label("Message", exact=True)).to_have_value("one")


def test_the_key_is_asked_for_and_kept_for_the_session(page: Page, fake: Fake) -> None:
    fake.key, fake.script = "secret", [events(HELLO), events(HELLO)]
    page.goto("/")
    field = page.get_by_label("API key")
    expect(page.locator("#key-message")).to_have_text("401: no key: no")
    field.fill("guess")
    page.keyboard.press("Enter")
    expect(page.locator("#key-message")).to_have_text("401: Bearer guess: no")
    expect(field).to_be_focused()
    expect(field).to_have_value("")
    assert page.evaluate("sessionStorage.length") == 0
    field.fill("secret")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_have_text("demo")
    expect(field).to_be_hidden()
    say(page, "one")
    finished(page)
    page.reload()
    expect(page.locator("#model")).to_have_text("demo")
    assert not field.is_visible()
    fake.key = "other"  # the server began anew
    say(page, "two")
    expect(page.locator("#key-message")).to_have_text("401: Bearer secret: no")
    expect(field).to_be_focused()
    field.fill("other")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    finished(page)
    assert page.evaluate("localStorage.length") == 0 and "key" not in page.url


def test_a_model_that_cannot_chat(page: Page, fake: Fake) -> None:
    fake.model = {"chat": False}
    page.goto("/")
    expect(page.get_by_role("alert")).to_contain_text("no chat template")


def test_where_a_token_comes_from(page: Page, fake: Fake) -> None:
    fake.script = [events(HELLO)]
    page.goto("/")
    say(page, "one")
    finished(page)
    origin = page.locator("#origin")
    page.locator(".token", has_text="wor").hover()
    expect(origin).to_have_text("draft 2, round 1")
    page.locator("h1").hover()
    expect(origin).to_be_hidden()
    page.locator(".answer .text").focus()
    seen = []
    for _ in range(7):
        page.keyboard.press("ArrowRight")
        seen.append(origin.inner_text())
    assert seen[:3] == ["verified, prompt", "draft 1, round 1", "draft 2, round 1"]
    assert seen[3:] == ["verified, round 1", "draft 1, round 2", "verified, round 2", "verified, round 2"]
    page.get_by_label("Tint tokens").uncheck()
    clear = page.locator(".token.draft").first.evaluate("token => getComputedStyle(token).backgroundColor")
    assert clear == "rgba(0, 0, 0, 0)"


CONTRAST = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const luminance = (color) => {
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
            const c = byte / 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const root = getComputedStyle(document.documentElement);
    const tints = [1, 2, 3, 4, 5, 6, 7].map((position) => `draft-${position}`);
    const names = ["ink", "quiet", "alert", "paper", "raised", ...tints];
    return Object.fromEntries(names.map((name) => [name, luminance(root.getPropertyValue(`--${name}`))]));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_and_ordered(
    scheme: Any, browser: Browser, fake: Fake, fake_server: tuple[Fake, str]
) -> None:
    with watched(browser, fake_server[1], color_scheme=scheme) as page:
        page.goto("/")
        light = page.evaluate(CONTRAST)
    assert (light["paper"] > light["ink"]) is (scheme == "light")

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light[a], light[b]))
        return (high + 0.05) / (low + 0.05)

    tints = [f"draft-{i}" for i in range(1, 8)]
    pairs = [(text, paper) for text in ("ink", "quiet", "alert") for paper in ("paper", "raised")]
    for text, paper in [*pairs, *(("ink", tint) for tint in tints)]:
        assert contrast(text, paper) >= 4.5, (text, paper, contrast(text, paper))
    steps = [contrast(a, b) for a, b in zip(["paper", *tints], tints, strict=False)]
    lights = [light[name] for name in ("paper", *tints)]
    assert lights == sorted(lights, reverse=scheme == "light") and min(steps) > 1.08, steps


def test_a_phone(browser: Browser, fake: Fake, fake_server: tuple[Fake, str]) -> None:
    line = [("x" * 40, draft) for draft in (1, 2, 0)]
    fake.script = [events([[("a", 0)], *[[*line, ("\n", 0)]] * 40])]
    with watched(browser, fake_server[1], viewport={"width": 360, "height": 640}) as page:
        page.goto("/")
        say(page, "long " * 40 + "w" * 200)
        finished(page)
        for wide in ("document.documentElement", "document.getElementById('scroller')"):
            assert page.evaluate(f"{wide}.scrollWidth - {wide}.clientWidth") == 0
        for control in ("Settings", "New conversation", "Send"):
            assert page.get_by_role("button", name=control).is_visible()
        for new in (".note", "#per-round"):
            expect(page.locator(new)).to_be_in_viewport()


ASKED = "Can you write a Python function named `is_palindrome`?"


class Demo(NamedTuple):
    directory: Path
    session: Session


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = demo_engines(tmp_path_factory)
    return Demo(directory, open_session(directory))


@contextmanager
def opened(browser: Browser, demo: Demo, **settings: Any) -> Iterator[tuple[Page, Running]]:
    """The page of the real server, on the demo's engines."""
    with serve(demo.directory, demo.session, **settings) as running:
        url = f"http://127.0.0.1:{running.port}"
        with watched(browser, url) as page:
            page.goto("/")
            yield page, running


def set_up(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        field = page.locator(f"#{name.replace('_', '-')}")
        if name == "drafts":
            field.select_option(value)
        else:
            field.fill(value)
    page.get_by_role("button", name="Done").click()


def test_the_demo_says_on_the_page_what_it_says(browser: Browser, demo: Demo) -> None:
    with opened(browser, demo) as (page, running):
        bodies: list[Any] = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
        set_up(page, max_tokens="60", seed="4")
        for turn, text in enumerate((ASKED, "Write a class `Stack`."), 1):
            say(page, text)
            finished(page, turn)
            shown, figures = spans(page), {name: figure(page, name) for name in ("per-round", "completion", "prompt")}
            bars = page.locator("#bars").inner_text().split()
            chunks = running.post("/v1/chat/completions", **bodies[-1]).events
            said = [(t["text"], t["draft"], c["tandem"]["rounds"]) for c in chunks for t in c["tandem"]["tokens"]]
            assert shown == said and {draft for _, draft, _ in said} == {0, 1, 2}
            usage, counts = chunks[-1]["usage"], chunks[-1]["tandem"]
            tokens, rounds = usage["completion_tokens"], usage["rounds"]
            assert figures["per-round"] == f"{(tokens - 1) / rounds:.2f}"
            assert figures["completion"] == f"{tokens} tokens, {rounds} rounds"
            assert figures["prompt"] == f"{usage['prompt_tokens']} tokens"
            shares = zip(counts["accepted_per_position"], counts["drafted_per_position"], strict=True)
            assert bars[2::4] == [f"{100 * accepted / drafted:.0f}" for accepted, drafted in shares]
        texts = page.locator(".text").evaluate_all("texts => texts.map(text => text.textContent)")
        assert [message["content"] for message in bodies[1]["messages"]] == texts[:3] and "\n    " in texts[1]


def test_drafts_do_not_change_the_text(browser: Browser, demo: Demo) -> None:
    with opened(browser, demo, mtp_k="auto") as (page, _):
        set_up(page, max_tokens="40", temperature="0.8")
        texts = set()
        for drafts in ("auto", "0", "4"):
            set_up(page, drafts=drafts)
            say(page, ASKED)
            finished(page)
            texts.add(page.locator(".answer .text").text_content())
            found = {draft for _, draft, _ in spans(page)}
            assert drafts == "auto" or max(found) == int(drafts)
            page.get_by_role("button", name="New conversation").click()
        assert len(texts) == 1 and texts.pop()


def test_the_demo_can_be_stopped(browser: Browser, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, answer = threading.Event(), demo.session.answer

    def held(*args: Any) -> Iterator[Any]:
        for i, piece in enumerate(answer(*args)):
            assert i != 6 or gate.wait(60)
            yield piece

    with opened(browser, demo, mtp_k=1) as (page, running):
        set_up(page, max_tokens="0")
        say(page, ASKED)
        expect(page.get_by_role("alert")).to_contain_text("400: max_tokens: expected")
        set_up(page, max_tokens="100")
        with monkeypatch.context() as patch:
            patch.setattr(demo.session, "answer", held)
            page.get_by_role("button", name="Send").click()
            expect(page.locator(".token[data-round='5']").first).to_be_attached()
            page.get_by_role("button", name="Stop").click()
            finished(page)
            gate.set()
        said = page.locator(".answer .text").text_content()
        whole = running.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": ASKED}], temperature=0.6, seed=0
        )
        assert said and whole.json["choices"][0]["message"]["content"].startswith(said)
        say(page, "Write a class `Stack`.")
        finished(page, 2)
        assert spans(page)


def test_the_server_asks_for_a_key(browser: Browser, demo: Demo) -> None:
    with opened(browser, demo, keys=(b"secret",)) as (page, _):
        expect(page.locator("#key-message")).to_contain_text("401: no valid API key")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        set_up(page, max_tokens="3")
        say(page, ASKED)
        finished(page)
        assert page.locator(".note").inner_text().endswith("cut at its limit")
