"""What can be asked of the fleet's performance: plain values, made from tallies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from muai_producers.errors import MuaiError, RequestCancelledError, RequestError, classes_by_code
from muai_producers.performance.bins import RELATIVE_ERROR, mean_ms, quantiles
from muai_producers.performance.fitting import batch_time
from muai_producers.performance.series import ATTEMPT, ERROR, STAGES, Host, Series, Tally

QUANTILES = (0.5, 0.95, 0.99, 1.0)


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds, each within `relative_error` of the exact figure."""

    count: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class BatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's requests were batched on an engine."""

    batches: int
    mean_size: float
    p50_size: int
    p95_size: int
    max_size: int
    padding_waste: float | None
    """Share of the padded batch that is padding; null where the engine does not pad, or does not say."""
    per_request_ms: float | None
    """a of a·n + b, the time for which a batch of n holds its slot, fitted over padded tokens where these explain
    the times, else over n; null until two different batches were seen."""
    per_batch_ms: float | None
    """b of a·n + b."""
    per_batch_error_ms: float | None
    """The standard error of b."""


class SeriesFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one engine for one task; or several of them together, where a name is '*'."""

    model: str
    engine: str
    """'' for requests that came to no engine."""
    task: str
    requests: int
    """That ended, well or not, but for those that were cancelled."""
    successes: int
    errors: dict[str, int]
    """By code."""
    faults: int
    """Errors that are not the request's own: what `error_rate` counts."""
    error_rate: float | None
    failed_attempts: dict[str, int]
    """By code: errors of an engine's after which the request went on to its next engine, or was given up."""
    throughput_rps: float
    """Requests that ended, each second."""
    arrival_rps: float
    """Requests that collectors took in, each second. Retries on other engines do not arrive again."""
    latency: dict[str, LatencyFigures]
    """By stage: queue, batching, dispatch, inference, total."""
    operations: dict[str, LatencyFigures]
    """By any other name that was recorded."""
    batching: BatchFigures | None
    cache_hit_rate: float | None
    """Share of successes that found some of their prompt cached."""
    input_tokens_per_s: float
    output_tokens_per_s: float


class ResourcePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One resource over one stretch of time."""

    start_s: int
    mean_percent: float
    max_percent: int


class ResourceTrend(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one resource of a host was used."""

    host: str
    resource: str
    """`cpu`, `memory`, `gpu0.memory`, `gpu0.utilization`, …"""
    latest_percent: float
    mean_percent: float
    max_percent: int
    change_percent: float
    """By how much it rose over the window, on the straight line of least squares; below 0: it fell."""
    points: list[ResourcePoint]


class ResourceTrends(msgspec.Struct, frozen=True, kw_only=True):
    """The resources of every host."""

    window_s: float
    step_s: int
    trends: list[ResourceTrend]

    def of(self, resource: str) -> dict[str, ResourceTrend]:
        """One resource, by host."""
        return {trend.host: trend for trend in self.trends if trend.resource == resource}


class PerformanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet over one window."""

    from_s: float
    """Wall-clock seconds since the epoch: the window widened to where its first bucket begins."""
    to_s: float
    relative_error: float
    """Of every latency."""
    total: SeriesFigures
    models: list[SeriesFigures]
    """Each model, over all engines and tasks."""
    series: list[SeriesFigures]
    """Each model on each engine for each task; most requests first."""
    resources: ResourceTrends

    def model(self, name: str) -> SeriesFigures | None:
        """One model's figures; None where nothing of it was seen."""
        return next((one for one in self.models if one.model == name), None)


def latency_figures(counts: Mapping[int, int]) -> LatencyFigures | None:
    """The figures of one sketch; None of an empty one."""
    values = quantiles(counts, QUANTILES)
    if values is None:
        return None
    p50, p95, p99, longest = (round(value, 4) for value in values)
    return LatencyFigures(
        count=sum(counts.values()),
        mean_ms=round(mean_ms(counts), 4),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=longest,
    )


def is_own_fault(code: str) -> bool:
    """Whether an error of this code is the request's own, or its sender's wish, and says nothing of the fleet."""
    kind: type[MuaiError] | None = classes_by_code().get(code)
    return kind is not None and issubclass(kind, RequestError | RequestCancelledError)


