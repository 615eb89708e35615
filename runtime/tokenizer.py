"""Text <-> token ids, with the tokenizer that came with the checkpoint.

tokenizer = Tokenizer(Path("build/demo/cpu")); ids = tokenizer.encode("def main():")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from export.errors import UserError


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
        """Special tokens written out in the text count as such; none are added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        """The text of each token as soon as it is whole: a character split over tokens comes with its last one."""
        stream = DecodeStream(ids=prompt[-16:], skip_special_tokens=True)
        for token in tokens:
            yield stream.step(self._tokenizer, token) or ""
