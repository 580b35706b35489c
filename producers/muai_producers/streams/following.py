"""One reader of one request: its feed, its way through the text, and the end."""

from __future__ import annotations

from muai_producers.errors import MuaiError
from muai_producers.store import StoredState, outcome_of
from muai_producers.streams.listening import StreamListener, Wake
from muai_producers.streams.text import Offset, Reading, StreamEvent


class Follower:
    """Gives a reader its events, as far as they are there.

    Args:
        after: the offset of the last event that the reader has seen; None: none.
        wake: called, from another thread, when there may be more.
    Raises:
        InvalidRequestError: `after` is no offset.
    """

    def __init__(self, listener: StreamListener, request_id: str, after: str | None, wake: Wake) -> None:
        self._reading = Reading(None if after is None else Offset.parse(after))
        self._subscription = listener.subscribe(request_id, wake)
        self.finished = False
        self.error: MuaiError | None = None
        """What the request ended with, if it ended without a result."""

    def take(self) -> list[StreamEvent]:
        """The events since the last call; after the last of them `finished` is true."""
        feed = self._subscription.feed
        if feed.state is None:
            return self._reading.take(feed.log)
        outcome = outcome_of(feed.state)
        self.finished = True
        if isinstance(outcome, MuaiError):
            self.error = outcome
            return self._reading.take(feed.log)
        text = outcome.outputs.get("text")
        events = self._reading.finish(text) if isinstance(text, str) else []
        return [*events, StreamEvent("result", self._reading.offset, result=outcome)]

    @property
    def offset(self) -> str:
        """How far the reader has come."""
        return self._reading.offset

    @property
    def state(self) -> StoredState | None:
        """The terminal state, once the reader has come to it."""
        return self._subscription.feed.state if self.finished else None

    def close(self) -> None:
        """Hear no more."""
        self._subscription.close()
