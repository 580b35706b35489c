"""What this process has counted and not handed on yet.

Recording is a few additions under a lock, and never raises: call it once a batch, not once a request, where that is
possible. Somebody takes what has gathered with `take`, at most one taker a process: the `MetricsPusher`, or a page of
the process's own.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.instruments import OTHER, Instrument

MAX_LABEL_CHARS = 128
Labels = tuple[str, ...]
Series = tuple[str, Labels]
"""Instrument's name, and its label values in order."""
Reading = tuple[Instrument, Labels, float]
"""A gauge as it stands."""
Entry = tuple[Instrument, Labels, float | Sequence[float]]
"""A counter and its increase, or a histogram and what was observed."""
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
        self._known: set[Series] = set()
        self._num_series: dict[str, int] = {}
        self._gauges: dict[Series, Reading] = {}
        self._samplers: list[Sampler] = []

    @guarded("metrics")
    def record(self, *entries: Entry) -> None:
        """Add increases of counters and observations of histograms, all at once: what a batch costs is this call."""
        if not self.enabled:
            return
        with self._lock:
            counters, histograms, known = self._gathered.counters, self._gathered.histograms, self._known
            for instrument, labels, what in entries:
                series: Series = (instrument.name, labels)
                if series not in known:
                    series = self._admitted(instrument, labels)
                if isinstance(what, float | int):
                    if what > 0:
                        counters[series] = counters.get(series, 0.0) + what
                    continue
                cells = histograms.get(series)
                if cells is None:
                    cells = histograms[series] = [0.0] * (len(instrument.buckets) + 2)
                _observe(instrument.buckets, cells, what)

    def count(self, instrument: Instrument, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        self.record((instrument, labels, by))

    def observe(self, instrument: Instrument, *labels: str, values: Sequence[float]) -> None:
        """Add observations to a histogram."""
        self.record((instrument, labels, values))

    @guarded("metrics")
    def set(self, instrument: Instrument, *labels: str, value: float) -> None:
        """Set a gauge; it stands until it is set again, or until this process is gone."""
        if not self.enabled:
            return
        with self._lock:
            series = self._admitted(instrument, labels)
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

    def _admitted(self, instrument: Instrument, labels: Labels) -> Series:
        """The series that counts for these labels; its own, as long as there are not too many."""
        labels = tuple(_tidy(value) for value in labels)
        if len(labels) != len(instrument.labels):
            raise ValueError(f"{instrument.name} has the labels {instrument.labels}, got {labels}")
        series = (instrument.name, labels)
        if series in self._known:
            return series
        if self._num_series.get(instrument.name, 0) >= instrument.max_series:
            return instrument.name, capped(instrument, labels)
        self._num_series[instrument.name] = self._num_series.get(instrument.name, 0) + 1
        self._known.add(series)
        return series


def _observe(buckets: Sequence[float], cells: list[float], values: Sequence[float]) -> None:
    """Sorted, the values of a batch take a look for each bucket that they fall into, not one for each of them."""
    ordered, below = sorted(values), 0
    while below < len(ordered):
        place = bisect_left(buckets, ordered[below])
        upto = bisect_right(ordered, buckets[place], below) if place < len(buckets) else len(ordered)
        cells[place] += upto - below
        below = upto
    cells[-1] += sum(ordered)


def _tidy(value: str) -> str:
    """A label value as it may travel: of bounded length, without control characters."""
    if value.isprintable() and len(value) <= MAX_LABEL_CHARS:
        return value
    return "".join(char if char.isprintable() else "?" for char in value[:MAX_LABEL_CHARS])


recorder = Recorder()
"""This process's. Whoever starts a `MetricsPusher` or a page of the process's own sends it on."""
