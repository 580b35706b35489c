"""What an engine worker's batches add to the metrics: gathered once a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.outcomes import SUCCESS
from muai_producers.monitoring.recorder import Entry, Recorder
from muai_producers.wire import InferenceRequest, InferenceResult

STAGES = {"queue": "queue_ms", "batching": "batching_ms", "dispatch": "dispatch_ms", "inference": "inference_ms"}
"""Stage, and where a result's metadata has its time."""

NO_USAGE: dict[str, int] = {}


@guarded("metrics")
def record_served(
    recorder: Recorder, model: str, engine: str, served: Sequence[tuple[InferenceRequest, InferenceResult]]
) -> None:
    """Requests of one batch that have their results."""
    if not served or not recorder.enabled:
        return
    recorder.record(*_served(model, engine, served))


def _served(model: str, engine: str, served: Sequence[tuple[InferenceRequest, InferenceResult]]) -> list[Entry]:
    count = len(served)
    metadata = [result.metadata for _, result in served]
    latencies_s = [result.latency_ms / 1000 for _, result in served]
    usages = [one.get("usage") or NO_USAGE for one in metadata]
    inputs, outputs = ([usage.get(name, 0) for usage in usages] for name in ("input_tokens", "output_tokens"))
    entries: list[Entry] = [
        (instruments.REQUESTS, (model, engine, SUCCESS), count),
        (instruments.ATTEMPTS, (model, engine, "served"), count),
        (instruments.LATENCY, (model, engine), latencies_s),
        (instruments.TOKENS, (model, engine, "input"), sum(inputs)),
        (instruments.TOKENS, (model, engine, "output"), sum(outputs)),
    ]
    for stage, name in STAGES.items():
        if name in metadata[0]:
            entries.append((instruments.STAGE, (model, stage), [one[name] / 1000 for one in metadata]))
    tenants = {request.tenant for request, _ in served}
    for tenant in tenants:
        own = None if len(tenants) == 1 else [place for place, (one, _) in enumerate(served) if one.tenant == tenant]

        def of_tenant(values: list[Any], own: list[int] | None = own) -> list[Any]:
            return values if own is None else [values[place] for place in own]

        entries += (
            (instruments.TENANT_REQUESTS, (tenant, SUCCESS), count if own is None else len(own)),
            (instruments.TENANT_LATENCY, (tenant,), of_tenant(latencies_s)),
            (instruments.TENANT_TOKENS, (tenant, "input"), sum(of_tenant(inputs))),
            (instruments.TENANT_TOKENS, (tenant, "output"), sum(of_tenant(outputs))),
        )
    return entries


def record_run(recorder: Recorder, model: str, engine: str, size: int, failed: int) -> None:
    """An engine has run a batch.

    Args:
        size: requests that it was given.
        failed: of them, those that it did not serve through no fault of theirs.
    """
    recorder.record(
        (instruments.BATCH_SIZE, (model,), (size,)), (instruments.ATTEMPTS, (model, engine, "failed"), failed)
    )


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
