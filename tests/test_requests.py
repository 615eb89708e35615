"""Bodies of requests: what they become, and that whatever else is sent is refused by name.

pytest tests/test_requests.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.fields import RequestError
from runtime.requests import Ask, Served, parse_chat, parse_completion
from runtime.sampling import SamplingConfig

SERVED = Served("demo", 4096, 4)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Ask:
    return parse_chat(json.dumps({"messages": HELLO} | fields).encode(), SERVED)


def completion(**fields: Any) -> Ask:
    return parse_completion(json.dumps({"prompt": "a"} | fields).encode(), SERVED)


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat(body, SERVED)
    return caught.value


def test_what_is_not_said() -> None:
    ask = chat()
    assert ask.messages == tuple(HELLO) and not ask.prompt
    assert ask == Ask(SamplingConfig(temperature=1.0, seed=ask.sampling.seed), None, tuple(HELLO))
    assert ask.sampling.seed != chat().sampling.seed
    other = completion()
    assert other == Ask(SamplingConfig(temperature=1.0, seed=other.sampling.seed), 16, (), "a")


def test_what_is_said() -> None:
    sampling = {
        "temperature": 0,
        "top_k": 20,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2.0,
    }
    ask = chat(
        model="demo",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "", "refusal": None, "tool_calls": None},
        ],
        **sampling,
        logit_bias={"5": -100, "0": 1.5},
        max_completion_tokens=9,
        stop=["x", "y"],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        chat_template_kwargs={"enable_thinking": False},
        mtp_k="auto",
        details=True,
        tools=None,
        n=1,
        store=False,
        user="me",
        metadata={"a": "b"},
    )
    roles = [(message["role"], message["content"]) for message in ask.messages]
    assert roles == [("system", "be brief"), ("user", "ab"), ("assistant", "")]
    assert ask.sampling == SamplingConfig(**sampling, logit_bias=((0, 1.5), (5, -100.0)))  # type: ignore[arg-type]
    assert (ask.max_new_tokens, ask.stop, ask.mtp_k, ask.logprobs) == (9, ("x", "y"), "auto", 3)
    assert ask.format == {"type": "object"} and ask.thinking is False
    assert ask.stream and ask.include_usage and ask.details


def test_forms_that_mean_the_same() -> None:
    assert chat(max_tokens=3).max_new_tokens == chat(max_tokens=3, max_completion_tokens=3).max_new_tokens == 3
    assert chat(stop="a").stop == chat(stop=["a"]).stop == ("a",)
    assert chat(stop=[]).stop == chat(stop=None).stop == ()
    assert chat(logprobs=True).logprobs == 0 and chat(logprobs=False).logprobs is None
    assert completion(logprobs=0).logprobs == 0 and completion(logprobs=None).logprobs is None
    assert completion(prompt=["a"]).prompt == "a" and completion(prompt=[[1, 2]]).prompt == (1, 2)
    assert completion(prompt=[4095]).prompt == (4095,)
    assert chat(response_format={"type": "text"}).format == "text"
    assert chat(response_format={"type": "json_object"}).format == "json_object"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": fields}


# By what the refusal names: values of the field that it begins with.
WRONG_IN_CHAT: dict[str, list[Any]] = {
    "messages": [None, [], "a", {}],
    "messages[0]": [[None], ["a"], [[]]],
    "messages[0].role": [[{"role": role, "content": "a"}] for role in (None, "tool", 1, ["user"])],
    "messages[0].content": [[user(None)], [user(1)], [user({})]],
    "messages[0].content[0]": [[user(["a"])]],
    "messages[0].content[0].type": [[user([{"type": "image_url", "image_url": "x"}])]],
    "messages[0].content[0].text": [[user([{"type": "text"}])]],
    "messages[0].name": [[user("a") | {"name": "b"}]],
    "messages[0].colour": [[user("a") | {"colour": None}]],
    "messages[1].tool_calls": [[*HELLO, {"role": "assistant", "content": "a", "tool_calls": [1]}]],
    "temperature": [True, "1", -0.1, [], 1e7, 10**400],
    "top_p": [0, 1.1, "x", False],
    "top_k": [-1, 1.0, True],
    "min_p": [-0.1, 1.1],
    "seed": [-1, 1 << 64, 1.5, True],
    "presence_penalty": [-2.1, 2.1, {}],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 1000],
    "logit_bias": [[], {"a": 1}, {"4096": 1}, {"-1": 1}, {"01": 1}, {"1": 101}, {"1": True}],
    "max_tokens": [0, -1, 1.0, True, "5"],
    "max_completion_tokens": [0],
    "stop": ["", [""], ["a"] * 17, [1], 1, {}],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}],
    "logprobs": [1, 0, "yes"],
    "top_logprobs": [1],
    "n": [0, 2, True, 1.0],
    "mtp_k": [5, -1, "most", True, 2.0],
    "details": [1],
    "store": [True],
    "user": [1],
    "metadata": [[]],
    "response_format": ["json"],
    "response_format.type": [{}, {"type": "xml"}],
    "response_format.json_schema": [{"type": "json_schema"}, {"type": "json_object", "json_schema": {}}],
    "response_format.json_schema.name": [schema(schema={})],
    "response_format.json_schema.schema": [schema(name="a", schema={"const": "a" * (1 << 16)}), schema(name="a")],
    "chat_template_kwargs.enable_thinking": [{"enable_thinking": 1}],
    "chat_template_kwargs.other": [{"other": 1}],
    **{
        name: [1] for name in ("tools", "tool_choice", "functions", "audio", "reasoning_effort", "suffix", "prediction")
    },
    **{name: [1] for name in ("prompt", "echo", "best_of", "colour")},
}
WRONG_IN_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [None, "", [], ["a", "b"], [1, "a"], [-1], [4096], [1.0], [[]], 1],
    "logprobs": [6, True, -1],
    "best_of": [2, True],
    "echo": [True],
    **{name: [1] for name in ("suffix", "max_completion_tokens", "messages", "top_logprobs", "chat_template_kwargs")},
}


@pytest.mark.parametrize("param", WRONG_IN_CHAT)
def test_what_is_wrong_is_named(param: str) -> None:
    field = param.split(".")[0].split("[")[0]
    for value in WRONG_IN_CHAT[param]:
        error = refusal(json.dumps({"messages": HELLO} | {field: value}).encode())
        assert error.status == 400
        assert error.body["error"]["param"] == param, value
        assert str(error).startswith(param) and "\n" not in str(error) and len(str(error)) < 250


@pytest.mark.parametrize("param", WRONG_IN_COMPLETIONS)
def test_what_is_wrong_in_completions_is_named(param: str) -> None:
    for value in WRONG_IN_COMPLETIONS[param]:
        with pytest.raises(RequestError) as caught:
            completion(**{param: value})
        assert (caught.value.status, caught.value.body["error"]["param"]) == (400, param), value


def test_fields_that_do_not_go_together() -> None:
    for param, fields in (
        ("max_tokens", {"max_tokens": 1, "max_completion_tokens": 2}),
        ("top_logprobs", {"logprobs": False, "top_logprobs": 0}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("stream_options.other", {"stream": True, "stream_options": {"other": 1}}),
        (
            "chat_template_kwargs.enable_thinking",
            {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": True}},
        ),
    ):
        assert refusal(json.dumps({"messages": HELLO} | fields).encode()).body["error"]["param"] == param
    error = refusal(json.dumps({"messages": HELLO, "model": "gpt"}).encode())
    assert (error.status, error.body["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "mention"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "an object"),
        (b"null", "an object"),
        (b"\xff", "UTF-8"),
        (b'{"messages": "\xed\xa0\x80"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"messages": []}'.encode("utf-16"), "UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "1e999"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "4300"),
        (b'{"seed": 1, "seed": 2}', '"seed" stands twice'),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages: half of a surrogate pair"),
        (b'{"messages": [{"\\udfff": 1}]}', "messages: half of a surrogate pair"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "messages: nested deeper than 100"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_no_json(body: bytes, mention: str) -> None:
    error = refusal(body)
    assert error.status == 400 and mention in str(error)
    json.dumps(error.body, ensure_ascii=False).encode()


NAMES = ("messages", "prompt", "model", "stop", "logit_bias", "response_format", "stream_options", "role", "content")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_any_json_is_an_ask_or_a_refusal(value: Any) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            ask = parse(json.dumps(value).encode(), SERVED)
        except RequestError as error:
            assert error.status in (400, 404)
            json.dumps(error.body, ensure_ascii=False).encode()
        else:
            assert isinstance(ask, Ask)


@given(st.binary(max_size=40))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(body, SERVED)
