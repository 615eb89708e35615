"""Text <-> token ids, with the tokenizer that came with the checkpoint.

tokenizer = Tokenizer(Path("build/demo/cpu")); ids = tokenizer.encode("def main():")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from export.errors import UserError

CONTEXT = 16  # tokens
UNFINISHED = "\ufffd"


class Tokenizer:
    """The tokenizer.json of an engine directory. Raises UserError where there is none."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: missing, the checkpoint came without a tokenizer; use --token-ids")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer ({error}); get it again from the checkpoint") from None

    def encode(self, text: str) -> list[int]:
        """Special tokens written out in the text count as such; none are added. Raises UserError: not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the prompt is not valid UTF-8 text; convert it") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, which need not be whole characters."""
        return self._bytes([token])

    @functools.cached_property
    def _bytes(self) -> Callable[[list[int]], bytes]:
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(self._tokenizer.to_str()).decode_bytes
        except ValueError:  # not byte-level: then tokens are whole characters
            return lambda ids: self._decode(ids).encode()

    def stream(self, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text of each token, special tokens left out, as soon as it is whole: a character that is split over
        tokens comes with its last one, and as U+FFFD if the text ends inside it."""
        text = Detokenizer(self, prompt)
        for token in tokens:
            yield text.push(token)
        yield text.rest()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Detokenizer:
    """Tokens that follow a prompt -> their text, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer._decode
        self._set(list(prompt[-CONTEXT:]))  # a token may read differently at the start of a text than after others

    def _set(self, ids: list[int]) -> None:
        self._ids, self._text = ids, self._decode(ids)
        self._shown = self._whole()

    def _whole(self) -> int:
        """Characters that stay as they are: bytes that may still become one read as a single U+FFFD, at the end."""
        return len(self._text) - self._text.endswith(UNFINISHED)

    def push(self, token: int) -> str:
        """What a further token completes, perhaps nothing yet."""
        self._ids.append(token)
        self._text = self._decode(self._ids)
        whole = self._whole()
        text = self._text[self._shown : whole]
        self._shown = max(whole, self._shown)
        if len(self._ids) > 4 * CONTEXT:
            self._set(self._ids[-CONTEXT:])
        return text

    def rest(self) -> str:
        """At the end: a character that stays unfinished."""
        return self._text[self._shown :]
