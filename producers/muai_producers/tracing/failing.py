"""When tracing is paused because its collector does not answer: pure."""

from __future__ import annotations

PAUSE_S = 15.0


class Breaker:
    """Tracing is paused after an export has failed, and tried again a while later.

    While it is paused no request is chosen for tracing and no span kept: a collector that is down costs nothing.
    """

    def __init__(self, pause_s: float = PAUSE_S) -> None:
        self._pause_s = pause_s
        self._until_s = 0.0
        self.failures = 0
        self.error: str | None = None

    def is_open(self, now_s: float) -> bool:
        """Whether tracing is paused."""
        return now_s < self._until_s

    def failed(self, error: str, now_s: float) -> bool:
        """An export has failed; True when the one before it had not."""
        is_news = self.error is None
        self.failures += 1
        self.error = error
        self._until_s = now_s + self._pause_s
        return is_news

    def succeeded(self) -> bool:
        """An export has gone well; True when the one before it had not."""
        is_news = self.error is not None
        self.error = None
        self._until_s = 0.0
        return is_news
