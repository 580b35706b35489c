"""What an engine is doing, for whoever watches that it does something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeVar

Event = TypeVar("Event")


class EngineActivity:
    """Counts what is in an engine and what comes out of it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.in_flight = 0
        """Requests that are in the engine."""
        self.progress = 0
        """Answers and pieces that it has given since the start."""

    def watching(self, num_requests: int, events: Iterator[Event]) -> Iterator[Event]:
        """Pass on what comes of a run of so many requests."""
        with self._lock:
            self.in_flight += num_requests
        try:
            for event in events:
                with self._lock:
                    self.progress += 1
                yield event
        finally:
            with self._lock:
                self.in_flight -= num_requests
