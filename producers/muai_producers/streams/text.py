"""What is told of a growing text: to the stream by the worker, and from the stream to each reader. Pure.

A request may be run more than once: in a smaller batch, on another worker, on the next engine. Each run begins its
text anew. `Retelling` keeps the stream free of repetition; `Reading` does the same for one reader, from whatever point
it had come to, and in the end holds it to the text of the result, which alone is the truth.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from muai_producers.errors import InvalidRequestError
from muai_producers.wire import InferenceResult

DIGEST_BYTES = 6
_OFFSET = re.compile(r"([0-9]{1,12})-([0-9a-f]{12})")


class Change(NamedTuple):
    """What a stream is to be told next."""

    restarts: bool
    """What was told is void; `text` is the new beginning."""
    text: str


class Retelling:
    """Text that arrives again from its beginning at each attempt, told once.

    Args:
        told: what the stream holds by now; None: nobody knows, so that whatever comes is a new beginning.
    """

    def __init__(self, told: str | None = "") -> None:
        self._told = [told or ""]
        self._is_unknown = told is None
        self._before = told or ""
        """What earlier attempts told, with which this one is compared."""
        self._repeated_chars = 0
        """How far this attempt has repeated `_before`."""

    def begin(self) -> None:
        """An attempt begins, and with it the text."""
        self._before = "".join(self._told)
        self._told = [self._before]
        self._repeated_chars = 0

    def add(self, piece: str) -> Change | None:
        """The next piece of this attempt's text; returns what of it is news."""
        if self._is_unknown:
            self._is_unknown = False
            return self._restart(piece)
        left = len(self._before) - self._repeated_chars
        if left <= 0:
            self._told.append(piece)
            return Change(False, piece)
        if self._before.startswith(piece[:left], self._repeated_chars):
            self._repeated_chars += min(left, len(piece))
            news = piece[left:]
            if not news:
                return None
            self._told.append(news)
            return Change(False, news)
        return self._restart(self._before[: self._repeated_chars] + piece)

    def _restart(self, text: str) -> Change:
        self._told = [text]
        self._before = ""
        self._repeated_chars = 0
        return Change(True, text)


class TextLog:
    """One beginning of a text and what was added to it. Grows at its end only, so any thread may read it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.num_chars = 0

    def append(self, text: str) -> None:
        self.texts.append(text)
        self.num_chars += len(text)


@dataclass(frozen=True)
class Offset:
    """How far a reader has come: as many characters, and a digest of them.

    It names text, not a place in some log: a text that begins with the same characters can be read on from there,
    wherever it comes from, and one that does not is found out.
    """

    num_chars: int
    digest: str

    def __str__(self) -> str:
        return f"{self.num_chars}-{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Offset:
        """Inverse of `str`.

        Raises:
            InvalidRequestError: `text` is no offset.
        """
        match = _OFFSET.fullmatch(text)
        if match is None:
            raise InvalidRequestError(
                f"{text[:40]!r} is no offset of a stream; take one from an event of it", {"field": "after"}
            )
        return cls(int(match[1]), match[2])

    def begins(self, text: str) -> bool:
        """Whether `text` begins with what was read."""
        return len(text) >= self.num_chars and _digest(text[: self.num_chars]).hexdigest() == self.digest


def _digest(text: str) -> hashlib.blake2b:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES)


@dataclass(frozen=True)
class StreamEvent:
    """One thing that a reader is told.

    `text`: some more text. `restart`: what was told so far is void, and the text begins anew; it happens when a
    request is run again and its text comes out otherwise. `result`: the end.
    """

    kind: Literal["text", "restart", "result"]
    offset: str
    """Where to read on from after this event; see `InferenceClient.stream`."""
    text: str = ""
    """Of `text`."""
    result: InferenceResult | None = None
    """Of `result`."""


class Reading:
    """One reader's way through a text.

    Args:
        after: what the reader has read already, of an earlier connection.
    """

    def __init__(self, after: Offset | None = None) -> None:
        self._after = after if after is not None and after.num_chars else None
        self._log: TextLog | None = None
        self._num_taken = 0
        """Of the log's texts."""
        self._start()

    def _start(self) -> None:
        self._num_chars = 0
        self._hash = _digest("")

    @property
    def offset(self) -> str:
        """How far the reader has come."""
        if self._log is None and self._after is not None:
            return str(self._after)
        return str(Offset(self._num_chars, self._hash.hexdigest()))

    def take(self, log: TextLog) -> list[StreamEvent]:
        """What is new to the reader; another log than before is a text that was begun anew."""
        texts = log.texts[self._num_taken :] if log is self._log else log.texts[:]
        news = "".join(texts)
        if not news:
            return []
        is_same, is_first = log is self._log, self._log is None
        self._log = log
        self._num_taken = self._num_taken + len(texts) if is_same else len(texts)
        if is_same:
            return self._tell(news)
        if is_first:
            return self._resume(news)
        return [*self._restart(), *self._tell(news)]

    def finish(self, text: str) -> list[StreamEvent]:
        """What the reader lacks of the whole text, that of the result."""
        if self._log is None:
            return self._resume(text)
        told = "".join(self._log.texts[: self._num_taken])
        if text.startswith(told):
            return self._tell(text[len(told) :])
        return [*self._restart(), *self._tell(text)]

    def _resume(self, text: str) -> list[StreamEvent]:
        if self._after is None:
            return self._tell(text)
        if not self._after.begins(text):
            return [*self._restart(), *self._tell(text)]
        known = text[: self._after.num_chars]
        self._advance(known)
        return self._tell(text[len(known) :])

    def _restart(self) -> list[StreamEvent]:
        self._start()
        return [StreamEvent("restart", str(Offset(0, self._hash.hexdigest())))]

    def _tell(self, text: str) -> list[StreamEvent]:
        if not text:
            return []
        self._advance(text)
        return [StreamEvent("text", str(Offset(self._num_chars, self._hash.hexdigest())), text)]

    def _advance(self, text: str) -> None:
        self._num_chars += len(text)
        self._hash.update(text.encode("utf-8", "surrogatepass"))
