"""`PerformanceMonitor`: records into the fleet's performance data, and asks them, over any window that is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from muai_producers.connections import state_client
from muai_producers.errors import InvalidRequestError
from muai_producers.performance.bins import quantiles
from muai_producers.performance.buckets import floor_to
from muai_producers.performance.recorder import NullRecorder, StatisticsRecorder, recorder_for
from muai_producers.performance.report import (
    PerformanceReport,
    ResourceTrends,
    merged,
    report_of,
    resource_trend,
    series_figures,
)
from muai_producers.performance.series import Host, Series, Tally
from muai_producers.performance.store import PerformanceStore
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.performance.buckets import Level

MAX_POINTS = 120
ANYTHING = "*"


class PerformanceMonitor:
    """The fleet's performance data. Everything asked is of the whole fleet, not of this process.

    What was recorded shows within two seconds. Thread-safe.

    Args:
        recorder: takes in what `record_latency` is told; None: nothing is recorded here.
    Raises:
        redis.exceptions.RedisError: from all that asks, when the state store does not answer.
        InvalidRequestError: from all that asks: the window is not above 0, or longer than what is kept.
    """

    def __init__(
        self,
        store: Store,
        retention_s: int,
        recorder: StatisticsRecorder | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.data = PerformanceStore(store, retention_s)
        self.retention_s = retention_s
        self._recorder = recorder or NullRecorder()
        self._wall_s = wall_s

    @classmethod
    def from_settings(cls, settings: Settings) -> PerformanceMonitor:
        """A monitor of the configured state store, which records too where the configuration says so."""
        client = state_client(settings.queue.state_url)
        store = Store(client, prefix=settings.queue.key_prefix)
        return cls(store, settings.monitoring.performance.retention_s, recorder_for(settings))

    def close(self) -> None:
        """Write what was recorded last."""
        self._recorder.close()

    # -- the specification's -------------------------------------------------------------------------------------

    def record_latency(self, operation: str, latency_ms: float, metadata: Mapping[str, Any] | None = None) -> None:
        """Record how long something took. Never raises, never waits.

        Args:
            metadata: `model`, `engine` and `task` say whose it is; anything else is passed over.
        """
        about = metadata or {}
        series = Series(*(str(about.get(name, "")).replace("\t", " ") for name in ("model", "engine", "task")))
        self._recorder.timed(series, operation, latency_ms)

    def get_percentiles(
        self, operation: str = "total", window_seconds: float = 60, *, model: str = ANYTHING, engine: str = ANYTHING
    ) -> dict[str, float]:
        """`p50`, `p95` and `p99` in milliseconds, each within one percent of the exact one; empty when there was none.

        Args:
            operation: `queue`, `batching`, `dispatch`, `inference` and `total` are recorded of every request; others
                by whoever calls `record_latency`.
        """
        tallies, _ = self._tallies(window_seconds, model, engine)
        values = quantiles(merged(tallies.values()).durations[operation], (0.5, 0.95, 0.99))
        return {} if values is None else dict(zip(("p50", "p95", "p99"), values, strict=True))

    def get_throughput(self, window_seconds: float = 60, *, model: str = ANYTHING, engine: str = ANYTHING) -> float:
        """Requests that ended, each second, over the window."""
        tallies, span_s = self._tallies(window_seconds, model, engine)
        return series_figures(Series(model, engine, ANYTHING), merged(tallies.values()), span_s).throughput_rps

    def get_resource_trends(self, window_seconds: float = 300) -> ResourceTrends:
        """CPU, memory and GPUs of every host over the window, in at most `MAX_POINTS` points each."""
        now_s = self._now(window_seconds)
        level = next(
            (one for one in self.data.levels if window_seconds / one.size_s <= MAX_POINTS), self.data.levels[-1]
        )
        return self._resources(now_s, window_seconds, level)

    # -- all at once ---------------------------------------------------------------------------------------------

    def report(self, window_seconds: float = 60, *, model: str = ANYTHING, engine: str = ANYTHING) -> PerformanceReport:
        """Everything that is known of the window: what `GET /api/v1/performance` answers, and what tuning reads."""
        now_s = self._now(window_seconds)
        tallies, span_s = self._tallies(window_seconds, model, engine, now_s)
        return report_of(tallies, self.get_resource_trends(window_seconds), now_s - span_s, now_s)

    def steps(self, series: Series, length_s: float) -> list[tuple[int, Tally]]:
        """One series minute by minute: when each minute began, and what was counted in it; minutes with nothing are
        left out."""
        now_s, minute = self._wall_s(), self.data.levels[1]
        return self._series_steps(series.member, now_s, length_s, minute)

    def series_since(self, since_s: float) -> list[Series]:
        """The series of requests that were seen since then."""
        return [one for one in self.data.members(since_s) if isinstance(one, Series)]

    # -- reading -------------------------------------------------------------------------------------------------

    def _now(self, window_seconds: float) -> float:
        if not 0 < window_seconds <= self.retention_s:
            raise InvalidRequestError(
                f"the window must be above 0 s and at most {self.retention_s} s, which is how long performance data "
                f"are kept; got {window_seconds:g}",
                {"field": "window_s", "retention_s": self.retention_s},
            )
        return self._wall_s()

    def _tallies(
        self, window_seconds: float, model: str, engine: str, now_s: float | None = None
    ) -> tuple[dict[Series, Tally], float]:
        """What was counted of each series, and the seconds that it covers."""
        now_s = self._now(window_seconds) if now_s is None else now_s
        since_s = now_s - window_seconds
        wanted = [
            series
            for series in self.series_since(since_s)
            if model in (ANYTHING, series.model) and engine in (ANYTHING, series.engine)
        ]
        found, begin_s = self.data.read(since_s, now_s, wanted)
        return {series: found[series.member] for series in wanted}, now_s - begin_s

    def _resources(self, now_s: float, window_s: float, level: Level) -> ResourceTrends:
        trends = []
        for host in self.data.members(now_s - window_s):
            if isinstance(host, Host):
                steps = self._series_steps(host.member, now_s, window_s, level)
                names = sorted({name for _, tally in steps for name in tally.percents})
                trends += [resource_trend(host, name, steps) for name in names]
        return ResourceTrends(
            window_s=window_s, step_s=level.size_s, trends=[trend for trend in trends if trend is not None]
        )

    def _series_steps(self, member: str, now_s: float, length_s: float, level: Level) -> list[tuple[int, Tally]]:
        """Buckets of one size; those that are not made yet are put together from the finer ones."""
        steps: dict[int, Tally] = {}
        for start_s, tally in self.data.each(now_s - length_s, now_s, member, level):
            steps.setdefault(floor_to(start_s, level.size_s), Tally()).add(tally)
        return sorted(steps.items())
