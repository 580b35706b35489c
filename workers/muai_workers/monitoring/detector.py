"""What is wrong with the fleet: one look at it against thresholds, and against each model's own recent past. Pure.

The baseline is robust: the median of a model's minutes and their median absolute deviation (MAD; 1.4826 of it is the
standard deviation of normal data). A few bad minutes do not move it, and it knows no time of day: it follows the last
`baseline_s` seconds. What lasts for more than half of that becomes the new normal, and its alert ends.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from muai_config.monitoring import AnomalySettings
from muai_producers.alerts.records import Finding
from muai_producers.performance.report import SeriesFigures

MAD_TO_SIGMA = 1.4826
MIN_BASELINE_MINUTES = 10
LEAST_CHANGE = 0.5
"""A relative anomaly differs from the median by half of it at least, however steady the model has been."""
SETTLE_S = 15.0
"""A queue without workers may be one whose worker is being restarted."""
FAR_BEYOND = 4.0
"""So many times a threshold, an alert is critical."""
BESIDE_RESERVED_PERCENT = 7.0
"""What an engine's own workspace takes beside what it reserves."""
FLEET = "fleet"


@dataclass(frozen=True)
class Minute:
    """One minute of a model's past."""

    p95_ms: float | None
    """Of whole requests; None where too few were answered to say."""
    answered_rps: float


@dataclass(frozen=True)
class Demand:
    """What is asked for and not yet answered."""

    in_flight: int = 0
    oldest_age_s: float = 0.0
    """Of those in flight."""


@dataclass(frozen=True)
class QueueLook:
    """A queue, and whoever takes from it."""

    name: str
    waiting: int
    """Messages that nobody has taken, and batches that nobody has finished."""
    consumers: int
    oldest_age_s: float | None = None
    """None where nothing waits, or the broker cannot tell."""


@dataclass(frozen=True)
class GpuLook:
    """A GPU as its watch tells it."""

    name: str
    state: str
    reason: str


@dataclass(frozen=True)
class Look:
    """The fleet at one moment."""

    window_s: float
    total: SeriesFigures | None = None
    """All requests of the window."""
    models: Sequence[SeriesFigures] = ()
    past: Mapping[str, Sequence[Minute]] = field(default_factory=dict)
    """By model: its minutes before the window, oldest first."""
    demand: Demand = Demand()
    demand_by_model: Mapping[str, int] = field(default_factory=dict)
    """Requests in flight."""
    memory_percent: Mapping[str, float] = field(default_factory=dict)
    """By host, or host and GPU: how much is in use."""
    reserved_percent: Mapping[str, float] = field(default_factory=dict)
    """By host: how much of its GPUs' memory an engine takes at its start, needed or not."""
    queues: Sequence[QueueLook] = ()
    gpus: Sequence[GpuLook] = ()


def findings(look: Look, settings: AnomalySettings) -> list[Finding]:
    """Everything that is wrong."""
    found: list[Finding | None] = []
    for model in look.models:
        past = look.past.get(model.model, ())
        found += [
            latency_finding(model, settings),
            error_rate_finding(model, settings),
            latency_anomaly(model, past, settings),
            throughput_anomaly(model, past, look.demand_by_model.get(model.model, 0), settings),
        ]
    answered_rps = look.total.throughput_rps if look.total is not None else 0.0
    found.append(throughput_finding(answered_rps, look.demand, look.window_s, settings))
    for subject, percent in sorted(look.memory_percent.items()):
        host, _, gpu = subject.partition(" ")
        reserved = look.reserved_percent.get(host, 0.0) if gpu else 0.0
        found.append(memory_finding(subject, percent, settings, reserved))
    found += [_queue_age(queue, settings) for queue in look.queues]
    found += [_missing_workers(queue) for queue in look.queues]
    found += [_gpu_failure(gpu) for gpu in look.gpus]
    return [finding for finding in found if finding is not None]


# -- thresholds ------------------------------------------------------------------------------------------------------


