"""From what was read to what is told. Pure: the clock is passed in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from muai_config.engines import ALL_ENGINES
from muai_producers.dead_letters import DeadLetterLine
from muai_producers.fleet import CollectorRecord, FleetView, GpuRecord, WorkerRecord
from muai_producers.gateway.console.records import (
    AttemptState,
    CollectorState,
    Cooling,
    DeadLetterState,
    EngineState,
    Fleet,
    FormingState,
    GpuReading,
    Priority,
    QueueState,
    RecentEntry,
    RequestWay,
    Step,
    WorkerState,
)
from muai_producers.gateway.standing import status_url
from muai_producers.queue_depths import QueueDepth, priority_of
from muai_producers.recent import RecentRequest
from muai_producers.store import FAILURE, PENDING, REVOKED, SUCCESS
from muai_producers.vectors import unpack_embedding

if TYPE_CHECKING:
    from muai_config import Settings

PREVIEW_CHARS = 2000
MAX_MESSAGE_CHARS = 2000
_SAID = frozenset(("name", "engine", "slots", "ahead", "pid", "host", "gpu", "models_loaded", "device", "started_at"))
"""Fields of a worker's record that have a place of their own."""


@dataclass(frozen=True)
class Counts:
    """What the state store counts."""

    in_flight: int
    answered: int = 0
    dead_letters: int = 0
    duplicates_refused: int = 0


def fleet_state(
    settings: Settings, view: FleetView, depths: Mapping[str, QueueDepth], counts: Counts | None, now_s: float
) -> Fleet:
    """The installation as operators see it."""
    return Fleet(
        queues=[queue_state(name, depth, now_s) for name, depth in depths.items()],
        engines=engine_states(settings, view, now_s),
        workers=[
            worker_state(record, now_s) for record in sorted(view.workers, key=lambda one: (one.engine, one.name))
        ],
        gpus=[gpu_reading(record, now_s) for record in view.gpus],
        collectors=[_collector_state(record, now_s) for record in sorted(view.collectors, key=lambda one: one.name)],
        forming=forming_states(view.collectors, now_s),
        dead_letters=None if counts is None else counts.dead_letters,
        duplicates_refused=None if counts is None else counts.duplicates_refused,
    )


def queue_state(name: str, depth: QueueDepth, now_s: float) -> QueueState:
    """A queue, with its age from the oldest's submission."""
    priority: Priority | None = priority_of(name) or None  # type: ignore[assignment]
    return QueueState(
        name=name,
        holds="batches" if priority is None else "requests",
        priority=priority,
        messages=depth.messages,
        oldest_age_s=None if depth.oldest_at is None else _since(depth.oldest_at, now_s),
    )


def engine_states(settings: Settings, view: FleetView, now_s: float) -> list[EngineState]:
    """The engines that the catalog has a use for, and any that runs."""
    models: dict[str, list[str]] = {}
    for name, spec in sorted(settings.models.items()):
        for engine in settings.chain(spec):
            models.setdefault(engine, []).append(name)
    return [
        _engine_state(engine, models.get(engine, []), view, now_s)
        for engine in ALL_ENGINES
        if engine in models or view.slots(engine)
    ]


def _engine_state(engine: str, models: list[str], view: FleetView, now_s: float) -> EngineState:
    cooling = [
        Cooling(model=model, reason=reason, seconds_left=_since(now_s, view.cooling_until.get((name, model), now_s)))
        for (name, model), reason in sorted(view.cooling.items())
        if name == engine
    ]
    workers = sum(worker.engine == engine for worker in view.workers)
    return EngineState(
        name=engine,
        state="absent" if not workers else "cooling" if cooling else "serving",
        workers=workers,
        slots=view.slots(engine),
        outstanding=view.outstanding.get(engine, 0),
        models=models,
        cooling=cooling,
    )


def worker_state(record: WorkerRecord, now_s: float) -> WorkerState:
    """A worker; what its record says beyond the usual goes into `readings`."""
    said: dict[str, Any] = msgspec.to_builtins(record)
    return WorkerState(
        name=record.name,
        engine=record.engine,
        host=record.host,
        pid=record.pid,
        gpu=record.gpu,
        device=record.device,
        slots=record.slots,
        models_loaded=list(record.models_loaded),
        uptime_s=_since(record.started_at, now_s) if record.started_at else 0.0,
        readings={name: value for name, value in said.items() if name not in _SAID},
    )


