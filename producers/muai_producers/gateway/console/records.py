"""What the console's data says, as it travels: sizes are bounded, ages are seconds before `taken_at`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Priority = Literal["high", "normal", "low"]


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """One queue of the broker."""

    name: str
    holds: Literal["requests", "batches"]
    priority: Priority | None = None
    """Of a queue of requests, the class of priorities that it is for."""
    messages: int
    oldest_age_s: float | None = None
    """Since its oldest request was submitted; null where it is empty, or the broker cannot tell."""


class Cooling(msgspec.Struct, frozen=True, kw_only=True):
    """A model that an engine failed with, and is passed over for."""

    model: str
    reason: str
    seconds_left: float


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One engine."""

    name: str
    state: Literal["serving", "cooling", "absent"]
    """cooling: passed over for one model at least; absent: no worker of it lives."""
    workers: int
    slots: int
    """Batches that its workers run at once."""
    outstanding: int
    """Batches sent to it and not finished, running or waiting."""
    models: list[str]
    """Of the catalog, those that it may serve."""
    cooling: list[Cooling]


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """One engine worker."""

    name: str
    engine: str
    host: str
    pid: int
    gpu: str
    """The GPUs that it is pinned to; '' for none."""
    device: str
    slots: int
    models_loaded: list[str]
    uptime_s: float
    readings: dict[str, Any]
    """What else the worker says of itself."""


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, as whoever watches it read it last; null is what the device does not give."""

    host: str
    index: str
    name: str
    worker: str
    """The engine worker that has it; '' for none."""
    state: Literal["ok", "degraded", "failed", "unseen"]
    reason: str
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    read_age_s: float


class CollectorState(msgspec.Struct, frozen=True, kw_only=True):
    """One batch collector."""

    name: str
    host: str
    pid: int
    uptime_s: float
    waiting: int
    """Requests that it holds."""
    num_keys: int
    """Batch keys that they are of; those of the longest waiting stand in `forming`."""


class FormingState(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that forms at a collector."""

    collector: str
    model: str
    task: str
    engine: str | None
    """Where it would go now; null while no engine can take it."""
    waiting: int
    waiting_high: int
    """Of those, the ones of priority 7 to 9."""
    waiting_low: int
    """Of those, the ones of priority 0 to 2."""
    max_size: int
    oldest_age_s: float


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The whole installation, for its operators."""

    queues: list[QueueState]
    """Empty where the broker does not answer."""
    engines: list[EngineState]
    workers: list[WorkerState]
    gpus: list[GpuReading]
    collectors: list[CollectorState]
    forming: list[FormingState]
    dead_letters: int | None
    duplicates_refused: int | None
    """Second results that were refused, since the state store began."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand."""

    taken_at: float
    """Wall-clock seconds since the epoch."""
    status: Literal["healthy", "degraded", "unhealthy"]
    reasons: list[str]
    tenant: str | None
    """Whose requests are counted; null: everybody's."""
    state_store: bool
    """Whether it answers; what is not known without it is null or empty."""
    in_flight: int | None
    capacity: int
    answered: int | None
    """Since the state store began; null for a tenant, of whom it is not counted."""
    fleet: Fleet | None
    """null for callers who are no operators."""


class RecentEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was answered lately."""

    id: str
    state: str | None
    """null where its result is too large to be read for a list."""
    tenant: str | None
    """null for one that a plain Celery producer sent; so is `model`."""
    model: str | None
    engine: str | None
    latency_ms: float | None
    batch_size: int | None
    error_code: str | None
    finished_at: float | None
    """Wall-clock seconds since the epoch."""


class RecentList(msgspec.Struct, frozen=True, kw_only=True):
    """The last that were answered, newest first."""

    object: str = "list"
    data: list[RecentEntry]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a request's way."""

    name: Literal["queue", "batching", "dispatch", "inference", "answer"]
    started_ms: float
    """After its submission."""
    took_ms: float


class AttemptState(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that did not serve the request."""

    engine: str
    code: str
    message: str


class RequestWay(msgspec.Struct, frozen=True, kw_only=True):
    """A request's way from submission to result."""

    id: str
    state: str
    status_url: str
    tenant: str | None
    model: str | None
    task: str | None
    submitted_at: float | None
    """Wall-clock seconds since the epoch; of a request in flight whole ones, when it was admitted."""
    finished_at: float | None
    latency_ms: float | None
    engine: str | None
    worker: str | None
    gpu: str | None
    batch_id: str | None
    batch_size: int | None
    cache_hit: bool | None
    input_tokens: int | None
    output_tokens: int | None
    steps: list[Step]
    """In order; empty where the request ended without a result, or has not ended."""
    attempts: list[AttemptState]
    error_code: str | None
    error_message: str | None
    preview: str | None
    """The beginning of its output, as text."""


class DeadLetterState(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ended without a result through no wish of its sender."""

    entry_id: str
    request_id: str
    model: str | None
    code: str
    message: str
    attempts: list[AttemptState]
    died_at: float
    """Wall-clock seconds since the epoch."""
    can_be_replayed: bool
    """False for a message that was no request."""


class DeadLetterList(msgspec.Struct, frozen=True, kw_only=True):
    """The newest dead letters, newest first."""

    object: str = "list"
    total: int
    """All that there are."""
    data: list[DeadLetterState]


TYPES = (Overview, RecentList, RequestWay, DeadLetterList)
