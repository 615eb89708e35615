"""Penalties, biases, grammars, stop strings and logprobs: what they do, and that drafts change none of it.

pytest tests/test_steering.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.onnxruntime import OnnxRuntimeEngine
from export.errors import UserError
from runtime.grammar import Grammar, Grammars
from runtime.sampling import SamplingConfig, SettingError, logprob_of
from runtime.session import MtpK, Request, Session
from runtime.steering import MASKED, GrammarError, Steering
from runtime.text import Segment, StopStrings
from runtime.tokenizer import Tokenizer
from tests.test_decode import ROOT, decode, refused

CHECKPOINT = ROOT / "demo" / "checkpoint"
PROMPTS = ("def add(a, b):\n", "import os\n\n\nclass Stack:\n", "# a list of numbers\nx = [1, 2, ")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
ALL_K: tuple[MtpK, ...] = (0, 1, 2, 3, 4, "auto")


@pytest.fixture(scope="module")
def session(demo: Path) -> Session:
    return Session(OnnxRuntimeEngine(demo, threads=1), Tokenizer(demo), None, mtp_k="auto", capacity=512)


@pytest.fixture(scope="module")
def grammars(demo: Path) -> Grammars:
    config = OnnxRuntimeEngine(demo).manifest.config
    return Grammars(demo, config.vocab_size, config.eos_token_id)


def answer(session: Session, prompt: str, request: Request) -> tuple[str, list[int], str | None, list[Any]]:
    """Text, tokens, why it ended, logprobs."""
    assert session.tokenizer
    pieces = list(session.answer(session.tokenizer.encode(prompt), request, reuse=False))
    assert "".join(piece.text for piece in pieces) == session.text
    tokens = session.tokens[len(session.prompt) :]
    assert [token for piece in pieces for token in piece.round.tokens] == tokens
    return session.text, tokens, session.finish_reason, [entry for piece in pieces for entry in piece.logprobs]


def with_every_k(session: Session, prompt: str, request: Request) -> tuple[str, list[int], str | None, list[Any]]:
    """The answer, after it was the same with every number of drafts."""
    answers = [answer(session, prompt, Request(**{**vars(request), "mtp_k": k})) for k in ALL_K]
    for other in answers[1:]:
        assert other[:3] == answers[0][:3]
        assert [(e.token, [t for t, _ in e.top]) for e in other[3]] == [
            (e.token, [t for t, _ in e.top]) for e in answers[0][3]
        ]
        np.testing.assert_allclose([e.logprob for e in other[3]], [e.logprob for e in answers[0][3]], atol=1e-4)
    return answers[0]


@pytest.mark.parametrize(
    ("sampling", "stop"),
    [
        ({"repetition_penalty": 1.3}, ()),
        (
            {"frequency_penalty": 0.7, "presence_penalty": -0.5, "temperature": 1.0, "seed": 5},
            ("return", "\n\n", "x ="),
        ),
        (
            {"logit_bias": ((64, -100.0), (10, 4.0), (198, 3.0)), "temperature": 0.8, "top_k": 30, "seed": 2},
            ("e", "zzz"),
        ),
        (
            {"repetition_penalty": 0.8, "frequency_penalty": 1.5, "temperature": 1.2, "top_p": 0.9, "min_p": 0.02},
            (")",),
        ),
        ({}, ("lf", "[")),
    ],
)
def test_answers_do_not_depend_on_drafts(session: Session, sampling: dict[str, Any], stop: tuple[str, ...]) -> None:
    for prompt in PROMPTS:
        request = Request(SamplingConfig(**sampling), 40, stop=stop, logprobs=3)
        text, tokens, reason, logprobs = with_every_k(session, prompt, request)
        assert len(logprobs) == len(tokens) and all(found.token == t for found, t in zip(logprobs, tokens, strict=True))
        assert not any(s in text for s in stop)
        assert reason == "stop" or (len(tokens) == 40 and reason == "length")


def test_settings_change_the_text(session: Session) -> None:
    plain = answer(session, PROMPTS[0], Request(SamplingConfig(), 60))
    assert len(set(plain[1])) < len(plain[1]), "nothing is said twice: penalties have nothing to do"
    for sampling in (
        SamplingConfig(repetition_penalty=1.5),
        SamplingConfig(frequency_penalty=2.0),
        SamplingConfig(presence_penalty=2.0),
    ):
        assert answer(session, PROMPTS[0], Request(sampling, 60))[1] != plain[1]
    banned = SamplingConfig(logit_bias=((plain[1][0], -100.0),))
    assert plain[1][0] not in answer(session, PROMPTS[0], Request(banned, 60))[1]
    wanted = SamplingConfig(logit_bias=((77, 100.0),))
    assert set(answer(session, PROMPTS[0], Request(wanted, 8))[1]) == {77}


def test_only_the_answer_counts_for_presence_and_frequency(session: Session) -> None:
    """The repetition penalty knows the prompt too, as in transformers."""
    logits = np.arange(-3, 5, dtype=np.float32)
    for c in (SamplingConfig(presence_penalty=1.0, frequency_penalty=0.5), SamplingConfig(repetition_penalty=2.0)):
        steering = Steering(c, 8, [5, 5, 1])
        for token in (6, 6, 1):
            steering.push(token)
        if c.repetition_penalty == 1:
            expected = logits.copy()
            expected[6] -= 1 + 2 * 0.5
            expected[1] -= 1 + 0.5
        else:
            ids, scores = torch.tensor([[5, 5, 1, 6, 6, 1]]), torch.from_numpy(logits)[None].clone()
            expected = transformers.RepetitionPenaltyLogitsProcessor(2.0)(ids, scores)[0].numpy()
        np.testing.assert_array_equal(steering.apply(logits), expected)
        with steering.ahead():
            steering.push(0)
            assert (steering.apply(logits) != expected).any()
        np.testing.assert_array_equal(steering.apply(logits), expected)


def test_logprobs_are_those_of_the_model(session: Session) -> None:
    """Whatever was done to the logits that the token was sampled from."""
    assert session.tokenizer
    prompt = session.tokenizer.encode(PROMPTS[1])
    request = Request(SamplingConfig(temperature=1.3, seed=4, frequency_penalty=1.0), 12, logprobs=5)
    _, tokens, _, logprobs = answer(session, PROMPTS[1], request)
    engine: Any = session.engine
    engine.start(512, 1)
    for i, found in enumerate(logprobs):
        text = np.asarray([*prompt, *tokens[:i]], np.int64)
        engine.start(512, 1)
        logits = torch.from_numpy(engine.prefill(text, 0, 0)[1][0].copy()).double()
        expected = logits.log_softmax(-1)
        assert abs(found.logprob - float(expected[tokens[i]])) < 1e-3  # prefilled in one call: last bits differ
        values, entries = expected.topk(5)
        assert [entry for entry, _ in found.top] == entries.tolist()
        np.testing.assert_allclose([value for _, value in found.top], values.numpy(), atol=1e-3)
    session.decoder.reset()


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40), st.integers(0, 45))
def test_logprobs_sum_to_one(values: list[float], count: int) -> None:
    logits = np.asarray(values, np.float32)
    found = logprob_of(logits, 1, count)
    assert len(found.top) == min(count, len(values))
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    if count >= len(values):
        assert abs(sum(np.exp(value) for _, value in found.top) - 1) < 1e-9
        assert dict(found.top)[1] == found.logprob


# ---- grammars ----


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_json_parses_whatever_is_drafted(session: Session, grammars: Grammars, sampling: dict[str, Any]) -> None:
    finished = 0
    for prompt in PROMPTS:
        config = SamplingConfig(**sampling, frequency_penalty=0.4)
        request = Request(config, 90, grammar=grammars.json_schema(SCHEMA))
        text, _, reason, _ = with_every_k(session, prompt, request)
        if reason == "stop":
            finished += 1
            found = json.loads(text)
            assert set(found) == {"name", "kind", "sizes"} and found["kind"] in ("cat", "dog")
            assert len(found["name"]) <= 12 and all(isinstance(size, int) for size in found["sizes"])
        text, _, reason, _ = with_every_k(session, prompt, Request(config, 60, grammar=grammars.json_object()))
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
    assert finished


class Fragile:
    """A grammar that cannot go on from any token but those of one answer."""

    def __init__(self, tokens: list[int], at: int = 0) -> None:
        self.tokens, self.at = tokens, at

    def start(self) -> Fragile:
        return self.copy()

    def copy(self) -> Fragile:
        return Fragile(self.tokens, self.at)

    def allowed(self) -> None:
        return None

    def push(self, token: int) -> bool:
        if self.at < len(self.tokens) and token != self.tokens[self.at]:
            raise GrammarError("a limit of the library")
        self.at += 1
        return True


def test_a_draft_never_fails_the_answer(session: Session) -> None:
    """Wrong drafts may lead where the grammar cannot go on."""
    request = Request(SamplingConfig(temperature=1.0, seed=3), 40)
    _, tokens, _, _ = answer(session, PROMPTS[0], request)
    grammar: Any = Fragile(tokens)
    assert with_every_k(session, PROMPTS[0], dataclasses.replace(request, grammar=grammar))[1] == tokens


def test_large_schemas(session: Session, grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(700)}}
    schema["additionalProperties"] = False
    request = Request(SamplingConfig(temperature=1.0, seed=1), 30, grammar=grammars.json_schema(schema))
    assert with_every_k(session, PROMPTS[0], request)[0].startswith("{")


def test_an_answer_ends_where_another_begins(session: Session) -> None:
    request = Request(SamplingConfig(temperature=1.0, seed=3), 20)
    wanted = answer(session, PROMPTS[0], request)[1]
    assert session.tokenizer
    prompt = session.tokenizer.encode(PROMPTS[0])
    asked = session.answer(prompt, request, reuse=False)
    answer(session, PROMPTS[1], Request(SamplingConfig(), 20))
    list(asked)  # asked first, begun last: it is what it was asked to be
    assert session.tokens[len(prompt) :] == wanted
    left = session.answer(prompt, request, reuse=False)
    next(left)
    answer(session, PROMPTS[1], Request(SamplingConfig(), 20))
    with pytest.raises(RuntimeError, match="another answer"):
        next(left)


def test_masks_admit_what_the_schema_does(session: Session, grammars: Grammars) -> None:
    """Against a parser: a complete text of the schema passes token by token; one that is not is stopped."""
    assert session.tokenizer
    grammar = grammars.json_schema(json.dumps(SCHEMA))
    good = '{"name": "é🙂", "kind": "cat", "sizes": [1, 22]}'
    state = grammar.start()
    for token in session.tokenizer.encode(good):
        allowed = state.allowed()
        assert allowed is not None and allowed[token // 32] >> token % 32 & 1
        assert state.push(token)
    stop = grammars.tokenizer.eos_tokens[0]
    allowed = state.allowed()
    assert allowed is not None and allowed[stop // 32] >> stop % 32 & 1
    copy = state.copy()
    assert state.push(stop) and state.is_over and state.allowed() is None and state.push(5)
    assert not copy.is_over and not copy.push(session.tokenizer.encode("x")[0]) and copy.push(stop)
    for bad in ('{"name": 1', '{"kind"', '{"name": "a", "kind": "cow"'):
        state = grammar.start()
        assert not all(state.push(token) for token in session.tokenizer.encode(bad))
    assert not grammar.start().push(stop)


@pytest.mark.parametrize(
    "schema",
    [
        *("{", "[]", "3", '{"type": "cow"}', {"pattern": "(", "type": "string"}, {"$ref": "http://x/y"}),
        {"items": [{"multipleOf": 1e-3}, {"multipleOf": 999983}]},
        {"type": "object", "x-guidance": {"item_separator": "x"}},
    ],
)
def test_schemas_that_are_none(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(UserError, match="JSON schema"):
        grammars.json_schema(schema)


def test_json_through_the_command(demo: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    flags = ("--prompt", PROMPTS[0], "--frequency-penalty", 0.4, "--max-new-tokens", 90, "--json-schema", schema)
    texts = {decode(demo, *flags, "--mtp-k", mtp_k).stdout for mtp_k in (0, 3, "auto")}
    assert len(texts) == 1 and set(json.loads(texts.pop())) == {"name", "kind", "sizes"}
    for text, mention in (
        ('{"type": "cow"}', "cow"),
        ("{", "JSON"),
        ("\ufffd".encode("utf-16").decode("latin-1"), "JSON"),
    ):
        schema.write_text(text)
        refused(decode(demo, *flags), schema, mention)
    schema.write_bytes(b"\xff")
    refused(decode(demo, *flags), schema, "UTF-8")


def test_masked_logits_lose_at_any_temperature(grammars: Grammars) -> None:
    grammar: Grammar = grammars.json_object()
    steering = Steering(SamplingConfig(), 4096, [1], grammar)
    logits = np.linspace(-50, 50, 4096, dtype=np.float32)
    out = steering.apply(logits)
    allowed = steering.state.allowed() if steering.state else None
    assert allowed is not None
    bits = [bool(allowed[v // 32] >> v % 32 & 1) for v in range(4096)]
    assert 0 < sum(bits) < 100
    np.testing.assert_array_equal(out, np.where(bits, logits, MASKED))
    assert np.isfinite(MASKED / np.float32(1e-6))


# ---- stop strings ----


def cut(pieces: Sequence[str], stop: Sequence[str]) -> tuple[list[str], bool]:
    """What StopStrings lets through after each piece, and whether it found one."""
    text, out = StopStrings(stop), []
    for piece in pieces:
        text.push(Segment(piece, 0))
        out.append("".join(segment.text for segment in text.take()))
        if text.is_over:
            return out, True
    text.end("")
    return [*out, "".join(segment.text for segment in text.take())], False


LETTERS = st.text("ab\n", max_size=4)


@given(st.lists(LETTERS, max_size=14), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    """The first to be complete, and of those that one token completes, the one that begins first."""
    whole = "".join(pieces)
    ends = [whole.find(s) + len(s) for s in stop if s in whole]
    out, found = cut(pieces, stop)
    assert found == bool(ends)
    if not ends:
        assert "".join(out) == whole
        return
    length = 0
    for piece in pieces:  # up to the piece that completes one
        length += len(piece)
        if length >= min(ends):
            break
    seen = whole[:length]
    assert "".join(out) == seen[: min(seen.find(s) for s in stop if s in seen)]


def test_nothing_is_held_back_without_need() -> None:
    assert cut(["ab", "c", "\n", "x", "\n"], ["\n\n"])[0] == ["ab", "c", "", "\nx", "", "\n"]
    assert cut(["ab", "c"], [])[0][:2] == ["ab", "c"]


def test_segments_keep_their_drafts() -> None:
    text = StopStrings(["cd"])
    for i, piece in enumerate(("ab", "xc", "e", "yc")):
        text.push(Segment(piece, i))
    assert list(text.take()) == [Segment("ab", 0), Segment("xc", 1), Segment("e", 2), Segment("y", 3)]
    text.end("\ufffd")
    assert list(text.take()) == [Segment("c", 3), Segment("\ufffd", 0)]


def test_settings_out_of_range_are_named(session: Session) -> None:
    wrong: tuple[tuple[str, Any], ...] = (
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
    )
    for name, value in wrong:
        with pytest.raises(SettingError, match="--" + name.replace("_", "-")) as error:
            SamplingConfig(**{name: value})
        assert error.value.name == name
    for make, name in (
        (lambda: Request(SamplingConfig(), 4, logprobs=21), "logprobs"),
        (lambda: Request(SamplingConfig(), 4, stop=("",)), "stop"),
        (lambda: Request(SamplingConfig(), 0), "max-new-tokens"),
    ):
        with pytest.raises(SettingError, match=name):
            make()
    for request, name in (
        (Request(SamplingConfig(logit_bias=((4096, 1.0),)), 4), "logit-bias"),
        (Request(SamplingConfig(), 4, mtp_k=9), "mtp-k 9"),
        (Request(SamplingConfig(), 600), "max-new-tokens"),
    ):
        with pytest.raises(UserError, match=name):
            session.answer([1], request)