def latency_finding(model: SeriesFigures, settings: AnomalySettings) -> Finding | None:
    """Whether 5 % of a model's requests took longer than the threshold, from submission to answer."""
    latency = model.latency.get("total")
    if latency is None or latency.count < settings.min_requests:
        return None
    return over_latency(model.model, latency.p95_ms, settings, requests=latency.count, p50_ms=latency.p50_ms)


def over_latency(subject: str, latency_ms: float, settings: AnomalySettings, **about: float) -> Finding | None:
    """Whether a latency is above the threshold."""
    threshold_ms = settings.latency_threshold_ms
    if latency_ms <= threshold_ms:
        return None
    return Finding(
        type="latency",
        subject=subject,
        severity="critical" if latency_ms > FAR_BEYOND * threshold_ms else "error",
        message=f"{subject}: 95 % of requests take up to {latency_ms:.0f} ms, allowed are {threshold_ms:g} ms",
        metadata={"latency_ms": round(latency_ms, 3), "threshold_ms": threshold_ms, **about},
    )


def error_rate_finding(model: SeriesFigures, settings: AnomalySettings) -> Finding | None:
    """Whether more of a model's requests failed than the threshold allows; wrong requests do not count."""
    if model.error_rate is None or model.successes + model.faults < settings.min_requests:
        return None
    if model.error_rate <= settings.error_rate_threshold:
        return None
    subject = model.model or FLEET
    return Finding(
        type="error_rate",
        subject=subject,
        severity="critical" if model.error_rate > 0.5 else "error",
        message=f"{subject}: {model.error_rate:.1%} of requests fail, allowed are {settings.error_rate_threshold:.1%}",
        metadata={
            "error_rate": model.error_rate,
            "threshold": settings.error_rate_threshold,
            "requests": model.requests,
            "errors": model.errors,
        },
    )


def memory_finding(
    subject: str, percent: float, settings: AnomalySettings, reserved_percent: float = 0.0
) -> Finding | None:
    """Whether a host, or a GPU, uses more of its memory than the threshold allows.

    Args:
        reserved_percent: what an engine takes at its start and keeps: only well above that is news.
    """
    allowed = settings.memory_threshold_percent
    if reserved_percent > 0.0:
        allowed = max(allowed, min(99.0, reserved_percent + BESIDE_RESERVED_PERCENT))
    if percent <= allowed:
        return None
    return Finding(
        type="memory",
        subject=subject,
        severity="critical" if percent >= 98.0 else "warning",
        message=f"{subject}: {percent:.0f} % of the memory is in use, allowed are {allowed:g} %",
        metadata={"memory_percent": round(percent, 1), "threshold_percent": allowed},
    )


def throughput_finding(
    answered_rps: float, demand: Demand, window_s: float, settings: AnomalySettings
) -> Finding | None:
    """Whether less is answered than the threshold, though enough was asked for.

    Enough: what was answered and what still waits would have made the threshold, or something has waited all through
    the window. When nobody asks, nothing is wrong; nor is it when little was asked and all of that was answered.
    """
    threshold_rps = settings.throughput_threshold_rps
    if answered_rps >= threshold_rps or demand.in_flight == 0:
        return None
    could_be_rps = answered_rps + demand.in_flight / window_s
    if could_be_rps < threshold_rps and demand.oldest_age_s < window_s:
        return None
    return Finding(
        type="throughput",
        subject=FLEET,
        severity="critical" if answered_rps == 0 else "error",
        message=f"{answered_rps:.2f} requests/s are answered, {threshold_rps:g} are wanted, "
        f"and {demand.in_flight} wait",
        metadata={
            "throughput_rps": round(answered_rps, 4),
            "threshold_rps": threshold_rps,
            "in_flight": demand.in_flight,
            "oldest_age_s": round(demand.oldest_age_s, 1),
        },
    )


# -- a model against its own past ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """What is usual."""

    median: float
    sigma: float
    """Robust standard deviation."""

    def deviation(self, value: float) -> float:
        """How many deviations a value is above the median; below 0: under it."""
        if self.sigma > 0:
            return (value - self.median) / self.sigma
        return 0.0 if value == self.median else float("inf") if value > self.median else float("-inf")


