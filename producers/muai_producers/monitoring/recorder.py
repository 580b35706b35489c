"""What this process has counted and not handed on yet.

Recording is a few additions under a lock, and never raises: call it once a batch, not once a request, where that is
possible. Somebody takes what has gathered with `take`, at most one taker a process: the `MetricsPusher`, or a page of
the process's own.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.instruments import OTHER, Instrument

MAX_LABEL_CHARS = 128
Labels = tuple[str, ...]
Series = tuple[str, Labels]
"""Instrument's name, and its label values in order."""
Reading = tuple[Instrument, Labels, float]
"""A gauge as it stands."""
Sampler = Callable[[], Iterable[Reading]]


@dataclass
class Gathered:
    """Increases since the last look."""

    counters: dict[Series, float] = field(default_factory=dict)
    histograms: dict[Series, list[float]] = field(default_factory=dict)
    """Per bucket its own count, the infinite one last; then the sum of what was observed."""

    def __bool__(self) -> bool:
        return bool(self.counters or self.histograms)

    def add(self, other: Gathered) -> None:
        """Add another's increases to these."""
        for series, amount in other.counters.items():
            self.counters[series] = self.counters.get(series, 0.0) + amount
        for series, cells in other.histograms.items():
            own = self.histograms.get(series)
            self.histograms[series] = [a + b for a, b in zip(own, cells, strict=True)] if own else list(cells)


def capped(instrument: Instrument, labels: Labels) -> Labels:
    """The series that counts for all those that are too many."""
    given = instrument.open or instrument.labels
    return tuple(OTHER if name in given else value for name, value in zip(instrument.labels, labels, strict=True))


class Recorder:
    """Gathers increases of counters and histograms, and asks its samplers for gauges. Thread-safe; nothing raises."""

    def __init__(self) -> None:
        self.enabled = True
        """False: whatever is recorded is forgotten at once."""
        self._lock = threading.Lock()
        self._gathered = Gathered()
        self._known: dict[str, set[Labels]] = {}
        self._gauges: dict[Series, Reading] = {}
        self._samplers: list[Sampler] = []

    @guarded("metrics")
    def count(self, instrument: Instrument, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        if not self.enabled or by <= 0:
            return
        with self._lock:
            series = self._series(instrument, labels)
            counters = self._gathered.counters
            counters[series] = counters.get(series, 0.0) + by

    @guarded("metrics")
    def observe(self, instrument: Instrument, *labels: str, values: Iterable[float]) -> None:
        """Add observations to a histogram."""
        if not self.enabled:
            return
        buckets = instrument.buckets
        with self._lock:
            cells = self._cells(instrument, labels)
            total = 0.0
            for value in values:
                cells[bisect_left(buckets, value)] += 1
                total += value
            cells[-1] += total

    @guarded("metrics")
    def observe_alike(self, instrument: Instrument, *labels: str, value: float, times: int) -> None:
        """Add the same observation several times."""
        if not self.enabled or times <= 0:
            return
        with self._lock:
            cells = self._cells(instrument, labels)
            cells[bisect_left(instrument.buckets, value)] += times
            cells[-1] += value * times

    @guarded("metrics")
    def set(self, instrument: Instrument, *labels: str, value: float) -> None:
        """Set a gauge; it stands until it is set again, or until this process is gone."""
        if not self.enabled:
            return
        with self._lock:
            series = self._series(instrument, labels)
            self._gauges[series] = (instrument, series[1], value)

    def sample_from(self, sampler: Sampler) -> None:
        """Ask `sampler` at each look; one that fails is counted, and asked again at the next."""
        with self._lock:
            self._samplers = [*self._samplers, sampler]

    def drop_sampler(self, sampler: Sampler) -> None:
        """Ask it no more."""
        with self._lock:
            self._samplers = [one for one in self._samplers if one != sampler]

    def take(self) -> Gathered:
        """What has gathered since the last call."""
        with self._lock:
            gathered, self._gathered = self._gathered, Gathered()
            return gathered

    def readings(self) -> list[Reading]:
        """The gauges as they stand now."""
        with self._lock:
            readings, samplers = list(self._gauges.values()), self._samplers
        for sampler in samplers:
            with guarded("metrics"):
                readings += sampler()
        return readings

    def _cells(self, instrument: Instrument, labels: Labels) -> list[float]:
        series = self._series(instrument, labels)
        cells = self._gathered.histograms.get(series)
        if cells is None:
            cells = self._gathered.histograms[series] = [0.0] * (len(instrument.buckets) + 2)
        return cells

    def _series(self, instrument: Instrument, labels: Labels) -> Series:
        known = self._known.setdefault(instrument.name, set())
        if labels not in known:
            labels = tuple(_tidy(value) for value in labels)
            if len(labels) != len(instrument.labels):
                raise ValueError(f"{instrument.name} has the labels {instrument.labels}, got {labels}")
            if labels not in known:
                if len(known) >= instrument.max_series:
                    return instrument.name, capped(instrument, labels)
                known.add(labels)
        return instrument.name, labels


def _tidy(value: str) -> str:
    """A label value as it may travel: of bounded length, without control characters."""
    if value.isprintable() and len(value) <= MAX_LABEL_CHARS:
        return value
    return "".join(char if char.isprintable() else "?" for char in value[:MAX_LABEL_CHARS])


recorder = Recorder()
"""This process's. Whoever starts a `MetricsPusher` or a page of the process's own sends it on."""
