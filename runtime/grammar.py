"""Grammars that an answer must follow: JSON, with or without a schema, through llguidance.

    grammars = Grammars(Path("build/demo/cpu"), vocab_size=4096, stop_ids=[0, 1])
    state = grammars.json_schema({"type": "object"}).start()
    state.allowed()                # uint32 words, a bit for each vocabulary entry that may come next
    state.push(token)

The mask of a token depends on the tokens before it alone, so drafts do not change what is sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from export.errors import UserError

Words = NDArray[np.uint32]
# Between tokens of JSON: a blank, or a line's end and indentation. Any amount would let a model write blanks for ever.
WHITESPACE = r"( |\n {0,32})?"


class Grammars:
    """Of the tokenizer of an engine directory. stop_ids: what may end an answer, once it is complete. Raises UserError:
    a tokenizer that is not byte-level, no stop ids."""

    def __init__(self, directory: Path, vocab_size: int, stop_ids: Sequence[int]) -> None:
        path = directory / "tokenizer.json"
        if not stop_ids:
            raise UserError(f"{directory}: the checkpoint has no stop id, so JSON could not end; leave the format out")
        try:
            text = path.read_text(encoding="utf-8")
            self.tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=list(stop_ids))
        except ValueError as error:
            raise UserError(
                f"{path}: no grammar can be put on this tokenizer ({error}); leave the format out"
            ) from None
        self.words = -(-vocab_size // 32)

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | str) -> Grammar:
        """Raises UserError: no JSON, no schema, or one that uses what the library has not."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed)
            options: Any = {"whitespace_pattern": WHITESPACE}
            source = LLMatcher.grammar_from_json_schema(text, overrides=options)
        except (ValueError, RecursionError) as error:
            raise UserError(f"JSON schema: {error}; mend it") from None
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(source, self.tokenizer)
        if is_wrong:
            raise UserError(f"JSON schema: {messages[0].splitlines()[0]}; mend it, or leave that part out")
        return Grammar(self, source)


class Grammar:
    """One grammar, compiled when an answer starts."""

    def __init__(self, grammars: Grammars, source: str) -> None:
        self.grammars, self.source = grammars, source

    def start(self) -> GrammarState:
        return GrammarState(self.grammars, LLMatcher(self.grammars.tokenizer, self.source))


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
        Raises UserError: the grammar is too complex to go on."""
        if self.is_over:
            return None
        if self._allowed is None:
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            if self._matcher.is_error():
                reason = self._matcher.get_error().splitlines()[0]
                raise UserError(f"JSON schema: cannot go on ({reason}); make it simpler")
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
            return False
        self._allowed = None
        return True
