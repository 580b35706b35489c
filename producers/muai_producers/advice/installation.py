"""How an instance of ours stands: one model on one engine, by the performance data and the fleet."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muai_config.catalog import ModelFilesNotFoundError, ModelSpec
from muai_config.engines import ALL_ENGINES
from muai_config.runtime import reloadable_values
from muai_producers.advice.architecture import Architecture, architecture_of
from muai_producers.advice.situation import Situation
from muai_producers.fleet import Fleet, FleetView, WorkerRecord
from muai_producers.monitoring import instruments
from muai_producers.monitoring.shared import SharedMetrics, Totals
from muai_producers.performance.monitor import ANYTHING, PerformanceMonitor
from muai_producers.performance.report import PerformanceReport, SeriesFigures

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.store import Store

log = logging.getLogger(__name__)
MAX_CONFIG_BYTES = 1_000_000
CONTINUOUS = frozenset({"vllm"})
FIXED_KEYS = ("optimization.onnx.enable_quantization", "optimization.vllm.gpu_memory_utilization")
"""Of the settings that need a restart, those that advice looks at."""


class InstallationLook:
    """Takes looks at our instances.

    Raises:
        redis.exceptions.RedisError: from `take`, when the state store does not answer.
    """

    def __init__(self, store: Store, retention_s: int) -> None:
        self._monitor = PerformanceMonitor(store, retention_s)
        self._fleet = Fleet(store)
        self._metrics = SharedMetrics(store)

    def take(self, instance_id: str, instance_type: str, settings: Settings, window_s: float) -> Situation:
        """Look now.

        Args:
            instance_id: a model of the catalog.
            settings: as they hold now, with what was changed at run time.
        """
        spec = settings.models[instance_id]
        wanted = ANYTHING if instance_type == "muai" else instance_type
        report = self._monitor.report(window_s, model=instance_id, engine=wanted)
        engine = _busiest(report) or settings.chain(spec)[0] if wanted == ANYTHING else instance_type
        if wanted == ANYTHING:
            report = self._monitor.report(window_s, model=instance_id, engine=engine)
        base = Situation(
            instance_id=instance_id,
            instance_type=instance_type,
            is_ours=True,
            engine=engine,
            model=instance_id,
            config={**reloadable_values(settings), **_fixed(settings), "dtype": _dtype(spec, settings, engine)},
            architecture=read_architecture(spec),
        )
        found = situation_of(base, report, self._fleet.view(ALL_ENGINES), self._metrics.read())
        if not (settings.monitoring.enabled and settings.monitoring.performance.enabled):
            why = "performance data are switched off (monitoring.enabled, monitoring.performance.enabled)"
            return dataclasses.replace(found, source="", unmeasured=why)
        return found


def situation_of(base: Situation, report: PerformanceReport, view: FleetView, totals: Totals) -> Situation:
    """`base` with what was measured. Pure."""
    figures, workers = report.model(base.model), [one for one in view.workers if one.engine == base.engine]
    found = {**_of_workers(workers, view, report), **_of_hosts(workers, report), **_of_cache(base.model, totals)}
    window_s = report.to_s - report.from_s
    if figures is None or not figures.successes:
        why = f"no request for {base.model} on {base.engine} was served within {window_s:.0f} s"
        return dataclasses.replace(base, unmeasured=why, **found)
    slots = sum(worker.slots for worker in workers)
    source = f"the performance data of {base.model} on {base.engine}, {figures.requests} requests in {window_s:.0f} s"
    waiting = sum(one.waiting for collector in view.collectors for one in collector.forming if one.model == base.model)
    return dataclasses.replace(
        base,
        source=source,
        waiting=float(waiting),
        max_batch=int(base.config["optimization.batcher.max_batch_size"]),
        **{**found, **_of_requests(figures, window_s), **_of_batches(base.engine, figures, window_s, slots)},
    )


def _busiest(report: PerformanceReport) -> str:
    """The engine that served most; '' where none did."""
    return next((one.engine for one in report.series if one.engine), "")


def _of_requests(figures: SeriesFigures, window_s: float) -> dict[str, float | None]:
    means = {stage: one.mean_ms for stage, one in figures.latency.items()}
    waits = [means[stage] for stage in ("queue", "batching", "dispatch") if stage in means]
    return {
        "requests": float(figures.successes),
        "wait_ms": sum(waits) if waits else None,
        "batching_ms": means.get("batching"),
        "inference_ms": means.get("inference"),
        "total_ms": means.get("total"),
        "prompt_tokens": figures.input_tokens_per_s * window_s / figures.successes,
        "output_tokens": figures.output_tokens_per_s * window_s / figures.successes,
    }


def _of_batches(engine: str, figures: SeriesFigures, window_s: float, slots: int) -> dict[str, float | None]:
    batches, inference = figures.batching, figures.latency.get("inference")
    if batches is None or engine in CONTINUOUS:
        return {}
    busy = None
    if inference is not None and slots:
        busy = min(1.0, batches.batches * inference.mean_ms / 1000 / window_s / slots)
    return {
        "mean_batch": batches.mean_size,
        "p95_batch": float(batches.p95_size),
        "per_request_ms": batches.per_request_ms,
        "per_batch_ms": batches.per_batch_ms,
        "per_batch_error_ms": batches.per_batch_error_ms,
        "padding_waste": batches.padding_waste,
        "busy_share": busy,
    }


def _of_workers(workers: Iterable[WorkerRecord], view: FleetView, report: PerformanceReport) -> dict[str, Any]:
    workers = list(workers)
    names = {worker.name for worker in workers}
    gpus = [gpu for gpu in view.gpus if gpu.worker in names]
    hosts = {trend.host for trend in report.resources.trends if trend.resource.startswith("gpu")}
    has_gpu = bool(gpus) or any(worker.gpu or worker.host in hosts for worker in workers)
    device = ("cuda" if has_gpu else "cpu") if workers else ""
    return {"device": device, "gpu_name": next((gpu.name for gpu in gpus if gpu.name), "")}


def _of_hosts(workers: Iterable[WorkerRecord], report: PerformanceReport) -> dict[str, float | None]:
    """Memory and utilization: of GPUs where the hosts have some, else of the hosts."""
    hosts = {worker.host for worker in workers}
    trends = [trend for trend in report.resources.trends if trend.host in hosts]
    gpus = [trend for trend in trends if trend.resource.startswith("gpu")]
    memory = [trend for trend in gpus if trend.resource.endswith(".memory")]
    memory = memory or [trend for trend in trends if trend.resource == "memory"]
    used = [trend for trend in gpus if trend.resource.endswith(".utilization")]
    return {
        "memory_percent": max((trend.latest_percent for trend in memory), default=None),
        "utilization_percent": max((trend.mean_percent for trend in used), default=None),
    }


def _of_cache(model: str, totals: Totals) -> dict[str, float | None]:
    """Of the conversations that are kept; counters are over all time."""
    counters, gauges = totals.sums.counters, totals.gauges()
    hits, misses, evictions, hit_tokens, tokens = (
        counters.get((one.name, (model,)), 0.0)
        for one in (
            *(instruments.KV_HITS, instruments.KV_MISSES, instruments.KV_EVICTIONS),
            *(instruments.KV_HIT_TOKENS, instruments.KV_PROMPT_TOKENS),
        )
    )
    sizes = [value for (name, _), value in gauges.items() if name == instruments.MEMORY_TOTAL.name]
    found: dict[str, float | None] = {"memory_total_bytes": max(sizes, default=None)}
    if hits + misses:
        found |= {"lookups": hits + misses, "evictions": evictions}
        found["kept_bytes"] = gauges.get((instruments.KV_BYTES.name, (model,)))
    if tokens:
        found["prefix_hit_share"] = hit_tokens / tokens
    return found


def _fixed(settings: Settings) -> dict[str, Any]:
    found = {}
    for key in FIXED_KEYS:
        value: Any = settings
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = value
    return found


def _dtype(spec: ModelSpec, settings: Settings, engine: str) -> str:
    if spec.dtype != "auto":
        return spec.dtype
    if engine == "onnx":
        return "fp32"
    section = getattr(settings.optimization, engine, None)
    return str(getattr(section, "dtype", "auto"))


def read_architecture(spec: ModelSpec) -> Architecture | None:
    """A model's sizes, where this machine has its files."""
    try:
        folder = spec.source.local_folder()
    except ModelFilesNotFoundError:
        return None
    return None if folder is None else _read(folder / "config.json")


def _read(file: Path) -> Architecture | None:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            return None
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        log.debug("%s tells nothing of the model's sizes: %s", file, error)
        return None
    return architecture_of(config) if isinstance(config, Mapping) else None
