"""Looking at the fleet: what the anomaly check judges, read from the state store and the broker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from muai_config.engines import ALL_ENGINES
from muai_config.queues import REQUEST_QUEUES, engine_queue
from muai_producers.errors import BrokerError
from muai_producers.fleet import Fleet, FleetView
from muai_producers.performance.bins import quantiles
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.report import ResourceTrends, SeriesFigures, merged, series_figures
from muai_producers.performance.series import Series, Tally
from muai_producers.queue_depths import QueueDepth, QueueReader, read_depths
from muai_producers.store import Store, read_entry
from muai_workers.monitoring.detector import Demand, GpuLook, Look, Minute, QueueLook

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
IN_FLIGHT_LOOKED_AT = 500
"""Of those in flight, chosen at random where there are more: the oldest of them is nearly the oldest of all."""
RESOURCES_S = 60.0
MINUTE_S = 60
VLLM = "vllm"


class FleetLook:
    """Takes a look at the fleet.

    Args:
        wall_s: wall-clock seconds.
    Raises:
        redis.exceptions.RedisError: from `take`, when the state store does not answer.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        monitor: PerformanceMonitor,
        queues: QueueReader,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._client: Any = store.client
        self._keys = store.keys
        self._fleet = Fleet(store)
        self._monitor = monitor
        self._queues = queues
        self._wall_s = wall_s

    def on_settings(self, settings: Settings) -> None:
        """Look as these settings say from now on."""
        self._settings = settings

    def take(self) -> Look:
        """Look now."""
        anomaly = self._settings.monitoring.anomaly
        report = self._monitor.report(anomaly.window_s)
        view = self._fleet.view(ALL_ENGINES)
        demand, by_model = self._demand()
        models = [model for model in report.models if model.model]
        return Look(
            window_s=report.to_s - report.from_s,
            total=report.total,
            models=[*models, *_unheard_of(models, by_model, report.to_s - report.from_s)],
            past={model: self._past(model) for model in {*by_model, *(one.model for one in models)}},
            demand=demand,
            demand_by_model=by_model,
            memory_percent=memory_in_use(self._monitor.get_resource_trends(RESOURCES_S)),
            reserved_percent=reserved_memory(view, self._settings),
            queues=queue_looks(self._depths(), view, demand, self._wall_s()),
            gpus=[GpuLook(f"{gpu.index} of {gpu.host}", gpu.state, gpu.reason) for gpu in view.gpus],
        )

    def _past(self, model: str) -> list[Minute]:
        """The model's minutes before the window that is judged."""
        anomaly, now_s = self._settings.monitoring.anomaly, self._wall_s()
        by_minute: dict[int, list[Tally]] = {}
        for series in self._monitor.series_since(now_s - anomaly.baseline_s):
            if series.model == model:
                for start_s, tally in self._monitor.steps(series, anomaly.baseline_s):
                    by_minute.setdefault(start_s, []).append(tally)
        before_s = now_s - anomaly.window_s - MINUTE_S
        return [
            minute_of(merged(tallies), anomaly.min_requests)
            for start_s, tallies in sorted(by_minute.items())
            if start_s <= before_s
        ]

    def _demand(self) -> tuple[Demand, dict[str, int]]:
        pipe = self._client.pipeline(transaction=False)
        pipe.hlen(self._keys.inflight)
        pipe.hrandfield(self._keys.inflight, IN_FLIGHT_LOOKED_AT, withvalues=True)
        pipe.hgetall(self._keys.load)
        in_flight, sample, load = pipe.execute()
        admitted = [read_entry(entry)[1] for entry in sample[1::2]]
        age_s = max(0.0, self._wall_s() - min(admitted)) if admitted else 0.0
        by_model = {
            name.decode().removeprefix("m:"): int(count) for name, count in load.items() if name.startswith(b"m:")
        }
        return Demand(int(in_flight), age_s), by_model

    def _depths(self) -> dict[str, QueueDepth]:
        try:
            return dict(read_depths(self._queues))
        except BrokerError as error:
            log.warning("queues are not looked at: %s", error)
            return {}


def _unheard_of(models: Iterable[SeriesFigures], by_model: dict[str, int], window_s: float) -> list[SeriesFigures]:
    """Models of which requests wait, and nothing was heard within the window."""
    heard = {one.model for one in models}
    return [
        series_figures(Series(model, "*", "*"), Tally(), window_s) for model in sorted(by_model) if model not in heard
    ]


def minute_of(tally: Tally, min_requests: int) -> Minute:
    """One minute of a model's past. Pure."""
    durations = tally.durations["total"]
    count = sum(durations.values())
    values = quantiles(durations, (0.95,)) if count >= min_requests else None
    return Minute(None if values is None else values[0], count / MINUTE_S)


def memory_in_use(trends: ResourceTrends) -> dict[str, float]:
    """Percent in use, of each host and each GPU. Pure."""
    used = {}
    for trend in trends.trends:
        if trend.resource == "memory":
            used[trend.host] = trend.latest_percent
        elif trend.resource.endswith(".memory"):
            used[f"{trend.host} {trend.resource.removesuffix('.memory')}"] = trend.latest_percent
    return used


def reserved_memory(view: FleetView, settings: Settings) -> dict[str, float]:
    """Percent of GPU memory that vLLM takes at its start, by host: that much in use says nothing. Pure."""
    share = 100.0 * settings.optimization.vllm.gpu_memory_utilization
    return {worker.host: share for worker in view.workers if worker.engine == VLLM}


def queue_looks(depths: dict[str, QueueDepth], view: FleetView, demand: Demand, now_s: float) -> Sequence[QueueLook]:
    """The request queues with their collectors, the engines' queues with their workers. Pure."""
    looks = []
    for name in REQUEST_QUEUES:
        depth = depths.get(name, QueueDepth(0))
        age_s = None
        if depth.messages:
            # RabbitMQ does not show its oldest message; what is in flight longest is as good a sign.
            age_s = demand.oldest_age_s if depth.oldest_at is None else now_s - depth.oldest_at
        looks.append(QueueLook(name, depth.messages, len(view.collectors), age_s))
    for engine in ALL_ENGINES:
        name = engine_queue(engine)
        depth = depths.get(name, QueueDepth(0))
        age_s = now_s - depth.oldest_at if depth.messages and depth.oldest_at is not None else None
        waiting = max(depth.messages, view.outstanding.get(engine, 0))
        looks.append(QueueLook(name, waiting, view.slots(engine), age_s))
    return looks
