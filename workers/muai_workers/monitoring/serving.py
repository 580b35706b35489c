"""What an engine worker's batches add to the metrics: gathered once a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.outcomes import SUCCESS
from muai_producers.monitoring.recorder import Recorder
from muai_producers.wire import InferenceRequest, InferenceResult

STAGES = {"queue": "queue_ms", "batching": "batching_ms", "dispatch": "dispatch_ms", "inference": "inference_ms"}
"""Stage, and where a result's metadata has its time."""


@guarded("metrics")
def record_served(
    recorder: Recorder, model: str, engine: str, served: Sequence[tuple[InferenceRequest, InferenceResult]]
) -> None:
    """Requests of one batch that have their results."""
    if not served or not recorder.enabled:
        return
    count = len(served)
    metadata = [result.metadata for _, result in served]
    latencies_s = [result.latency_ms / 1000 for _, result in served]
    recorder.count(instruments.REQUESTS, model, engine, SUCCESS, by=count)
    recorder.count(instruments.ATTEMPTS, model, engine, "served", by=count)
    recorder.observe(instruments.LATENCY, model, engine, values=latencies_s)
    for stage, name in STAGES.items():
        times = [one[name] / 1000 for one in metadata if name in one]
        if times:
            recorder.observe(instruments.STAGE, model, stage, values=times)
    usages = [one.get("usage") or {} for one in metadata]
    for direction in ("input", "output"):
        tokens = sum(usage.get(f"{direction}_tokens", 0) for usage in usages)
        recorder.count(instruments.TOKENS, model, engine, direction, by=tokens)
    _record_tenants(recorder, [request.tenant for request, _ in served], latencies_s, usages)


def _record_tenants(
    recorder: Recorder, tenants: Sequence[str], latencies_s: Sequence[float], usages: Sequence[dict[str, int]]
) -> None:
    by_tenant: dict[str, list[int]] = {}
    for place, tenant in enumerate(tenants):
        by_tenant.setdefault(tenant, []).append(place)
    for tenant, places in by_tenant.items():
        recorder.count(instruments.TENANT_REQUESTS, tenant, SUCCESS, by=len(places))
        recorder.observe(instruments.TENANT_LATENCY, tenant, values=[latencies_s[place] for place in places])
        for direction in ("input", "output"):
            tokens = sum(usages[place].get(f"{direction}_tokens", 0) for place in places)
            recorder.count(instruments.TENANT_TOKENS, tenant, direction, by=tokens)


def record_run(recorder: Recorder, model: str, engine: str, size: int, failed: int) -> None:
    """An engine has run a batch.

    Args:
        size: requests that it was given.
        failed: of them, those that it did not serve through no fault of theirs.
    """
    recorder.observe_alike(instruments.BATCH_SIZE, model, value=size, times=1)
    recorder.count(instruments.ATTEMPTS, model, engine, "failed", by=failed)


def record_fallback(recorder: Recorder, model: str, engine: str, to: str | None, requests: int) -> None:
    """Requests go on at the next engine, or nowhere."""
    recorder.count(instruments.FALLBACKS, model, engine, to or instruments.NO_ENGINE, by=requests)


class FirstPieces:
    """Of a batch's streamed requests, when each had its first piece of text."""

    def __init__(self, requests: Iterable[InferenceRequest]) -> None:
        self._submitted_s = {request.id: request.submitted_at for request in requests if request.stream}
        self.times_s: list[float] = []

    def seen(self, request_id: str, now_s: float) -> None:
        """A piece of text is there; only a request's first counts."""
        submitted_s = self._submitted_s.pop(request_id, None)
        if submitted_s is not None:
            self.times_s.append(max(0.0, now_s - submitted_s))
