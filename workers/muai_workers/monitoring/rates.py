"""What follows from counters over time: throughput, and the share of requests that the cache helped. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from muai_producers.monitoring import instruments
from muai_producers.monitoring.outcomes import SUCCESS
from muai_producers.monitoring.recorder import Series

THROUGHPUT_WINDOW_S = 30.0
CACHE_WINDOW_S = 300.0


class Rates:
    """Keeps the counters of the last minutes. Times are seconds of one clock, passed in."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[Series, float]]] = deque()

    def add(self, now_s: float, counters: Mapping[Series, float]) -> dict[Series, float]:
        """Take in the counters as they stand; returns the gauges that follow from them."""
        kept = {series: value for series, value in counters.items() if series[0] in WANTED}
        self._seen.append((now_s, kept))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - CACHE_WINDOW_S:
            self._seen.popleft()
        return self._throughput(now_s, kept) | self._hit_rates(now_s, kept)

    def _throughput(self, now_s: float, now: Mapping[Series, float]) -> dict[Series, float]:
        then_s, then = self._at(now_s - THROUGHPUT_WINDOW_S)
        served: dict[Series, float] = {}
        for (name, labels), value in now.items():
            if name == instruments.REQUESTS.name and labels[2] == SUCCESS:
                series = (instruments.THROUGHPUT.name, labels[:1])
                more = max(0.0, value - then.get((name, labels), 0.0)) if now_s > then_s else 0.0
                served[series] = served.get(series, 0.0) + more
        return {series: more / max(now_s - then_s, 1e-9) for series, more in served.items()}

    def _hit_rates(self, now_s: float, now: Mapping[Series, float]) -> dict[Series, float]:
        _, then = self._at(now_s - CACHE_WINDOW_S)
        rates: dict[Series, float] = {}
        for (name, labels), hits in now.items():
            if name not in (instruments.KV_HITS.name, instruments.KV_MISSES.name):
                continue
            hit, miss = (instruments.KV_HITS.name, labels), (instruments.KV_MISSES.name, labels)
            hits, misses = now.get(hit, 0.0), now.get(miss, 0.0)
            new_hits, new_misses = hits - then.get(hit, 0.0), misses - then.get(miss, 0.0)
            if new_hits >= 0 and new_misses >= 0 and new_hits + new_misses > 0:
                hits, misses = new_hits, new_misses
            if hits + misses > 0:
                rates[instruments.KV_CACHE_HIT_RATE.name, labels] = hits / (hits + misses)
        return rates

    def _at(self, then_s: float) -> tuple[float, Mapping[Series, float]]:
        """The counters at `then_s`, or the oldest that are known."""
        found = self._seen[0]
        for entry in self._seen:
            if entry[0] > then_s:
                break
            found = entry
        return found


WANTED = frozenset({instruments.REQUESTS.name, instruments.KV_HITS.name, instruments.KV_MISSES.name})