def series_figures(series: Series, tally: Tally, window_s: float) -> SeriesFigures:
    """The figures of what was counted in `window_s` seconds."""
    counters, window_s = tally.counters, max(window_s, 1e-3)
    errors, attempts = _by_code(counters, ERROR), _by_code(counters, ATTEMPT)
    cancelled = errors.pop(RequestCancelledError.code, 0)
    successes = counters.get("ok", 0)
    faults = sum(count for code, count in errors.items() if not is_own_fault(code))
    judged = successes + faults
    figures = {operation: latency_figures(counts) for operation, counts in tally.durations.items()}
    told = {operation: one for operation, one in figures.items() if one is not None}
    requests = successes + sum(errors.values())
    return SeriesFigures(
        model=series.model,
        engine=series.engine,
        task=series.task,
        requests=requests,
        successes=successes,
        errors=errors | ({RequestCancelledError.code: cancelled} if cancelled else {}),
        faults=faults,
        error_rate=round(faults / judged, 6) if judged else None,
        failed_attempts=attempts,
        throughput_rps=round(requests / window_s, 4),
        arrival_rps=round(counters.get("arrived", 0) / window_s, 4),
        latency={stage: told[stage] for stage in STAGES if stage in told},
        operations={name: one for name, one in sorted(told.items()) if name not in STAGES},
        batching=_batch_figures(tally),
        cache_hit_rate=round(counters.get("cache_hits", 0) / successes, 4) if successes else None,
        input_tokens_per_s=round(counters.get("input_tokens", 0) / window_s, 3),
        output_tokens_per_s=round(counters.get("output_tokens", 0) / window_s, 3),
    )


def _by_code(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in sorted(counters.items()) if name.startswith(prefix)}


def _batch_figures(tally: Tally) -> BatchFigures | None:
    batches = sum(tally.sizes.values())
    if not batches:
        return None
    requests = sum(size * count for size, count in tally.sizes.items())
    padded = tally.counters.get("padded_tokens", 0)
    time = batch_time(tally.counters)
    error_ms = time.error_ms if time else None
    return BatchFigures(
        batches=batches,
        mean_size=round(requests / batches, 3),
        p50_size=_size_at(tally.sizes, 0.5),
        p95_size=_size_at(tally.sizes, 0.95),
        max_size=max(tally.sizes),
        padding_waste=round(1 - tally.counters.get("useful_tokens", 0) / padded, 4) if padded else None,
        per_request_ms=round(time.per_request_ms, 4) if time else None,
        per_batch_ms=round(time.per_batch_ms, 4) if time else None,
        per_batch_error_ms=None if error_ms is None else round(error_ms, 4),
    )


def _size_at(sizes: Mapping[int, int], rank: float) -> int:
    position, seen = rank * (sum(sizes.values()) - 1), 0
    for size in sorted(sizes):
        seen += sizes[size]
        if seen > position:
            return size
    raise AssertionError("a rank is at most 1")


def merged(tallies: Iterable[Tally]) -> Tally:
    """All of them added."""
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def resource_trend(host: Host, resource: str, steps: list[tuple[int, Tally]]) -> ResourceTrend | None:
    """One resource over time; None where it was not sampled."""
    points, everything = [], Tally()
    for start_s, tally in steps:
        counts = tally.percents.get(resource)
        if counts:
            points.append(ResourcePoint(start_s=start_s, mean_percent=round(_mean(counts), 2), max_percent=max(counts)))
            for percent, count in counts.items():
                everything.percents[resource][percent] += count
    if not points:
        return None
    return ResourceTrend(
        host=host.name,
        resource=resource,
        latest_percent=points[-1].mean_percent,
        mean_percent=round(_mean(everything.percents[resource]), 2),
        max_percent=max(everything.percents[resource]),
        change_percent=_change(points),
        points=points,
    )


def _mean(counts: Mapping[int, int]) -> float:
    return sum(value * count for value, count in counts.items()) / sum(counts.values())


def _change(points: list[ResourcePoint]) -> float:
    first_s = points[0].start_s
    xs, ys = [point.start_s - first_s for point in points], [point.mean_percent for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if not spread:
        return 0.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return round(slope * xs[-1], 2)


def report_of(
    tallies: Mapping[Series, Tally], resources: ResourceTrends, from_s: float, to_s: float
) -> PerformanceReport:
    """The report of what was counted between two moments."""
    window_s = to_s - from_s
    by_model: dict[str, list[Tally]] = {}
    for series, tally in tallies.items():
        by_model.setdefault(series.model, []).append(tally)
    models = [
        series_figures(Series(model, "*", "*"), merged(parts), window_s) for model, parts in sorted(by_model.items())
    ]
    each = [series_figures(series, tally, window_s) for series, tally in sorted(tallies.items())]
    return PerformanceReport(
        from_s=from_s,
        to_s=to_s,
        relative_error=RELATIVE_ERROR,
        total=series_figures(Series("*", "*", "*"), merged(tallies.values()), window_s),
        models=sorted(models, key=lambda one: -one.requests),
        series=sorted(each, key=lambda one: -one.requests),
        resources=resources,
    )
