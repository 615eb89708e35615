"""A conversation is what it would be from scratch, whatever is drafted, kept in caches, cut or interrupted.

pytest tests/test_chat.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from engines.manifest import Manifest
from engines.onnxruntime import OnnxRuntimeEngine
from export.errors import UserError
from runtime import chat, rounds, session
from runtime.grammar import Grammars
from runtime.rounds import Decoder, Round
from runtime.sampling import Sampler, SamplingConfig
from runtime.session import MtpK, Piece, Request, Session
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer
from tests.conftest import Build
from tests.reference import Reference
from tests.test_decode import ROOT, describe_all, refused
from tests.test_model import GREEDY, prompt_of

CHECKPOINT = ROOT / "demo" / "checkpoint"
ASKED = (
    "Write a function that adds two numbers.",
    "Can you write a Python function named `is_palindrome`?",
    "Write a class `Stack` with push and pop.",
)
SAMPLED = Sampler(SamplingConfig(temperature=1.0, top_k=20, top_p=0.95, seed=3))
# Thinking is switched, and dropped from earlier turns, as in Qwen's own templates.
THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' }}
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
OTHERS = """\
{{ bos_token }}|{{ eos_token }}|{{ messages | tojson(indent=1) }} {{ dict(a='<é>') | tojson }} {{ strftime_now('%Y') }}
{% for message in messages %}
  {% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}{% endif %}
  {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
    >{% endif %}
"""


@pytest.fixture(scope="module")
def engine(demo: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(demo, threads=1)


class Talk(Session):
    """A session whose requests are all sampled the same."""

    sampling: SamplingConfig
    tokenizer: Tokenizer
    template: ChatTemplate

    def request(self, count: int) -> Request:
        return Request(self.sampling, count)

    def ask(self, messages: list[dict[str, Any]], count: int) -> Iterator[Piece]:
        return self.say(messages, self.request(count))


def open_session(
    engine: OnnxRuntimeEngine, sampler: Sampler = GREEDY, mtp_k: MtpK = 2, template: Path | None = None, **options: Any
) -> Talk:
    directory = engine.directory
    talk = Talk(engine, Tokenizer(directory), ChatTemplate(template or directory), mtp_k, **options)
    talk.sampling = sampler.config
    return talk


def template_file(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "chat_template.jinja").write_text(text)
    return directory


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def turns(talk: Talk, count: int = 40) -> list[tuple[list[dict[str, Any]], list[int], int]]:
    """The messages of every turn, its answer's tokens, and how many tokens the caches held of its prompt."""
    messages: list[dict[str, Any]] = []
    seen = []
    for text in ASKED:
        messages = [*messages, user(text)]
        pieces = list(talk.ask(messages, count))
        assert "".join(piece.text for piece in pieces) == talk.text
        assert [token for piece in pieces for token in piece.round.tokens] == talk.tokens[len(talk.prompt) :]
        seen.append((messages, talk.tokens[len(talk.prompt) :], talk.reused))
        messages = [*messages, talk.reply()]
    return seen


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("hello")],
    [{"role": "system", "content": "Be brief.\n"}, user("  a <b> & 'c' é 漢字\n")],
    [user("a"), {"role": "assistant", "content": "thinking\n</think>\n\nyes "}, user("b")],
    [user("a"), {"role": "assistant", "content": ""}, user("b"), {"role": "assistant", "content": "c"}, user("d")],
]


