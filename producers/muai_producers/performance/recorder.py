"""Recording: each batch costs a few dictionary lookups, and a thread adds the counts to the state store each second.

A state store that does not answer costs nothing but counts: they are held for `MAX_LATE_S`, then given up. Nobody who
records ever waits for it.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from muai_producers.connections import state_client
from muai_producers.monitoring.guard import guarded
from muai_producers.performance.buckets import FINEST, MAX_LATE_S
from muai_producers.performance.fitting import counted
from muai_producers.performance.series import ATTEMPT, ERROR, MAX_OPERATIONS, STAGES, Series, Tally
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.performance.store import PerformanceStore

log = logging.getLogger(__name__)
FLUSH_EVERY_S = 1.0
CLOSE_LIMIT_S = 3.0
_QUEUE, _BATCHING, _DISPATCH, _INFERENCE, _TOTAL = STAGES


class StatisticsRecorder(Protocol):
    """What takes figures in. Never raises, never waits."""

    def arrived(self, model: str, task: str, count: int = 1) -> None:
        """A collector has taken in so many requests."""
        ...

    def served(
        self,
        series: Series,
        stages_ms: Sequence[Sequence[float]],
        input_tokens: int = 0,
        output_tokens: int = 0,
        cache_hits: int = 0,
    ) -> None:
        """Requests have their results.

        Args:
            stages_ms: for each of `STAGES`, in that order, how long it took of each request.
            input_tokens: of all of them; so are the other counts.
        """
        ...

    def failed(self, series: Series, code: str, total_ms: float | None = None) -> None:
        """A request has ended in an error of that code."""
        ...

    def attempt_failed(self, series: Series, code: str) -> None:
        """An engine did not serve a request, which goes on elsewhere or ends by another word."""
        ...

    def ran(self, series: Series, size: int, took_s: float, *, useful_tokens: int = 0, padded_tokens: int = 0) -> None:
        """A batch was run.

        Args:
            padded_tokens: with the padding; 0 where nothing is padded.
        """
        ...

    def timed(self, series: Series, operation: str, latency_ms: float) -> None:
        """Anything else took this long."""
        ...

    def used(self, member: str, percent_by_resource: Mapping[str, float]) -> None:
        """So much of a host's resources was in use."""
        ...

    def close(self) -> None:
        """Write what is left, for as long as `CLOSE_LIMIT_S`."""
        ...


