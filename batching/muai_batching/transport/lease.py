"""When is a consumer dead? A pure judgement over heartbeats as one observer sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


def consumer_name(host: str, pid: int, nonce: str, lease_ttl_s: float) -> str:
    """A consumer's id. It carries the consumer's lease, so that an observer set to a shorter one waits for it."""
    return f"{host}:{pid}:{nonce}@{lease_ttl_s:g}s"


def declared_ttl_s(consumer: str) -> float:
    """The lease in a consumer's id; 0 when there is none."""
    found = re.search(r"@([0-9.e+-]+)s$", consumer)
    return float(found[1]) if found else 0.0


@dataclass
class _Sighting:
    count: int
    unchanged_s: float = 0.0


class LeaseObserver:
    """Watches heartbeat counters by the observer's own monotonic clock; no clock is ever compared with another's.

    Time in which the observer itself did not look (it was stopped, or Redis was away) proves nothing about the
    others: between two looks at most `lease_ttl_s / 2` is counted, so a verdict takes at least three looks.
    """

    def __init__(self, lease_ttl_s: float) -> None:
        self.lease_ttl_s = lease_ttl_s
        self._sightings: dict[str, _Sighting] = {}
        self._last_look_s: float | None = None

    def observe(self, beats: Mapping[str, int], now_s: float) -> list[tuple[str, int]]:
        """Take in all counters; return `(consumer, count)` of those given up, or unchanged for `lease_ttl_s` and for
        the lease in their own names."""
        last = self._last_look_s
        gap_s = 0.0 if last is None else min(max(now_s - last, 0.0), self.lease_ttl_s / 2)
        self._last_look_s = now_s
        self._sightings = {consumer: self._look(consumer, count, gap_s) for consumer, count in beats.items()}
        return [
            (consumer, seen.count)
            for consumer, seen in self._sightings.items()
            if seen.count < 0 or seen.unchanged_s >= max(self.lease_ttl_s, declared_ttl_s(consumer))
        ]

    def _look(self, consumer: str, count: int, gap_s: float) -> _Sighting:
        seen = self._sightings.get(consumer)
        if seen is None or seen.count != count:
            return _Sighting(count)
        seen.unchanged_s += gap_s
        return seen
