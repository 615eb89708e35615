"""Bodies of JSON, field by field: each is taken as what it has to be, and what is left over is refused.

    body = Fields(parse_json(b'{"n": 3}'))
    count = body.take("n", integer(1, 8))       # None where it is not given
    body.end()                                  # no other fields

A kind, such as `integer(1, 8)`, is a function from a JSON value to what is made of it, raising `KindError`. Whatever is
wrong ends as a `RequestError` that names the field; `null` stands for a field that is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
MAX_DEPTH = 100
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(Exception):
    """Why a request gets no answer: `status` of HTTP and `body`, OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class KindError(Exception):
    """A value is not what its field takes; str: what would have been."""


class Fields:
    """A JSON object whose fields are taken one by one. name: of the object itself, "" for the body."""

    def __init__(self, value: Any, name: str = "") -> None:
        self.name = name
        if not isinstance(value, dict):
            refuse(name or None, f"expected an object, not {shown(value)}")
        self.left = dict(value)

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def take(self, field: str, kind: Callable[[Any], T]) -> T | None:
        """The value as `kind` makes it, None where there is none."""
        value = self.left.pop(field, None)
        if value is None:
            return None
        try:
            return kind(value)
        except KindError as error:
            refuse(self.path(field), f"expected {error}, not {shown(value)}")

    def inner(self, field: str) -> Fields | None:
        """An object within, to be taken apart in the same way."""
        value = self.left.pop(field, None)
        return None if value is None else Fields(value, self.path(field))

    def require(self, field: str, kind: Callable[[Any], T]) -> T:
        value = self.take(field, kind)
        if value is None:
            refuse(self.path(field), "missing, and it is needed")
        return value

    def end(self, unsupported: Collection[str] = ()) -> None:
        """Refuses what was not taken."""
        for field, value in self.left.items():
            if field not in unsupported:
                refuse(self.path(field[:60]), "no such field")
            if value is not None:
                refuse(self.path(field), "not supported by this server; leave it out")


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no number beyond float64, no field twice, no text that UTF-8 cannot hold."""
    try:
        data = json.loads(
            body.decode("utf-8"), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_without_twice
        )
    except UnicodeDecodeError as error:
        refuse(None, f"the body is not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        refuse(None, "the body is nested too deeply")
    except ValueError as error:
        refuse(None, f"the body is not JSON: {error}")
    if isinstance(data, dict):
        for field, value in data.items():
            _check_value(field, None, 0)
            _check_value(value, field, 1)
    return data


def _check_value(value: Any, field: str | None, depth: int) -> None:
    """Refuses what no UTF-8 text can say, and what is nested so deeply that others' parsers would give up."""
    if depth > MAX_DEPTH:
        refuse(field, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        refuse(field, "half of a surrogate pair is not text")
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        _check_value(each, field, depth + 1)


def refuse(param: str | None, message: str) -> NoReturn:
    raise RequestError(400, f"{param}: {message}" if param else message, param)


def shown(value: Any) -> str:
    """As it stood in the body, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(name)} stands twice in one object")
    return result


def of_type(kind: type[T], expected: str) -> Callable[[Any], T]:
    def take(value: Any) -> T:
        if type(value) is not kind:  # true is not 1 here
            raise KindError(expected)
        return value

    return take


boolean, string, whole = of_type(bool, "true or false"), of_type(str, "a string"), of_type(int, "an integer")
a_list, an_object = of_type(list, "a list"), of_type(dict, "an object")


def integer(low: int, high: int | None = None) -> Callable[[Any], int]:
    def take(value: Any) -> int:
        if type(value) is not int or value < low or (high is not None and value > high):
            raise KindError(f"an integer from {low} up" if high is None else f"an integer from {low} to {high}")
        return value

    return take


def number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise KindError("a number")
    return float(value)


def only(allowed: Any) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if type(value) is not type(allowed) or value != allowed:
            raise KindError(f"{json.dumps(allowed)}, all that this server does")
        return value

    return take


def one_of(*allowed: str) -> Callable[[Any], str]:
    def take(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise KindError(" or ".join(json.dumps(each) for each in allowed))
        return value

    return take
