"""The gateway's spans: how a request was admitted, and how its result was delivered to whoever waited for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from muai_producers.errors import MuaiError
from muai_producers.monitoring.guard import guarded
from muai_producers.tracing import names
from muai_producers.tracing.base import Finished, Tracer
from muai_producers.tracing.context import is_sampled, request_span
from muai_producers.tracing.requests import part_of, request_attributes, request_finished
from muai_producers.wire import InferenceRequest


@guarded("traces")
def admitted(tracer: Tracer, requests: Sequence[InferenceRequest], outcomes: Sequence[str | MuaiError]) -> None:
    """Tell how the requests of one round trip were admitted; those that were refused have ended with that."""
    now_s = time.time()
    spans: list[Finished] = []
    for request, outcome in zip(requests, outcomes, strict=True):
        span = request_span(request) if is_sampled(request) else None
        if span is None:
            continue
        error = outcome if isinstance(outcome, MuaiError) else None
        told = {**request_attributes(request), names.MESSAGING_OPERATION: "send"}
        if error is None and outcome != request.id:
            told[names.EARLIER_REQUEST] = outcome  # the same idempotency key: that request is the one that goes on
        start_s = request.submitted_at
        own = part_of(request, span, names.ADMISSION)
        spans.append(
            Finished(
                names.ADMISSION,
                own,
                span.own.span_id,
                start_s,
                now_s,
                told,
                "producer",
                error=error,
                inputs=(request.inputs,),
            )
        )
        if error is not None:
            spans.append(request_finished(request, span, now_s, error, state=names.REFUSED))
        elif outcome != request.id:
            spans.append(request_finished(request, span, now_s, None, state=names.KNOWN))
    tracer.record(spans)


@guarded("traces")
def delivered(tracer: Tracer, request: InferenceRequest, came_s: float, state: str, route: str, status: int) -> None:
    """Tell how long it took from the word of a result to the HTTP response.

    Args:
        came_s: when the result was there; wall-clock seconds.
    """
    span = request_span(request) if tracer.enabled and is_sampled(request) else None
    if span is None:
        return
    told = {
        **request_attributes(request),
        names.STATE: state,
        names.HTTP_METHOD: "POST",
        names.HTTP_ROUTE: route,
        names.HTTP_STATUS: status,
    }
    own = part_of(request, span, names.DELIVERY)
    tracer.record([Finished(names.DELIVERY, own, span.own.span_id, came_s, time.time(), told)])
