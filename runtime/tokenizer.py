"""Text <-> token ids, with the tokenizer that came with the checkpoint.

tokenizer = Tokenizer(Path("build/demo/cpu")); ids = tokenizer.encode("def main():")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    def stream(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text of each token, special tokens left out, as soon as it is whole: a character that is split over
        tokens comes with its last one, and as U+FFFD if the text ends inside it."""
        ids = prompt[-CONTEXT:]  # a token may read differently at the start of a text than after others
        text = self._decode(ids)
        shown = len(text.rstrip(UNFINISHED))
        for token in tokens:
            ids.append(token)
            text = self._decode(ids)
            if text.endswith(UNFINISHED):
                yield ""
                continue
            yield text[shown:]
            shown = len(text)
            if len(ids) > 4 * CONTEXT:
                ids = ids[-CONTEXT:]
                shown = len(self._decode(ids))
        if text[shown:].rstrip(UNFINISHED) != text[shown:]:
            yield text[shown:]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
