"""The end of a text where a stop string begins, wherever tokens are split.

text = StopStrings(("\\n\\n", "###"))
text.push(Segment("a\\n", draft=0)); list(text.take())     # "a": the line's end may be the beginning of a stop string
text.push(Segment("\\n", draft=1)); text.is_over           # True
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A token's part of the text. draft: the position of the draft that was right, from 1; 0: the main model's own."""

    text: str
    draft: int


class StopStrings:
    """Segments in, segments out, held back as long as they may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._waiting: deque[Segment] = deque()
        self._text = ""  # of what waits
        self.is_over = False  # a stop string was found: it and what follows is dropped

    def push(self, segment: Segment) -> None:
        if self.is_over or not segment.text:
            return
        self._waiting.append(segment)
        self._text += segment.text
        starts = [start for start in map(self._text.find, self._stop) if start >= 0]
        if starts:
            self.is_over = True
            self._text = self._text[: min(starts)]

    def end(self, rest: str) -> None:
        """No more comes but `rest`: nothing waits any longer."""
        self.push(Segment(rest, 0))
        self._stop = ()

    def take(self) -> Iterator[Segment]:
        """What is certain by now."""
        held = 0 if self.is_over else max((self._overlap(stop) for stop in self._stop), default=0)
        count = len(self._text) - held
        self._text = self._text[count:]
        while count and self._waiting:
            segment = self._waiting.popleft()
            if len(segment.text) > count:
                self._waiting.appendleft(segment._replace(text=segment.text[count:]))
                segment = segment._replace(text=segment.text[:count])
            count -= len(segment.text)
            yield segment

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text with which the stop string begins."""
        longest = min(len(stop) - 1, len(self._text))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._text[-n:])), 0)
