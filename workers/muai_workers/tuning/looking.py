"""Looking at the fleet for the tuner: read from the state store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from muai_batching.assembler import BatchKey
from muai_batching.routing import resolve_chain
from muai_batching.shards import shard_of, shard_owners
from muai_config.engines import ALL_ENGINES
from muai_config.errors import Source
from muai_config.runtime import overlaid
from muai_producers.alerts.store import AlertStore
from muai_producers.fleet import Fleet, FleetView, collector_process
from muai_producers.monitoring import instruments
from muai_producers.monitoring.shared import SharedMetrics
from muai_producers.performance.buckets import floor_to
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.series import Series, Tally
from muai_producers.runtime_config.versions import ConfigVersion, ConfigVersions
from muai_producers.store import Store
from muai_workers.tuning.deciding import ALERT
from muai_workers.tuning.measuring import stretch_of
from muai_workers.tuning.records import (
    KEYS,
    LATE_S,
    PARAMETERS,
    Bounds,
    CacheLook,
    Look,
    Parameter,
    Rules,
    Stretch,
    Values,
)

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.performance.buckets import Level

Kind = tuple[str, str]
"""Model and task."""
Counted = dict[Kind, dict[int, Tally]]
"""By the second in which a stretch begins."""
MAX_STRETCHES = 120
RESOURCES_S = 60.0
OWN_MEMORY = ("vllm",)
"""Engines that take their share of memory at the start: what is in use says nothing of how tight it is."""


def in_effect(settings: Settings, version: ConfigVersion) -> Settings:
    """The settings with a version laid over them.

    Raises:
        ConfigError: they contradict it.
    """
    return overlaid(settings, version.overrides, Source("runtime", f"version {version.number}"))


def values_of(settings: Settings) -> Values:
    """What the settings say of the parameters."""
    optimization = settings.optimization
    return Values(
        batch_size=optimization.batcher.max_batch_size,
        batch_timeout_ms=optimization.batcher.batch_timeout_ms,
        cache_size_mb=optimization.cache.max_memory_mb,
    )


def rules_of(settings: Settings) -> Rules:
    """What the settings say of tuning."""
    optimization = settings.optimization
    tuner, batcher = optimization.tuner, optimization.batcher
    bounds: dict[Parameter, Bounds] = {}
    if tuner.enable_batch_size_tuning and batcher.enabled:
        bounds["batch_size"] = Bounds(tuner.min_batch_size, tuner.max_batch_size)
    if tuner.enable_timeout_tuning and batcher.enabled:
        bounds["batch_timeout_ms"] = Bounds(tuner.min_batch_timeout_ms, tuner.max_batch_timeout_ms)
    if tuner.enable_cache_size_tuning and optimization.cache.enabled:
        bounds["cache_size_mb"] = Bounds(tuner.min_cache_mb, tuner.max_cache_mb)
    return Rules(
        bounds=bounds,
        interval_s=float(tuner.tuning_interval_seconds),
        window_s=float(max(tuner.observation_window_seconds, tuner.tuning_interval_seconds)),
        target_ms=tuner.target_latency_ms
        or batcher.latency_target_ms
        or settings.monitoring.anomaly.latency_threshold_ms,
    )


class TunerLook:
    """Takes looks.

    Args:
        settings: files and environment, without what is changed at run time.
        wall_s: wall-clock seconds.
    Raises:
        redis.exceptions.RedisError: from `take`, when the state store does not answer.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        monitor: PerformanceMonitor,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._client: Any = store.client
        self._inflight = store.keys.inflight
        self._versions = ConfigVersions(store)
        self._alerts = AlertStore(store)
        self._fleet = Fleet(store)
        self._metrics = SharedMetrics(store)
        self._monitor = monitor
        self._wall_s = wall_s

    def settings(self) -> tuple[Settings, ConfigVersion]:
        """The settings in effect, and the version that makes them so.

        Raises:
            ConfigError: this process's own file contradicts the version.
        """
        version = self._versions.current()
        return in_effect(self._settings, version), version

    def brief(self, settings: Settings, version: ConfigVersion) -> Look:
        """What is set, and whether an alert is open: enough between two decisions."""
        return Look(
            now_s=self._wall_s(),
            version=version.number,
            changed_by=version.by,
            values=values_of(settings),
            overridden={name: version.overrides[KEYS[name]] for name in PARAMETERS if KEYS[name] in version.overrides},
            adaptive=settings.optimization.batcher.adaptive_batching,
            min_batch_size=settings.optimization.batcher.min_batch_size,
            incident=self._incident(settings),
            alone="" if version.canary is None else version.canary.process,
        )

    def take(self, settings: Settings, version: ConfigVersion, rules: Rules) -> Look:
        """Look at everything."""
        from msgspec.structs import replace

        look = self.brief(settings, version)
        level = _level(self._monitor.data.levels, rules)
        counted, leading = self._counted(look.now_s, rules, level)
        view = self._fleet.view(ALL_ENGINES)
        owners = self._owners(settings, view, counted)
        canary = owners.get((leading.model, leading.task), "")
        batched_there = [by_start for kind, by_start in counted.items() if canary and owners.get(kind) == canary]
        workers = [worker for worker in view.workers if worker.engine == leading.engine]
        return replace(
            look,
            stretches=_added(counted.values(), level, look.now_s, rules),
            canary=collector_process(canary) if canary else "",
            canary_stretches=_added(batched_there, level, look.now_s, rules),
            model=leading.model,
            engine=leading.engine,
            device=_device(view, leading.engine),
            in_flight=int(self._client.hlen(self._inflight)),
            slots=max(1, sum(worker.slots for worker in workers)),
            memory_percent=0.0 if leading.engine in OWN_MEMORY else self._memory_percent(),
            quantized=settings.optimization.onnx.enable_quantization if leading.engine == "onnx" else None,
            cache=self._cache(),
        )

    def _incident(self, settings: Settings) -> str:
        allowed = settings.optimization.tuner.allowed_alerts
        for alert in self._alerts.open():
            if alert.alert_type not in allowed:
                return f"{ALERT}{alert.alert_type} is open: {alert.message}"
        return ""

    # -- figures -------------------------------------------------------------------------------------------------

    def _counted(self, now_s: float, rules: Rules, level: Level) -> tuple[Counted, Series]:
        """What was counted, and the series with most requests."""
        since_s = now_s - rules.window_s - level.size_s
        counted: Counted = {}
        sizes: dict[Series, int] = {}
        for series in self._monitor.series_since(since_s):
            by_start = counted.setdefault((series.model, series.task), {})
            for start_s, tally in self._monitor.data.each(since_s, now_s, series.member, level):
                by_start.setdefault(floor_to(start_s, level.size_s), Tally()).add(tally)
                if series.engine:
                    sizes[series] = sizes.get(series, 0) + tally.counters.get("ok", 0)
        return counted, max(sizes, key=lambda series: (sizes[series], series)) if sizes else Series("", "", "")

    def _owners(self, settings: Settings, view: FleetView, kinds: Iterable[Kind]) -> dict[Kind, str]:
        """The collector that batches each model and task with the engines that are configured; none where there is but
        one.
        """
        names, num_shards = {collector.name for collector in view.collectors}, settings.queue.collector_shards
        if len(names) < 2 or num_shards < 2:
            return {}
        holders = shard_owners(self._store, num_shards)
        owners: dict[Kind, str] = {}
        for model, task in kinds:
            if (spec := settings.models.get(model)) is not None:
                configured = settings.chain(spec)
                key = BatchKey(model, task, resolve_chain((), configured, configured))
                owners[model, task] = holders[shard_of(key, num_shards)]
        return {kind: name for kind, name in owners.items() if name in names}

    def _memory_percent(self) -> float:
        """Of the fullest GPU; of the fullest host where there are none."""
        trends = self._monitor.get_resource_trends(RESOURCES_S).trends
        gpus = [one.latest_percent for one in trends if one.resource.endswith(".memory")]
        return max(gpus or [one.latest_percent for one in trends if one.resource == "memory"], default=0.0)

    def _cache(self) -> CacheLook | None:
        """All workers' together; each tells for every model of the one budget that its models share."""
        used = most = 0.0
        for process in self._metrics.processes():
            told = [(name, value) for name, _, value in process.readings]
            used += sum(value for name, value in told if name == instruments.KV_BYTES.name)
            most += max((value for name, value in told if name == instruments.KV_MAX_BYTES.name), default=0.0)
        return CacheLook(used_share=used / most) if used and most else None


def _added(counted: Iterable[Mapping[int, Tally]], level: Level, now_s: float, rules: Rules) -> tuple[Stretch, ...]:
    """Everything added, stretch by stretch, as far as it is complete."""
    sums: dict[int, Tally] = {}
    for by_start in counted:
        for start_s, tally in by_start.items():
            if start_s + level.size_s <= now_s - LATE_S:
                sums.setdefault(start_s, Tally()).add(tally)
    length_s = float(level.size_s)
    return tuple(stretch_of(sums[at], float(at), length_s, rules.target_ms) for at in sorted(sums))


def _level(levels: Sequence[Level], rules: Rules) -> Level:
    """The finest stretches of which the window has not too many."""
    return next((one for one in levels if rules.window_s / one.size_s <= MAX_STRETCHES), levels[-1])


def _device(view: FleetView, engine: str) -> str:
    """What the engine's workers run on: the names of GPUs where they are known, else what the workers say."""
    workers = {worker.name: worker.device for worker in view.workers if worker.engine == engine}
    gpus = {gpu.name for gpu in view.gpus if gpu.worker in workers and gpu.name}
    return ", ".join(sorted(gpus or set(workers.values())))