class NullRecorder:
    """Records nothing: performance data are switched off, or ddsketch is not installed."""

    def arrived(self, model: str, task: str, count: int = 1) -> None:
        """Nothing."""

    def served(
        self,
        series: Series,
        stages_ms: Sequence[Sequence[float]],
        input_tokens: int = 0,
        output_tokens: int = 0,
        cache_hits: int = 0,
    ) -> None:
        """Nothing."""

    def failed(self, series: Series, code: str, total_ms: float | None = None) -> None:
        """Nothing."""

    def attempt_failed(self, series: Series, code: str) -> None:
        """Nothing."""

    def ran(self, series: Series, size: int, took_s: float, *, useful_tokens: int = 0, padded_tokens: int = 0) -> None:
        """Nothing."""

    def timed(self, series: Series, operation: str, latency_ms: float) -> None:
        """Nothing."""

    def used(self, member: str, percent_by_resource: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class StoreRecorder:
    """Records into the state store. Thread-safe; its thread starts with the first figure.

    Args:
        wall_s: wall-clock seconds.
    """

    def __init__(self, target: PerformanceStore, wall_s: Callable[[], float] = time.time) -> None:
        from muai_producers.performance.bins import bin_of, binned

        self._target = target
        self._wall_s = wall_s
        self._bin_of, self._binned = bin_of, binned
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._open: dict[tuple[int, str], Tally] = {}
        self._calls: deque[tuple[float, list[Any]]] = deque()
        """Until when each is worth trying, in wall-clock seconds, and the call."""
        self._operations: set[str] = set()
        """Names beside the stages'."""
        self._members: dict[Series, str] = {}
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self.lost = 0
        """Calls that were given up."""

    # -- what is recorded ----------------------------------------------------------------------------------------

    def arrived(self, model: str, task: str, count: int = 1) -> None:
        with self._lock:
            self._tally(Series(model, "", task)).counters["arrived"] += count

    def served(
        self,
        series: Series,
        stages_ms: Sequence[Sequence[float]],
        input_tokens: int = 0,
        output_tokens: int = 0,
        cache_hits: int = 0,
    ) -> None:
        bins = [self._binned(times_ms) for times_ms in stages_ms]
        with self._lock:
            tally = self._tally(series)
            durations, counters = tally.durations, tally.counters
            for stage, counts in zip(STAGES, bins, strict=True):
                known = durations[stage]
                for key, count in counts.items():
                    known[key] += count
            counters["ok"] += len(stages_ms[0])
            counters["input_tokens"] += input_tokens
            counters["output_tokens"] += output_tokens
            if cache_hits:
                counters["cache_hits"] += cache_hits

    def failed(self, series: Series, code: str, total_ms: float | None = None) -> None:
        with self._lock:
            tally = self._tally(series)
            tally.counters[ERROR + code] += 1
            if total_ms is not None:
                tally.durations[_TOTAL][self._bin_of(total_ms)] += 1

    def attempt_failed(self, series: Series, code: str) -> None:
        with self._lock:
            self._tally(series).counters[ATTEMPT + code] += 1

    def ran(self, series: Series, size: int, took_s: float, *, useful_tokens: int = 0, padded_tokens: int = 0) -> None:
        took_us = int(took_s * 1e6)
        with self._lock:
            tally = self._tally(series)
            tally.sizes[size] += 1
            tally.counters["useful_tokens"] += useful_tokens if padded_tokens else 0
            tally.counters["padded_tokens"] += padded_tokens
            for name, more in counted(size, took_us, padded_tokens):
                tally.counters[name] += more

    def timed(self, series: Series, operation: str, latency_ms: float) -> None:
        with self._lock:
            self._tally(series).durations[self._known(operation)][self._bin_of(latency_ms)] += 1

    def used(self, member: str, percent_by_resource: Mapping[str, float]) -> None:
        with self._lock:
            tally = self._tally_of(member)
            for resource, percent in percent_by_resource.items():
                tally.percents[resource][round(min(max(percent, 0.0), 100.0))] += 1

    def _known(self, operation: str) -> str:
        if operation not in STAGES and operation not in self._operations:
            if len(self._operations) >= MAX_OPERATIONS:
                return "other"
            self._operations.add(operation)
        return operation

    def _tally(self, series: Series) -> Tally:
        member = self._members.get(series)
        if member is None:
            member = self._members.setdefault(series, series.member)
        return self._tally_of(member)

    def _tally_of(self, member: str) -> Tally:
        key = (int(self._wall_s() // FINEST.size_s) * FINEST.size_s, member)
        tally = self._open.get(key)
        if tally is None:
            tally = self._open[key] = Tally()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="muai-statistics", daemon=True)
                self._thread.start()
        return tally

    # -- what is written -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(FLUSH_EVERY_S):
            self.flush()

    def flush(self) -> None:
        """Write what was recorded; what the state store does not take now is tried again."""
        with guarded("statistics"), self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            taken, self._open = self._open, {}
        now_s = self._wall_s()
        self._calls.extend((now_s + MAX_LATE_S, call) for call in self._target.calls(taken))
        while self._calls and self._calls[0][0] < now_s:
            self._calls.popleft()
            self.lost += 1
        while self._calls:
            self._target.call(self._calls[0][1])
            self._calls.popleft()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_LIMIT_S)
            if not self._thread.is_alive():
                self.flush()


def recorder_for(settings: Settings) -> StatisticsRecorder:
    """The recorder that the configuration asks for, on a connection of its own that gives up soon."""
    monitoring = settings.monitoring
    if not (monitoring.enabled and monitoring.performance.enabled):
        return NullRecorder()
    if importlib.util.find_spec("ddsketch") is None:
        log.info("no performance data are recorded here: that needs pip install 'muai[monitoring]'")
        return NullRecorder()
    from muai_producers.performance.store import PerformanceStore

    client = state_client(settings.queue.state_url, timeout_s=1.0, retries=0)
    store = Store(client, prefix=settings.queue.key_prefix)
    return StoreRecorder(PerformanceStore(store, monitoring.performance.retention_s))