def gpu_reading(record: GpuRecord, now_s: float) -> GpuReading:
    """A GPU's last reading."""
    return GpuReading(
        host=record.host,
        index=record.index,
        name=record.name,
        worker=record.worker,
        state=record.state,
        reason=record.reason,
        utilization_percent=record.utilization_percent,
        memory_used_bytes=record.memory_used_bytes,
        memory_total_bytes=record.memory_total_bytes,
        temperature_c=record.temperature_c,
        power_w=record.power_w,
        power_limit_w=record.power_limit_w,
        read_age_s=_since(record.read_at, now_s),
    )


def _collector_state(record: CollectorRecord, now_s: float) -> CollectorState:
    return CollectorState(
        name=record.name,
        host=record.host,
        pid=record.pid,
        uptime_s=_since(record.started_at, now_s) if record.started_at else 0.0,
        waiting=record.waiting,
        num_keys=record.num_keys,
    )


def forming_states(collectors: Sequence[CollectorRecord], now_s: float) -> list[FormingState]:
    """The batches that form, the longest waiting first."""
    found = [
        FormingState(
            collector=record.name,
            model=one.model,
            task=one.task,
            engine=one.engine or None,
            waiting=one.waiting,
            waiting_high=one.waiting_high,
            waiting_low=one.waiting_low,
            max_size=one.max_size,
            oldest_age_s=_since(one.oldest_at, now_s),
        )
        for record in collectors
        for one in record.forming
    ]
    return sorted(found, key=lambda one: -one.oldest_age_s)


def recent_entry(request: RecentRequest) -> RecentEntry:
    """A line of the list of the last answers."""
    summary = request.summary
    told = None if summary is None else summary.result
    is_success = summary is not None and summary.status == SUCCESS
    return RecentEntry(
        id=request.id,
        state=None if summary is None else summary.status,
        tenant=request.tenant or None,
        model=request.model or None,
        engine=told.engine_used or None if told is not None else None,
        latency_ms=told.latency_ms if told is not None else None,
        batch_size=told.batch_size if told is not None else None,
        error_code=told.code or None if told is not None and not is_success else None,
        finished_at=None if summary is None else wall_s(summary.date_done),
    )


def wall_s(iso: str | None) -> float | None:
    """Seconds since the epoch of a time as states have it."""
    try:
        return None if not iso else datetime.fromisoformat(iso).timestamp()
    except ValueError:
        return None


class StoredResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored state holds of a result or an error; unknown fields are passed over."""

    outputs: msgspec.Raw = msgspec.Raw(b"null")
    engine_used: str | None = None
    latency_ms: float | None = None
    batch_size: int | None = None
    cache_hit: bool | None = None
    metadata: dict[str, Any] = {}
    exc_message: list[Any] = []
    code: str | None = None
    batch_id: str | None = None
    engine: str | None = None
    worker: str | None = None


class StoredWay(msgspec.Struct, frozen=True, kw_only=True):
    """A stored state, whole."""

    status: str
    result: StoredResult | None = None
    date_done: str | None = None
    tenant: str = ""


@dataclass(frozen=True)
class InFlight:
    """What admission keeps of a request until it is answered."""

    tenant: str
    model: str
    admitted_s: float


class _StoredStatus(msgspec.Struct, frozen=True):
    status: str
    date_done: str | None = None
    tenant: str = ""


_decode_way = msgspec.json.Decoder(StoredWay).decode
_decode_status = msgspec.json.Decoder(_StoredStatus).decode


def _decode(meta: bytes) -> StoredWay:
    """A stored state; of a result that has another form than ours, its state alone."""
    try:
        return _decode_way(meta)
    except msgspec.ValidationError:
        bare = _decode_status(meta)
        return StoredWay(status=bare.status, date_done=bare.date_done, tenant=bare.tenant)


@dataclass
class _Facts:
    told: StoredResult = field(default_factory=StoredResult)
    finished_at: float | None = None
    state: str = PENDING
    tenant: str = ""


def request_way(request_id: str, meta: bytes | None, in_flight: InFlight | None) -> RequestWay:
    """A request's way, as far as it has gone."""
    facts = _Facts()
    if meta is not None:
        stored = _decode(meta)
        facts = _Facts(stored.result or StoredResult(), wall_s(stored.date_done), stored.status, stored.tenant)
    told, metadata = facts.told, facts.told.metadata
    message, details = [*told.exc_message, "", {}][:2]
    has_failed = facts.state in (FAILURE, REVOKED)
    latency_ms = told.latency_ms if facts.state == SUCCESS else None
    submitted_at = None if in_flight is None else in_flight.admitted_s
    if latency_ms is not None and facts.finished_at is not None:
        submitted_at = facts.finished_at - latency_ms / 1000
    usage = metadata.get("usage") or {}
    attempts = metadata.get("attempts") if facts.state == SUCCESS else _dict(details).get("attempts")
    return RequestWay(
        id=request_id,
        state=facts.state,
        status_url=status_url(request_id),
        tenant=(in_flight.tenant if in_flight is not None else facts.tenant) or None,
        model=_text(metadata.get("model")) or (in_flight.model if in_flight is not None else None),
        task=_text(metadata.get("task")),
        submitted_at=submitted_at,
        finished_at=facts.finished_at,
        latency_ms=latency_ms,
        engine=told.engine_used or told.engine,
        worker=_text(metadata.get("worker")) or told.worker,
        gpu=_text(metadata.get("gpu_id")),
        batch_id=_text(metadata.get("batch_id")) or told.batch_id,
        batch_size=told.batch_size,
        cache_hit=told.cache_hit,
        input_tokens=_whole(_dict(usage).get("input_tokens")),
        output_tokens=_whole(_dict(usage).get("output_tokens")),
        steps=[] if latency_ms is None else steps_of(metadata, latency_ms),
        attempts=attempt_states(attempts),
        error_code=told.code if has_failed else None,
        error_message=str(message)[:MAX_MESSAGE_CHARS] if has_failed else None,
        preview=preview(bytes(told.outputs)) if facts.state == SUCCESS else None,
    )


def steps_of(metadata: Mapping[str, Any], latency_ms: float) -> list[Step]:
    """The parts of a finished request's way; what the others leave of the whole is the answer's own."""
    steps: list[Step] = []
    at_ms = 0.0
    for name in ("queue", "batching", "dispatch", "inference"):
        took = metadata.get(f"{name}_ms")
        if isinstance(took, int | float):
            steps.append(Step(name=name, started_ms=round(at_ms, 3), took_ms=float(took)))
            at_ms += took
    if steps:
        steps.append(Step(name="answer", started_ms=round(at_ms, 3), took_ms=round(max(0.0, latency_ms - at_ms), 3)))
    return steps


def attempt_states(attempts: Any) -> list[AttemptState]:
    """Attempts as results and errors carry them; what has another form is passed over."""
    if not isinstance(attempts, list):
        return []
    found = [(one, _dict(one.get("error"))) for one in attempts if isinstance(one, dict)]
    return [
        AttemptState(
            engine=str(one.get("engine", "")),
            code=str(error.get("code", "")),
            message=str(error.get("message", ""))[:MAX_MESSAGE_CHARS],
        )
        for one, error in found
    ]


def preview(outputs: bytes) -> str | None:
    """The beginning of a result's outputs, as people want to read it."""
    decoded = msgspec.json.decode(outputs)
    if not isinstance(decoded, dict):
        return None
    if isinstance(decoded.get("text"), str):
        return str(decoded["text"])[:PREVIEW_CHARS]
    unpack_embedding(decoded)
    embedding = decoded.get("embedding")
    if isinstance(embedding, list):
        shown = ", ".join(f"{value:.4f}" for value in embedding[:8] if isinstance(value, int | float))
        return f"{len(embedding)} numbers: {shown}{', …' if len(embedding) > 8 else ''}"
    return json.dumps(decoded, ensure_ascii=False)[:PREVIEW_CHARS]


def dead_letter_state(line: DeadLetterLine) -> DeadLetterState:
    """A dead letter."""
    return DeadLetterState(
        entry_id=line.entry_id,
        request_id=line.request_id,
        model=line.model or None,
        code=line.code,
        message=line.message,
        attempts=attempt_states(line.attempts),
        died_at=line.died_at,
        can_be_replayed=line.is_request,
    )


def _since(then_s: float, now_s: float) -> float:
    return round(max(0.0, now_s - then_s), 3)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
