"""Monitoring never hurts: whatever it raises ends here, is counted and logged, and shows in the health check.

    with guarded("metrics"):
        ...                       # a failure in here leaves the block, and nothing else happens

    @guarded("traces")
    def export() -> Spans | None: # a failure makes it return None
        ...

A part that cannot do its work at all, such as a page whose port is taken, says so with `report`, until `clear`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

log = logging.getLogger(__name__)
Part = Literal["metrics", "traces", "alerts", "statistics", "logs"]
"""metrics: recording, sending and showing them; traces: spans and their export; alerts: finding and sending them;
statistics: performance data and tuning; logs: files and what keeps them in bounds."""
PARTS: tuple[Part, ...] = ("metrics", "traces", "alerts", "statistics", "logs")
REMEMBERED_S = 60.0
"""A part counts as degraded for so long after a failure."""
LOG_EVERY_S = 60.0
"""Of one part's failures, at most one in this time is logged."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Standing:
    failures: int = 0
    failed_s: float | None = None
    """Monotonic seconds of the last failure."""
    last: str = ""
    reported: str | None = None
    logged_s: float | None = None
    unlogged: int = 0


class Standings:
    """How each part of this process's monitoring does. Thread-safe; a process has one, below.

    Args:
        monotonic_s: the clock.
    """

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._by_part: dict[str, _Standing] = {}

    def fail(self, part: Part, error: BaseException) -> None:
        """Count a failure; log it, unless one of the same part was logged within `LOG_EVERY_S`."""
        now_s = self._monotonic_s()
        with self._lock:
            standing = self._by_part.setdefault(part, _Standing())
            standing.failures += 1
            standing.failed_s, standing.last = now_s, f"{type(error).__name__}: {error}"[:300]
            is_due = standing.logged_s is None or now_s - standing.logged_s >= LOG_EVERY_S
            unlogged, standing.unlogged = (standing.unlogged, 0) if is_due else (0, standing.unlogged + 1)
            if is_due:
                standing.logged_s = now_s
        if is_due:
            more = f" ({unlogged} more since the last such line)" if unlogged else ""
            log.warning("%s failed, requests go on: %s%s", part, error, more, exc_info=error)

    def report(self, part: Part, reason: str) -> None:
        """Say that a part cannot do its work; logged when it is news."""
        with self._lock:
            standing = self._by_part.setdefault(part, _Standing())
            is_news, standing.reported = standing.reported != reason, reason
        if is_news:
            log.warning("%s degraded, requests go on: %s", part, reason)

    def clear(self, part: Part) -> None:
        """Say that a part does its work again."""
        with self._lock:
            standing = self._by_part.setdefault(part, _Standing())
            reason, standing.reported = standing.reported, None
        if reason is not None:
            log.info("%s: no longer degraded (%s)", part, reason)

    def degraded(self) -> Mapping[str, str]:
        """The parts that are degraded now, with the reason."""
        now_s, found = self._monotonic_s(), {}
        with self._lock:
            for part, standing in self._by_part.items():
                if standing.reported is not None:
                    found[part] = standing.reported
                elif standing.failed_s is not None and now_s - standing.failed_s < REMEMBERED_S:
                    found[part] = standing.last
        return found

    def failures(self) -> Mapping[str, int]:
        """Failures by part, since the process began."""
        with self._lock:
            return {part: standing.failures for part, standing in self._by_part.items() if standing.failures}


standings = Standings()
"""This process's."""


class guarded:  # noqa: N801 - reads as the keyword that it stands for
    """As a block or as a decorator: what is raised inside is swallowed, counted and logged.

    Not swallowed is what ends a process: `KeyboardInterrupt`, `SystemExit` and what else is no `Exception`. A decorated
    function returns None when it failed. May be entered by any number of threads at once. Coroutines want the block.
    """

    def __init__(self, part: Part, standings: Standings = standings) -> None:
        self._part = part
        self._standings = standings

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self._standings.fail(self._part, error)
        return True

    def __call__(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """The function, guarded."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
            with self:
                return function(*args, **kwargs)
            return None

        return call
