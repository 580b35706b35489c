"""What of a growing text can be told to a reader already. Pure."""

from __future__ import annotations

from collections.abc import Sequence

REPLACEMENT = "\ufffd"
"""What decoders put where a character's bytes are not all there yet."""


class PieceCutter:
    """Cuts the text of one request into pieces that are never taken back.

    Held back are half characters at the end, and an end that may become one of the `stop` strings, since the text of
    the answer ends before those.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = stop
        self._told_chars = 0

    def cut(self, text: str) -> str:
        """The next piece of `text`, all that was generated so far; '' when nothing more is certain."""
        end = len(text.rstrip(REPLACEMENT))
        end = min((end, *(len(text) - _overlap(text, stop) for stop in self._stop)))
        return self._tell(text, end)

    def rest(self, text: str) -> str:
        """The last piece, `text` being the whole answer."""
        return self._tell(text, len(text))

    def _tell(self, text: str, end: int) -> str:
        piece = text[self._told_chars : end]
        self._told_chars = max(self._told_chars, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
