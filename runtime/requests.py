"""Bodies of requests, as OpenAI's clients send them -> what was asked for, checked field by field.

    ask = parse_chat(b'{"messages": [{"role": "user", "content": "hello"}]}', Served("demo", 4096, max_mtp_k=4))

Pure functions. Whatever a body may hold, the outcome is an `Ask` or a `RequestError` that names the field: one that is
unknown, or not supported, is never passed over. `null` stands for a field that is left out.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from runtime.fields import (
    Fields,
    KindError,
    RequestError,
    a_list,
    an_object,
    boolean,
    integer,
    number,
    one_of,
    only,
    parse_json,
    refuse,
    shown,
    string,
    whole,
)
from runtime.sampling import SamplingConfig, SettingError
from runtime.session import MtpK

MAX_SCHEMA = 1 << 16  # compiling takes time that grows faster than the schema
MAX_STOPS, MAX_TOP_LOGPROBS, MAX_LOGPROBS = 16, 20, 5
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What OpenAI's clients may send and this server cannot do. Nothing else is known by name.
UNSUPPORTED = {
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio", "modalities", "prediction"),
    *("reasoning_effort", "verbosity", "web_search_options", "service_tier", "moderation", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "suffix"),
}
UNSUPPORTED_IN_MESSAGES = {"name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio", "annotations"}


@dataclass(frozen=True)
class Served:
    """What requests are checked against. model: its name."""

    model: str
    vocab_size: int
    max_mtp_k: int


@dataclass(frozen=True)
class Ask:
    """messages: of a chat, each with "role" and "content"; none: `prompt`, text or token ids, is to be gone on from.
    max_new_tokens: None for as many as there is room for. format: "text", "json_object" or a JSON schema. thinking:
    None for the template's own choice. logprobs: alternatives a token, None for none at all. details: the `tandem`
    object is wanted."""

    sampling: SamplingConfig
    max_new_tokens: int | None
    messages: tuple[dict[str, str], ...] = ()
    prompt: str | tuple[int, ...] = ""
    mtp_k: MtpK | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    format: str | dict[str, Any] = "text"
    thinking: bool | None = None
    stream: bool = False
    include_usage: bool = False
    details: bool = False


def parse_chat(body: bytes, served: Served) -> Ask:
    """A body of /v1/chat/completions. Raises RequestError."""
    data = Fields(parse_json(body))
    _check_model(data, served)
    given = data.require("messages", a_list)
    if not given:
        refuse("messages", "expected at least one message")
    messages = tuple(_parse_message(message, f"messages[{i}]") for i, message in enumerate(given))
    most = [data.take(name, integer(1)) for name in ("max_tokens", "max_completion_tokens")]
    if None not in most and most[0] != most[1]:
        refuse("max_tokens", f"{most[0]}, while max_completion_tokens is {most[1]}; give one of them")
    wanted, top = data.take("logprobs", boolean), data.take("top_logprobs", integer(0, MAX_TOP_LOGPROBS))
    if top is not None and not wanted:
        refuse("top_logprobs", "expected with `logprobs: true` only")
    thinking = _parse_thinking(data)
    common = _parse_common(data, served)
    if thinking and common["format"] != "text":
        refuse("chat_template_kwargs.enable_thinking", "an answer that is JSON has no room for thinking; drop either")
    count = most[0] if most[1] is None else most[1]
    logprobs = (top or 0) if wanted else None
    return Ask(messages=messages, max_new_tokens=count, logprobs=logprobs, thinking=thinking, **common)


def parse_completion(body: bytes, served: Served) -> Ask:
    """A body of /v1/completions. Raises RequestError."""
    data = Fields(parse_json(body))
    _check_model(data, served)
    prompt = data.require("prompt", _prompt)
    if not isinstance(prompt, str) and (wrong := [token for token in prompt if token >= served.vocab_size]):
        refuse("prompt", f"token id {wrong[0]} is outside the vocabulary (0 to {served.vocab_size - 1})")
    data.take("echo", only(False))
    data.take("best_of", only(1))
    count = data.take("max_tokens", integer(1))
    logprobs = data.take("logprobs", integer(0, MAX_LOGPROBS))
    common = _parse_common(data, served)
    return Ask(prompt=prompt, max_new_tokens=16 if count is None else count, logprobs=logprobs, **common)


def _check_model(data: Fields, served: Served) -> None:
    model = data.take("model", string)
    if model is not None and model != served.model:
        message = f"the model {shown(model)} does not exist here; this server has {shown(served.model)}"
        raise RequestError(404, message, "model", "model_not_found")


def _parse_common(data: Fields, served: Served) -> dict[str, Any]:
    """The fields that both endpoints take, and the end of the body."""
    stream = bool(data.take("stream", boolean))
    include_usage = False
    if (options := data.inner("stream_options")) is not None:
        if not stream:
            refuse("stream_options", "expected with `stream: true` only")
        include_usage = bool(options.take("include_usage", boolean))
        options.end()
    result = {
        "stream": stream,
        "include_usage": include_usage,
        "details": bool(data.take("details", boolean)),
        "stop": data.take("stop", _stop) or (),
        "mtp_k": data.take("mtp_k", _mtp_k(served.max_mtp_k)),
        "format": _parse_format(data),
        "sampling": _parse_sampling(data, served),
    }
    data.take("n", only(1))
    data.take("store", only(False))
    data.take("user", string)  # labels, which change no answer
    data.inner("metadata")
    data.end(UNSUPPORTED)
    return result


def _parse_sampling(data: Fields, served: Served) -> SamplingConfig:
    values: dict[str, Any] = {"temperature": 1.0, "seed": secrets.randbits(53)}
    for field in fields(SamplingConfig):
        kind = {"int": whole, "float": number}.get(str(field.type), _logit_bias(served.vocab_size))
        if (value := data.take(field.name, kind)) is not None:
            values[field.name] = value
    try:
        return SamplingConfig(**values)
    except SettingError as error:
        refuse(error.name, f"expected {error.expected}, not {shown(values[error.name])}")


def _parse_format(data: Fields) -> str | dict[str, Any]:
    if (given := data.inner("response_format")) is None:
        return "text"
    result: str | dict[str, Any] = given.require("type", one_of("text", "json_object", "json_schema"))
    if result == "json_schema":
        inner = Fields(given.require("json_schema", an_object), given.path("json_schema"))
        inner.require("name", string)
        inner.take("description", string)
        inner.take("strict", boolean)  # a schema always holds
        result = inner.require("schema", an_object)
        if (size := len(json.dumps(result))) > MAX_SCHEMA:
            refuse(inner.path("schema"), f"{size} characters; at most {MAX_SCHEMA} are taken")
        inner.end()
    given.end()
    return result


def _parse_thinking(data: Fields) -> bool | None:
    if (given := data.inner("chat_template_kwargs")) is None:
        return None
    thinking = given.take("enable_thinking", boolean)
    given.end()
    return thinking


def _parse_message(value: Any, name: str) -> dict[str, str]:
    message = Fields(value, name)
    role = message.require("role", one_of(*ROLES))
    content = message.require("content", _content)
    if isinstance(content, list):
        content = "".join(_parse_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    message.end(UNSUPPORTED_IN_MESSAGES)
    return {"role": ROLES[role], "content": content}


def _parse_part(value: Any, name: str) -> str:
    part = Fields(value, name)
    part.require("type", one_of("text"))
    text = part.require("text", string)
    part.end()
    return text


def _content(value: Any) -> str | list[Any]:
    if not isinstance(value, str | list):
        raise KindError("a string or a list of text parts")
    return value


def _mtp_k(most: int) -> Callable[[Any], MtpK]:
    def take(value: Any) -> MtpK:
        if value == "auto":
            return "auto"
        if type(value) is int and 0 <= value <= most:
            return value
        raise KindError(f'"auto" or an integer from 0 to {most}')

    return take


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise KindError(f"a string or a list of up to {MAX_STOPS} strings, none of them empty")
    return tuple(stops)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # one of a batch
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise KindError("a string or a list of token ids, one and not empty")


def _logit_bias(vocab_size: int) -> Callable[[Any], tuple[tuple[int, float], ...]]:
    def take(value: Any) -> tuple[tuple[int, float], ...]:
        expected = KindError(f"an object of token ids (0 to {vocab_size - 1}) and numbers from -100 to 100")
        if not isinstance(value, dict):
            raise expected
        for key, bias in value.items():
            is_token = re.fullmatch("0|[1-9][0-9]{0,9}", key) and int(key) < vocab_size
            if not is_token or type(bias) not in (int, float) or abs(bias) > 100:
                raise expected
        return tuple(sorted((int(key), float(bias)) for key, bias in value.items()))

    return take
