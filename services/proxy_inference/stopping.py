"""From tokens' bytes to text that may be shown: whole characters, and no part of a stop string.

Pure. What could still become a stop string, or is half a character, is held back until it is
decided.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shown:
    """Text that became visible, and where in the text each token began that became so with it."""

    text: str
    starts: tuple[int, ...] = ()


class Writer:
    """One answer's text."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._length = 0
        """Characters shown so far."""
        self._starts: deque[int] = deque()
        """Where each token begins that is not visible yet."""
        self.stopped = False
        """A stop string came: nothing is shown any more."""

    def write(self, data: bytes) -> Shown:
        """Take one token's bytes."""
        if self.stopped:
            return Shown("")
        self._starts.append(self._length + len(self._held))
        return self._take(self._decoder.decode(data))

    def finish(self) -> Shown:
        """The text is over: what was held back is shown, unless a stop string came."""
        if self.stopped:
            return Shown("")
        found = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return found
        rest, self._held = self._held, ""
        self._length += len(rest)
        starts = found.starts + tuple(self._starts)
        self._starts.clear()
        return Shown(found.text + rest, starts)

    def _take(self, text: str) -> Shown:
        if not text:
            return Shown("")
        self._held += text
        at = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            shown, self._held = self._held[:at], ""
        else:
            kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - kept
            shown, self._held = self._held[:cut], self._held[cut:]
        self._length += len(shown)
        starts: list[int] = []
        while self._starts and self._starts[0] < self._length:
            starts.append(self._starts.popleft())
        return Shown(shown, tuple(starts))


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