def baseline(values: Iterable[float]) -> Baseline | None:
    """The baseline of these; None of fewer than `MIN_BASELINE_MINUTES`."""
    known = list(values)
    if len(known) < MIN_BASELINE_MINUTES:
        return None
    median = statistics.median(known)
    return Baseline(median, MAD_TO_SIGMA * statistics.median(abs(value - median) for value in known))


def latency_anomaly(model: SeriesFigures, past: Sequence[Minute], settings: AnomalySettings) -> Finding | None:
    """Whether a model is far slower than it was in its own recent past."""
    latency = model.latency.get("total")
    usual = baseline(minute.p95_ms for minute in past if minute.p95_ms is not None)
    if usual is None or latency is None or latency.count < settings.min_requests or not settings.baseline_deviations:
        return None
    far = usual.deviation(latency.p95_ms) > settings.baseline_deviations
    if not far or latency.p95_ms < (1 + LEAST_CHANGE) * usual.median:
        return None
    return Finding(
        type="latency_anomaly",
        subject=model.model,
        severity="warning",
        message=f"{model.model}: 95 % of requests take up to {latency.p95_ms:.0f} ms; "
        f"{usual.median:.0f} ms has been usual",
        metadata={"p95_ms": latency.p95_ms, "usual_ms": round(usual.median, 3), "sigma_ms": round(usual.sigma, 3)},
    )


def throughput_anomaly(
    model: SeriesFigures, past: Sequence[Minute], in_flight: int, settings: AnomalySettings
) -> Finding | None:
    """Whether far less of a model is answered than in its own recent past, though requests wait."""
    usual = baseline(minute.answered_rps for minute in past)
    if usual is None or in_flight < settings.min_requests or not settings.baseline_deviations:
        return None
    far = usual.deviation(model.throughput_rps) < -settings.baseline_deviations
    if not far or model.throughput_rps > (1 - LEAST_CHANGE) * usual.median:
        return None
    return Finding(
        type="throughput_anomaly",
        subject=model.model,
        severity="warning",
        message=f"{model.model}: {model.throughput_rps:.2f} requests/s are answered and {in_flight} wait; "
        f"{usual.median:.2f} has been usual",
        metadata={
            "throughput_rps": model.throughput_rps,
            "usual_rps": round(usual.median, 4),
            "in_flight": in_flight,
        },
    )


# -- queues and devices ----------------------------------------------------------------------------------------------


def _queue_age(queue: QueueLook, settings: AnomalySettings) -> Finding | None:
    age_s, threshold_s = queue.oldest_age_s, settings.queue_age_threshold_s
    if age_s is None or age_s <= threshold_s:
        return None
    return Finding(
        type="queue_age",
        subject=queue.name,
        severity="critical" if age_s > FAR_BEYOND * threshold_s else "error",
        message=f"{queue.name}: the oldest request has waited for {age_s:.0f} s, allowed are {threshold_s:g} s",
        metadata={"oldest_age_s": round(age_s, 1), "threshold_s": threshold_s, "waiting": queue.waiting},
    )


def _missing_workers(queue: QueueLook) -> Finding | None:
    if not queue.waiting or queue.consumers:
        return None
    return Finding(
        type="missing_workers",
        subject=queue.name,
        severity="critical",
        message=f"{queue.name}: {queue.waiting} wait and no worker takes from this queue",
        metadata={"waiting": queue.waiting},
        for_s=SETTLE_S,
    )


def _gpu_failure(gpu: GpuLook) -> Finding | None:
    if gpu.state not in ("failed", "unseen"):
        return None
    return Finding(
        type="gpu_failure",
        subject=gpu.name,
        severity="critical" if gpu.state == "failed" else "error",
        message=f"GPU {gpu.name} is {gpu.state}: {gpu.reason}",
        metadata={"state": gpu.state, "reason": gpu.reason},
    )
