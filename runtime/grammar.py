"""Grammars that an answer must follow: JSON, with or without a schema, through llguidance.

    grammars = Grammars(Path("build/demo/cpu"), vocab_size=4096, stop_ids=[0, 1])
    state = grammars.json_schema({"type": "object"}).start()
    state.allowed()                # uint32 words, a bit for each vocabulary entry that may come next
    state.push(token)

The mask of a token depends on the tokens before it alone, so drafts do not change what is sampled.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from runtime.steering import GrammarError

Words = NDArray[np.uint32]
# Between tokens of JSON: a blank, or a line's end and indentation. Any amount would let a model write blanks for ever.
OPTIONS: Any = {"whitespace_pattern": r"( |\n {0,32})?"}


LIMITS = LLParserLimits(max_items_in_row=20_000)  # the library's own are too low for objects of 500 properties
MAX_MULTIPLE = 20_000  # of all `multipleOf` together: the automaton has as many states


class Grammars:
    """Of the tokenizer of an engine directory. stop_ids: what may end an answer, once it is complete."""

    def __init__(self, directory: Path, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self.directory, self.vocab_size, self.stop_ids = directory, vocab_size, list(stop_ids)
        self.words = -(-vocab_size // 32)

    @functools.cached_property
    def tokenizer(self) -> LLTokenizer:
        """Raises GrammarError: a tokenizer that is not byte-level, no stop ids."""
        path = self.directory / "tokenizer.json"
        if not self.stop_ids:
            raise GrammarError(f"{self.directory}: without a stop id JSON could not end; leave the format out")
        try:
            return LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=self.vocab_size, eos_token=self.stop_ids)
        except ValueError as error:
            raise GrammarError(f"{path}: no grammar fits this tokenizer ({error}); leave the format out") from None

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar:
        """Compiled, which may take seconds where a schema is large. Raises GrammarError: no JSON, no schema, one that
        uses what the library has not, or would take it too long."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            multiples = sum(_multiples(parsed))
            source = LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=OPTIONS)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"JSON schema: {error}; mend it") from None
        if multiples > MAX_MULTIPLE:
            raise GrammarError(f"JSON schema: its `multipleOf` add up to more than {MAX_MULTIPLE}; use smaller ones")
        matcher = LLMatcher(self.tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"JSON schema: {_line(matcher.get_error())}; mend it, or leave that part out")
        return Grammar(self, matcher)


def _line(message: str) -> str:
    """The library's messages have several, with what it has seen of a pattern."""
    return " ".join(message.split())[:200]


def _multiples(schema: Any) -> Iterator[int]:
    """The digits of every `multipleOf`, as an integer: 0.25 is 25. Raises ValueError: a key of the library's own, which
    can make it write what is no JSON."""
    parts = schema.items() if isinstance(schema, Mapping) else enumerate(schema) if isinstance(schema, list) else ()
    for name, part in parts:
        if name == "x-guidance":
            raise ValueError("x-guidance is not part of a schema")
        if name == "multipleOf" and isinstance(part, int | float) and math.isfinite(part):
            digits = Decimal(str(part)).normalize()
            yield abs(int(digits.scaleb(-int(min(digits.as_tuple().exponent, 0)))))
        yield from _multiples(part)


class Grammar:
    """One grammar, compiled."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher) -> None:
        self._grammars, self._matcher = grammars, matcher

    def start(self) -> GrammarState:
        return GrammarState(self._grammars, self._matcher.deep_copy())


class GrammarState:
    """Where an answer is in its grammar."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher) -> None:
        self._grammars, self._matcher = grammars, matcher
        self.is_over = False  # a stop id was said: whatever follows is dropped, and may be anything
        self._allowed: Words | None = None

    def copy(self) -> GrammarState:
        """At the same place; from here on its own."""
        other = GrammarState(self._grammars, self._matcher.deep_copy())
        other.is_over, other._allowed = self.is_over, self._allowed
        return other

    def allowed(self) -> Words | None:
        """uint32 [V / 32, rounded up]: bit v % 32 of word v // 32 says whether entry v may come next. None: any may.
        Raises GrammarError: the grammar is too complex to go on."""
        if self.is_over:
            return None
        if self._allowed is None:
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            if self._matcher.is_error():
                raise GrammarError(f"JSON schema: cannot go on ({_line(self._matcher.get_error())}); make it simpler")
            self._allowed = words[: self._grammars.words]
        return self._allowed

    def push(self, token: int) -> bool:
        """Go on by a token -> whether the grammar has it here. If not, nothing has changed."""
        if self.is_over:
            return True
        if token in self._grammars.tokenizer.eos_tokens:
            if not self._matcher.is_accepting():
                return False
            self.is_over = True
        elif self._matcher.try_consume_tokens([token]) != 1:
            if self._matcher.is_error():
                raise GrammarError(f"JSON schema: {_line(self._matcher.get_error())}; make it simpler")
            return False
        self._allowed = None
        return True
