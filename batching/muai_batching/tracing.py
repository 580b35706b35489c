"""The collector's spans: how a request was routed, and how it waited for its batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from muai_producers.errors import MuaiError
from muai_producers.monitoring.guard import guarded
from muai_producers.store import Answer
from muai_producers.tracing import names
from muai_producers.tracing.base import Finished, Tracer
from muai_producers.tracing.context import UNTRACED, Trace, is_sampled, read_trace, request_span
from muai_producers.tracing.requests import (
    batch_span_id,
    part_attributes,
    part_of,
    request_attributes,
    request_finished,
)
from muai_producers.wire import Batch, InferenceRequest


class CollectorTracing:
    """Keeps the times of the requests that are traced, and tells their spans when they leave. Costs others nothing.

    Args:
        system: the broker's name in OpenTelemetry's table: `redis`, `rabbitmq`.
        wall_s: wall-clock seconds.
    """

    def __init__(self, tracer: Tracer, *, system: str, wall_s: Callable[[], float] = time.time) -> None:
        self._tracer = tracer
        self._system = system
        self._wall_s = wall_s
        self._times: dict[str, tuple[float, float]] = {}
        """By request: when it came, and when its batch key was known."""
        self._refused: dict[str, tuple[InferenceRequest, MuaiError, str]] = {}

    def entered(self, request: InferenceRequest, headers: Mapping[str, Any]) -> InferenceRequest:
        """The request with the trace that it belongs to: its own, its message's, or a new one where it is to be traced.

        A plain Celery producer that uses OpenTelemetry has the context in the message's headers.
        """
        if not self._tracer.enabled:
            return request
        if not request.trace:
            trace = _trace_of(headers) or self._tracer.head(request.id)
            if trace is UNTRACED:
                return request  # without a trace it stays: workers decide nothing
            request = msgspec.structs.replace(request, trace=trace)
        if is_sampled(request):
            now_s = self._wall_s()
            self._times[request.id] = (now_s, now_s)
        return request

    def routed(self, request: InferenceRequest) -> None:
        """The request's batch key is known."""
        times = self._times.get(request.id)
        if times is not None:
            self._times[request.id] = (times[0], self._wall_s())

    def passed_on(self, request: InferenceRequest) -> InferenceRequest:
        """The request as it goes to another collector, with what was decided on it."""
        self._times.pop(request.id, None)
        if request.trace or not self._tracer.enabled:
            return request
        return msgspec.structs.replace(request, trace=UNTRACED)

    def sent(self, batch: Batch) -> None:
        """The batch is with its engine's queue."""
        if self._times:
            self._sent(batch)

    @guarded("traces")
    def _sent(self, batch: Batch) -> None:
        spans: list[Finished] = []
        for request in batch.requests:
            times = self._times.pop(request.id, None)
            if times is not None:
                spans += self._way(request, times, batch)
        self._tracer.record(spans)

    def _way(self, request: InferenceRequest, times: tuple[float, float], batch: Batch) -> list[Finished]:
        span = request_span(request)
        if span is None:
            return []
        came_s, routed_s = times
        engine = {**part_attributes(request), names.ENGINE: batch.engine}
        routing = Finished(
            names.ROUTING,
            part_of(request, span, names.ROUTING),
            span.own.span_id,
            came_s,
            routed_s,
            {
                **engine,
                names.CHAIN: [batch.engine, *batch.chain],
                names.MESSAGING_SYSTEM: self._system,
                names.MESSAGING_OPERATION: "receive",
            },
            "consumer",
        )
        batching = Finished(
            names.BATCHING,
            part_of(request, span, names.BATCHING),
            span.own.span_id,
            routed_s,
            self._wall_s(),
            {
                **engine,
                names.BATCH_ID: batch.id,
                names.BATCH_SIZE: len(batch.requests),
                names.MESSAGING_SYSTEM: self._system,
                names.MESSAGING_OPERATION: "send",
                names.MESSAGING_DESTINATION: f"engine.{batch.engine}",
                names.MESSAGING_MESSAGE_ID: batch.id,
                names.MESSAGING_MESSAGE_COUNT: len(batch.requests),
            },
            "producer",
            links=(batch_span_id(batch.id),),
        )
        return [routing, batching]

    def refused(self, request: InferenceRequest, error: MuaiError, state: str) -> None:
        """The request is to be answered with an error."""
        if request.id in self._times:
            self._refused[request.id] = (request, error, state)

    def answered(self, answers: Sequence[Answer], accepted: Sequence[bool]) -> None:
        """Of the refused, those whose answers are written now."""
        if self._refused:
            self._answered(answers, accepted)

    @guarded("traces")
    def _answered(self, answers: Sequence[Answer], accepted: Sequence[bool]) -> None:
        now_s = self._wall_s()
        for answer, is_first in zip(answers, accepted, strict=True):
            request, error, state = self._refused.pop(answer.request_id, (None, None, ""))
            times = self._times.pop(answer.request_id, None)
            span = None if request is None else request_span(request)
            if request is None or span is None or times is None or not is_first:
                continue
            routing_id = part_of(request, span, names.ROUTING)
            told = request_attributes(request)
            routing = Finished(
                names.ROUTING,
                routing_id,
                span.own.span_id,
                times[0],
                now_s,
                told,
                error=error,
                inputs=(request.inputs,),
            )
            self._tracer.record([routing, request_finished(request, span, now_s, error, state=state)])

    def forget_all(self) -> None:
        """What was held is the broker's again."""
        self._times.clear()
        self._refused.clear()


def _trace_of(headers: Mapping[str, Any]) -> Trace:
    found = read_trace(headers.get("traceparent"), headers.get("tracestate", ""))
    return {} if found is None else found.as_trace()