@pytest.mark.parametrize("template", [None, THINKING, OTHERS], ids=["demo", "thinking", "others"])
def test_rendering_is_that_of_transformers(template: str | None, tmp_path: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    shutil.copy(CHECKPOINT / "tokenizer_config.json", tmp_path)
    ours = ChatTemplate(template_file(tmp_path, template) if template else CHECKPOINT)
    theirs.chat_template = template or theirs.chat_template
    if template == OTHERS:
        theirs.bos_token = "<s>"
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": {"content": "<s>"}}))
        ours = ChatTemplate(tmp_path)
    assert ours.knows_thinking == (template == THINKING)
    for messages in CONVERSATIONS:
        for options in ({}, {"enable_thinking": False}, {"tools": [{"type": "function"}]}):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            assert ours.render(messages, **options) == wanted


def test_where_templates_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert ChatTemplate(tmp_path).render([]) == "one"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(tmp_path).render([]) == "two"
    assert ChatTemplate(template_file(tmp_path, "three")).render([]) == "three"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "chat_template.jinja: line 1"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(_a=1) %}", "_a"),
    ],
)
def test_templates_that_fail(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate(template_file(tmp_path, template)).render([user("a")])


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_turns_equal_the_same_conversation_from_scratch(sampler: Sampler, engine: OnnxRuntimeEngine) -> None:
    """Its prefill in other chunks differs in the last bits of the logits, which is no token here."""
    seen = turns(open_session(engine, sampler))
    assert all(reused > 40 for _, _, reused in seen[1:])
    for messages, tokens, _ in seen:
        fresh = open_session(engine, sampler)
        list(fresh.ask(messages, 40))
        assert fresh.reused == 0 and not fresh.again
        assert fresh.tokens[len(fresh.prompt) :] == tokens


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_conversation_does_not_depend_on_drafts(sampler: Sampler, engine: OnnxRuntimeEngine) -> None:
    """Nor does what the caches hold after it: a round that goes past a stop id is cut there."""
    plain = turns(open_session(engine, sampler, mtp_k=0), 60)
    assert any(len(tokens) < 60 for _, tokens, _ in plain)
    choices: tuple[MtpK, ...] = (1, 3, "auto")
    for mtp_k in choices:
        assert turns(open_session(engine, sampler, mtp_k=mtp_k), 60) == plain


@pytest.mark.parametrize("mtp_k", [1, 3])
def test_a_stop_id_inside_a_round(mtp_k: int, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every newline is one: rounds are cut in many places, and the next turn finds what it would without drafts."""
    newline = Tokenizer(engine.directory).encode("\n    ")[0]
    config = dataclasses.replace(engine.manifest.config, eos_token_id=(newline,))
    monkeypatch.setattr(engine, "manifest", dataclasses.replace(engine.manifest, config=config))
    dropped = 0
    cut = Decoder.cut

    def counted(self: Decoder, kept: int) -> None:
        nonlocal dropped
        dropped += self.accepted - kept
        cut(self, kept)

    monkeypatch.setattr(Decoder, "cut", counted)
    plain = [turns(open_session(engine, sampler, mtp_k=0)) for sampler in (GREEDY, SAMPLED)]
    assert not dropped
    assert [turns(open_session(engine, sampler, mtp_k=mtp_k)) for sampler in (GREEDY, SAMPLED)] == plain
    assert dropped, "no round went past a stop id: the test shows nothing"


def test_a_template_that_drops_thinking_starts_over(engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    options: dict[str, Any] = {"template": template_file(tmp_path, THINKING)}
    talk = open_session(engine, thinking=False, **options)
    messages: list[dict[str, Any]] = [user(ASKED[0])]
    list(talk.ask(messages, 20))
    messages += [talk.reply(), user(ASKED[1])]
    list(talk.ask(messages, 20))  # "<think>\n\n</think>" is gone from the first turn
    assert talk.reused == 0 and talk.again
    fresh = open_session(engine, thinking=False, **options)
    list(fresh.ask(messages, 20))
    assert fresh.tokens == talk.tokens and not fresh.again
    with pytest.raises(UserError, match=r"--no-think: .*enable_thinking"):
        open_session(engine, thinking=False)


def test_json_is_not_thought_about(engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    """A template that knows thinking is told that there is none."""
    config = engine.manifest.config
    grammar = Grammars(engine.directory, config.vocab_size, config.eos_token_id).json_object()
    request = Request(SamplingConfig(frequency_penalty=0.5), 30, grammar=grammar)
    template = template_file(tmp_path, THINKING)
    talk = open_session(engine, template=template)
    list(talk.say([user("a")], request))
    assert talk.prompt == talk.encode([user("a")], enable_thinking=False) != talk.encode([user("a")])
    assert talk.text.startswith("{")
    with pytest.raises(UserError, match="--think"):
        open_session(engine, template=template, thinking=True).say([user("a")], request)


def test_tokens_stand_for_the_content_only_where_it_is_shown(engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    talk = open_session(engine, template=template_file(tmp_path, THINKING))
    spelled = [talk.tokenizer.encode(letter)[0] for letter in "spelled"]
    said = [{"role": "assistant", "content": text, "token_ids": spelled} for text in ("a</think>spelled", "spelled")]
    plain = [{"role": "assistant", "content": m["content"]} for m in said]
    for i in (0, 1):
        messages: list[Any] = [user("a"), (said if i else plain)[1], user("b"), said[0], user("c"), said[1], user("d")]
        found = ["".join(map(str, spelled)) in "".join(map(str, talk.encode(messages[:n]))) for n in (3, 5, 7)]
        assert found == [bool(i), bool(i), True]
    reference: list[Any] = [user("a"), plain[1], user("b"), plain[0], user("c")]
    assert talk.encode(reference) == talk.tokenizer.encode(talk.template.render(reference))


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_an_interrupted_answer_stays_as_it_is(pieces: int, engine: OnnxRuntimeEngine) -> None:
    talk = open_session(engine, SAMPLED)
    messages: list[dict[str, Any]] = [user(ASKED[0])]
    stream = talk.ask(messages, 100)
    text = "".join(next(stream).text for _ in range(pieces))
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    said = talk.reply()
    assert said["content"] == text and said["token_ids"] == talk.tokens[len(talk.prompt) :]
    held = len(talk.tokens) - 1
    messages += [said, user(ASKED[1])]
    list(talk.ask(messages, 30))
    assert talk.reused == held
    fresh = open_session(engine, SAMPLED)
    list(fresh.ask(messages, 30))
    assert fresh.tokens == talk.tokens


@pytest.mark.parametrize("graph", ["prefill", "verify", "draft"])
def test_an_interrupt_inside_a_call_costs_a_prefill(
    graph: str, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    talk = open_session(engine)
    first: list[dict[str, Any]] = [user(ASKED[0])]
    list(talk.ask(first, 10))
    messages = [*first, talk.reply(), user(ASKED[1])]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, graph, interrupted)
        list(talk.ask(messages, 10))
    messages = [*messages, talk.reply(), user(ASKED[2])]
    list(talk.ask(messages, 10))
    assert talk.reused == 0
    fresh = open_session(engine)
    list(fresh.ask(messages, 10))
    assert fresh.tokens == talk.tokens


def test_a_conversation_that_is_too_long_keeps_the_session(engine: OnnxRuntimeEngine) -> None:
    talk = open_session(engine, capacity=64)
    messages: list[dict[str, Any]] = [user(ASKED[0])]
    list(talk.ask(messages, 1000))
    assert len(talk.tokens) <= 64
    before = list(talk.tokens)
    with pytest.raises(UserError, match=r"has \d+ tokens.*63"):
        talk.ask([*messages, talk.reply(), user("a b " * 100)], 10)
    with pytest.raises(UserError, match="--max-new-tokens 0"):
        talk.ask(messages, 0)
    with pytest.raises(UserError, match="UTF-8"):
        talk.ask([user("\udcff")], 10)
    assert talk.tokens == before
    list(talk.ask([*messages, {"role": "assistant", "content": "no"}, user("b")], 3))
    assert len(talk.tokens) == len(talk.prompt) + 3 and talk.again


@pytest.mark.parametrize("chunk", [256, 4])
def test_further_prefills_are_exact(chunk: int, build_engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, rounds, a cut, more prompt, rounds: tokens and drafts of the reference, so the head misses nothing."""
    monkeypatch.setattr(rounds, "PREFILL_CHUNK", chunk)
    built = build_engine(vocab_size=24)
    reference = Reference(built.config, built.twin)
    decoder = Decoder(built.engine(), 200, 3, GREEDY)
    text: list[int] = []
    for length, counts in ((7, (3, 3, 3)), (10, (2, 0)), (1, (0, 0)), (4, ()), (5, (3, 3, 3, 3))):
        text += (prompt := prompt_of(built, length))
        token = decoder.prefill(prompt)
        for count in counts:
            expected = reference.drafts([*text, token], reference.forward([*text, token])[0], count)
            drafts, tokens = decoder.round(count)
            assert drafts == expected
            text, token = [*text, token, *tokens[:-1]], tokens[-1]
        logits = reference.forward(text)[1]
        assert token == int(logits[-1].argmax()) and decoder.position == len(text)
        if counts and len(tokens) > 1:
            text = text[: 1 - len(tokens)]
            decoder.cut(1)
            assert decoder.position == len(text)


def script(monkeypatch: pytest.MonkeyPatch, said: list[list[int]]) -> None:
    """The model says these tokens, a round each."""

    def answer(decoder: Any, prompt: list[int], *_: Any) -> Iterator[Round]:
        position = len(prompt)
        for tokens in said:
            yield Round(position, (), 0, tuple(tokens), 1e-3)
            position += len(tokens)

    monkeypatch.setattr(session, "answer", answer)
    monkeypatch.setattr(Decoder, "cut", lambda self, kept: None)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_characters_are_never_broken(size: int, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = open_session(engine)
    text = "naïve ☃ 漢字 🙂🙃 ends"
    ids = talk.tokenizer.encode(text)
    assert len(ids) > 20  # characters of several tokens
    script(monkeypatch, [ids[i : i + size] for i in range(0, len(ids), size)])
    pieces = [piece.text for piece in talk.ask([user("a")], len(ids))]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == -(-len(ids) // size)
    smile = talk.tokenizer.encode("🙂")
    script(monkeypatch, [smile[:2]])  # the text ends inside it
    assert "".join(piece.text for piece in talk.ask([user("a")], 2)) == "\ufffd"


def test_ctrl_c_stops_the_answer(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = open_session(engine)
    whole = list(talk.ask([user(ASKED[0])], 50))
    say = talk.say

    def pressed(*args: Any) -> Iterator[Any]:
        for i, piece in enumerate(say(*args)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(talk, "say", pressed)
    before = signal.getsignal(signal.SIGINT)
    assert chat.reply_to(talk, [user(ASKED[0])], talk.request(50))
    assert signal.getsignal(signal.SIGINT) is before
    shown = capsys.readouterr()
    assert shown.out == "".join(piece.text for piece in whole[:3]) + "\n"
    assert "answer" in shown.err


def talk_to(directory: Path, *flags: object, lines: str | bytes = "") -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "runtime.chat", "--engines", directory, "--threads", 1, *flags]
    command, given = [sys.executable, *map(str, arguments)], lines.encode() if isinstance(lines, str) else lines
    result = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, timeout=300)
    return subprocess.CompletedProcess(command, result.returncode, result.stdout.decode(), result.stderr.decode())


def test_the_command_through_a_pipe(engine: OnnxRuntimeEngine, demo: Path) -> None:
    flags = ("--temperature", 0.7, "--seed", 5, "--max-new-tokens", 30, "--system", "You write Python.")
    talk = open_session(engine, Sampler(SamplingConfig(temperature=0.7, seed=5)))
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You write Python."}]
    expected = ""
    for text in ASKED[:2]:
        messages.append(user(text))
        expected += "".join(piece.text for piece in talk.ask(messages, 30)) + "\n"
        messages.append(talk.reply())
    for mtp_k in (0, 3):
        result = talk_to(demo, *flags, "--mtp-k", mtp_k, lines="\n".join([*ASKED[:2], "", "not read"]))
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected
        first, second = result.stderr.splitlines()
        assert "tokens/s" in first and f"{len(talk.prompt)} tokens, {len(talk.prompt) - talk.reused} new" in second


def test_messages_that_are_refused_do_not_end_the_session(demo: Path) -> None:
    lines = b"\xff\xfe\n" + b"long " * 200 + b"\n" + ASKED[0].encode() + b"\n"
    result = talk_to(demo, "--capacity", 100, "--max-new-tokens", 8, lines=lines)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 2 and "Traceback" not in result.stderr
    assert "UTF-8" in errors[0] and "99" in errors[1]
    assert result.stdout == talk_to(demo, "--max-new-tokens", 8, lines=ASKED[0]).stdout


def test_bad_requests_are_one_line(demo: Path, tmp_path: Path) -> None:
    refused(talk_to(demo, "--think"), "--think", "enable_thinking")
    refused(talk_to(demo, "--no-think"), "--no-think")
    refused(talk_to(demo, "--mtp-k", 17), "--mtp-k 17")
    refused(talk_to(demo, "--max-new-tokens", 0), "--max-new-tokens 0")
    refused(talk_to(demo, "--capacity", 1 << 20), "--capacity")
    refused(talk_to(demo, "--temperature", -1), "--temperature")
    refused(talk_to(tmp_path / "none"), tmp_path / "none", "make engines")
    for name, template, mention in (
        ("without", None, "no chat template"),
        ("failing", "{{ raise_exception('no\nway') }}", "no\\nway"),
    ):
        copy = tmp_path / name
        shutil.copytree(demo, copy)
        (copy / "tokenizer_config.json").unlink()
        (copy / "chat_template.jinja").unlink()
        if template:
            template_file(copy, template)
        manifest = Manifest.read(demo)
        Manifest(**{**vars(manifest), "files": describe_all(copy)}).write(copy)
        refused(talk_to(copy, lines="hello"), copy, mention)
