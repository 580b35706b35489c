"""A worker's spans: how each request of a batch was prepared, run and answered, and the batch itself.

They are told when they are over. While a batch runs, only times are noted, and of a batch none of whose requests is
traced not even those.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from muai_producers.errors import MuaiError, RequestCancelledError
from muai_producers.monitoring.guard import guarded
from muai_producers.store import FAILURE, REVOKED, SUCCESS, Answer, Store
from muai_producers.tracing import names
from muai_producers.tracing.base import Finished, Tracer
from muai_producers.tracing.context import RequestSpan, SpanId, is_sampled, request_span
from muai_producers.tracing.requests import (
    batch_span_id,
    part_attributes,
    part_of,
    request_attributes,
    request_finished,
)
from muai_producers.wire import Batch, InferenceRequest
from muai_workers.engines.base import Completion, EngineOutput, Piece


@dataclass
class Pass:
    """One call of the engine."""

    start_s: float
    request_ids: frozenset[str]
    end_s: float | None = None
    error: BaseException | None = None


@dataclass
class TracedRequest:
    """What is noted of one request of a batch."""

    request: InferenceRequest
    span: RequestSpan
    completed_s: float | None = None
    """When the engine was done with it."""
    handed_over_s: float | None = None
    """When its answer was ready to be written."""
    output: EngineOutput | None = None
    error: BaseException | None = None
    moved_to: str = ""
    """The engine that it goes on to."""


class BatchTrace:
    """What is noted of one batch while it runs. Requests that are not traced are not in it."""

    def __init__(
        self, batch: Batch, traced: dict[str, TracedRequest], start_s: float, wall_s: Callable[[], float]
    ) -> None:
        self.batch = batch
        self.traced = traced
        self.start_s = start_s
        self.prepared_s: float | None = None
        self.loading: Pass | None = None
        self.passes: list[Pass] = []
        self.num_run = 0
        self._wall_s = wall_s

    def prepared(self, requests: Sequence[InferenceRequest]) -> None:
        """Which of the batch's requests are to run is known."""
        self.prepared_s = self._wall_s()
        self.num_run = len(requests)

    def load(self, load: Callable[[], None], *, is_loaded: bool) -> None:
        """Have the model loaded, and note how long it took where it was not in memory."""
        if is_loaded:
            load()
            return
        self.loading = Pass(self._wall_s(), frozenset(self.traced))
        try:
            load()
        except BaseException as error:
            self.loading.error = error
            raise
        finally:
            self.loading.end_s = self._wall_s()

    def run(
        self, requests: Sequence[InferenceRequest], events: Iterator[Completion | Piece]
    ) -> Iterator[Completion | Piece]:
        """Pass on what the engine gives, and note when."""
        one = Pass(self._wall_s(), frozenset(request.id for request in requests))
        self.passes.append(one)
        try:
            for event in events:
                if isinstance(event, Completion) and event.request_id in self.traced:
                    self.traced[event.request_id].completed_s = self._wall_s()
                yield event
        except BaseException as error:
            one.error = error
            raise
        finally:
            one.end_s = self._wall_s()


class _NoTrace:
    """Notes nothing."""

    def prepared(self, requests: Sequence[InferenceRequest]) -> None:
        """See `BatchTrace`."""

    def load(self, load: Callable[[], None], *, is_loaded: bool) -> None:
        """See `BatchTrace`."""
        load()

    def run(
        self, requests: Sequence[InferenceRequest], events: Iterator[Completion | Piece]
    ) -> Iterator[Completion | Piece]:
        """See `BatchTrace`."""
        return events


NO_TRACE = _NoTrace()
AnyTrace = BatchTrace | _NoTrace


@dataclass
class WorkerTracing:
    """Tells the spans of the batches of one worker. Thread-safe.

    Args:
        about: attributes of the worker's own: its name, its GPU.
        wall_s: wall-clock seconds.
    """

    tracer: Tracer
    store: Store
    about: dict[str, Any]
    wall_s: Callable[[], float] = time.time
    _open: dict[str, tuple[BatchTrace, TracedRequest]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, batch: Batch) -> AnyTrace:
        """Note a batch from now on."""
        if not self.tracer.enabled:
            return NO_TRACE
        return self._begin(batch) or NO_TRACE

    @guarded("traces")
    def _begin(self, batch: Batch) -> BatchTrace | None:
        traced = {}
        for request in batch.requests:
            span = request_span(request) if is_sampled(request) else None
            if span is not None:
                traced[request.id] = TracedRequest(request, span)
        if not traced:
            return None
        trace = BatchTrace(batch, traced, self.wall_s(), self.wall_s)
        with self._lock:
            self._open |= {request_id: (trace, one) for request_id, one in traced.items()}
        return trace

    def answering(
        self, request: InferenceRequest, output: EngineOutput | None = None, error: BaseException | None = None
    ) -> None:
        """The request's answer is about to be written."""
        _, one = self._open.get(request.id, (None, None))
        if one is not None:
            one.handed_over_s, one.output = self.wall_s(), output
            one.error = error if error is not None else one.error

    def failed(self, request: InferenceRequest, error: MuaiError) -> None:
        """The engine could not serve the request; it may go on to another."""
        _, one = self._open.get(request.id, (None, None))
        if one is not None:
            one.error = error

    def moved(self, part: Batch) -> None:
        """These requests go on elsewhere."""
        for request in part.requests:
            _, one = self._open.get(request.id, (None, None))
            if one is not None:
                one.moved_to = part.engine

    def written(self, answers: Sequence[Answer], accepted: Sequence[bool]) -> None:
        """Answers have been written; those that a request had before are not its end."""
        if self._open:
            self._written(answers, accepted)

    @guarded("traces")
    def _written(self, answers: Sequence[Answer], accepted: Sequence[bool]) -> None:
        now_s = self.wall_s()
        spans: list[Finished] = []
        for answer, is_first in zip(answers, accepted, strict=True):
            with self._lock:
                trace, one = self._open.pop(answer.request_id, (None, None))
            if trace is None or one is None:
                continue
            spans += _attempt(trace, one, now_s, self.about)
            if is_first:
                spans += _answered(trace, one, now_s)
        self.tracer.record(spans)

    def finish(self, trace: AnyTrace) -> None:
        """The batch is over: tell its span, and those of the requests that were not answered here."""
        if isinstance(trace, BatchTrace):
            self._finish(trace)

    @guarded("traces")
    def _finish(self, trace: BatchTrace) -> None:
        now_s = self.wall_s()
        with self._lock:
            left = [one for request_id, one in trace.traced.items() if self._open.pop(request_id, None) is not None]
        spans = [_batch(trace, now_s, self.about)]
        for one in left:
            if one.moved_to or one.completed_s is not None:
                spans += _attempt(trace, one, now_s, self.about)
        spans += self._ended_elsewhere([one for one in left if not one.moved_to], now_s)
        self.tracer.record(spans)

    def give_up(self, batch: Batch) -> None:
        """The batch ended by a fault of ours; what was answered has been told."""
        with self._lock:
            for request in batch.requests:
                self._open.pop(request.id, None)

    def _ended_elsewhere(self, left: Sequence[TracedRequest], now_s: float) -> list[Finished]:
        """The spans of requests that were cancelled: whoever cancels has no more than an id, and tells no span."""
        if not left:
            return []
        states = self.store.states([one.request.id for one in left])
        return [
            request_finished(
                one.request,
                one.span,
                now_s,
                RequestCancelledError(f"request {one.request.id} was cancelled"),
                state=REVOKED,
            )
            for one, state in zip(left, states, strict=True)
            if state is not None and state.status == REVOKED
        ]


def _batch(trace: BatchTrace, now_s: float, about: dict[str, Any]) -> Finished:
    batch = trace.batch
    return Finished(
        names.BATCH,
        batch_span_id(batch.id),
        None,
        batch.formed_at or trace.start_s,
        now_s,
        {
            names.BATCH_ID: batch.id,
            names.MODEL_NAME: batch.model,
            names.ENGINE: batch.engine,
            names.BATCH_SIZE: len(batch.requests),
            names.WORKFLOW_TYPE: batch.task,
            names.GEN_AI_OPERATION: names.GEN_AI_OPERATIONS.get(batch.task),
            names.GEN_AI_MODEL: batch.model,
            names.MESSAGING_OPERATION: "process",
            names.MESSAGING_DESTINATION: f"engine.{batch.engine}",
            names.MESSAGING_MESSAGE_COUNT: len(batch.requests),
            names.ATTEMPT: len(batch.attempts) + 1,
            **about,
        },
        "consumer",
        links=[one.span.own for one in trace.traced.values()],
        error=_whole_error(trace),
        inputs=[request.inputs for request in batch.requests],
    )


def _whole_error(trace: BatchTrace) -> BaseException | None:
    """What went wrong with the batch as a whole: its model did not load, or no pass of it went well."""
    if trace.loading is not None and trace.loading.error is not None:
        return trace.loading.error
    errors = [one.error for one in trace.passes]
    return errors[0] if errors and all(error is not None for error in errors) else None


def _attempt(trace: BatchTrace, one: TracedRequest, now_s: float, about: dict[str, Any]) -> list[Finished]:
    """The spans of one request on one engine: from the batch's arrival at the worker to the request's result.

    The two that people look for tell everything; those below them tell what is their own.
    """
    batch, request, span = trace.batch, one.request, one.span
    prepared_s = trace.prepared_s or now_s
    done_s = one.completed_s or _failed_s(trace, request.id) or prepared_s
    told = {**request_attributes(request, batch.task), names.ENGINE: batch.engine, names.BATCH_ID: batch.id}
    told |= {names.BATCH_SIZE: trace.num_run or len(batch.requests), names.ATTEMPT: len(batch.attempts) + 1, **about}
    whole = part_of(request, span, names.WORKFLOW_EXECUTION, batch.id)
    inference = part_of(request, span, names.INFERENCE, batch.id)
    execution = Finished(
        names.WORKFLOW_EXECUTION,
        whole,
        span.own.span_id,
        trace.start_s,
        one.handed_over_s or max(done_s, prepared_s),
        told,
        "consumer",
        links=_earlier(request, span, batch),
        error=one.error,
        inputs=(request.inputs,),
    )
    spans = [execution, _part(trace, one, names.PREPROCESSING, whole, trace.start_s, prepared_s)]
    if trace.loading is None and not trace.passes:
        return spans
    spans.append(
        Finished(
            names.INFERENCE,
            inference,
            whole.span_id,
            prepared_s,
            done_s,
            {**told, **_usage(one)},
            links=[batch_span_id(batch.id), *_earlier(request, span, batch)],
            error=one.error,
            inputs=(request.inputs,),
        )
    )
    spans += _calls(trace, one, inference, now_s)
    if one.completed_s is not None and one.handed_over_s is not None:
        spans.append(_part(trace, one, names.POSTPROCESSING, whole, one.completed_s, one.handed_over_s))
    return spans


def _calls(trace: BatchTrace, one: TracedRequest, inference: SpanId, now_s: float) -> list[Finished]:
    """What the engine was called for: to load the model, and to run the request, as often as it took."""
    spans = []
    if trace.loading is not None:
        stop_s = trace.loading.end_s or now_s
        spans.append(_part(trace, one, names.MODEL_LOADING, inference, trace.loading.start_s, stop_s, trace.loading))
    for a_pass in trace.passes:
        if one.request.id in a_pass.request_ids:
            stop_s = one.completed_s if a_pass.error is None and one.completed_s else a_pass.end_s or now_s
            spans.append(_part(trace, one, names.FORWARD_PASS, inference, a_pass.start_s, stop_s, a_pass))
    return spans


def _part(
    trace: BatchTrace,
    one: TracedRequest,
    name: str,
    parent: SpanId,
    start_s: float,
    stop_s: float,
    call: Pass | None = None,
) -> Finished:
    batch, request = trace.batch, one.request
    told: dict[str, Any] = {**part_attributes(request), names.ENGINE: batch.engine}
    if call is not None:
        told[names.BATCH_SIZE] = len(call.request_ids)
    return Finished(
        name,
        part_of(request, one.span, name, batch.id, str(start_s)),
        parent.span_id,
        start_s,
        stop_s,
        told,
        error=None if call is None else call.error,
        inputs=() if call is None else [each.inputs for each in batch.requests],
    )


def _failed_s(trace: BatchTrace, request_id: str) -> float | None:
    """When the last pass that had the request ended."""
    ends = [one.end_s for one in trace.passes if request_id in one.request_ids and one.end_s is not None]
    if trace.loading is not None and trace.loading.end_s is not None:
        ends.append(trace.loading.end_s)
    return max(ends, default=None)


def _earlier(request: InferenceRequest, span: RequestSpan, batch: Batch) -> list[SpanId]:
    """The attempt that this one follows."""
    return [part_of(request, span, names.INFERENCE, batch.after)] if batch.after else []


def _usage(one: TracedRequest) -> dict[str, Any]:
    if one.output is None:
        return {}
    finish_reason = one.output.outputs.get("finish_reason")
    return {
        names.SEQUENCE_LENGTH: one.output.input_tokens,
        names.GEN_AI_INPUT_TOKENS: one.output.input_tokens,
        names.GEN_AI_OUTPUT_TOKENS: one.output.output_tokens,
        names.GEN_AI_FINISH_REASONS: [finish_reason] if finish_reason else None,
        names.CACHE_HIT: one.output.cache_hit,
    }


def _answered(trace: BatchTrace, one: TracedRequest, now_s: float) -> list[Finished]:
    """The writing of the answer, and the request as a whole."""
    batch, request, span = trace.batch, one.request, one.span
    formatting = Finished(
        names.RESPONSE_FORMATTING,
        part_of(request, span, names.RESPONSE_FORMATTING),
        span.own.span_id,
        one.handed_over_s or now_s,
        now_s,
        part_attributes(request),
    )
    more = {
        names.ENGINE: batch.engine,
        names.BATCH_ID: batch.id,
        names.BATCH_SIZE: trace.num_run,
        names.ATTEMPT: len(batch.attempts) + 1,
        **_usage(one),
    }
    state = SUCCESS if one.error is None else FAILURE
    whole = request_finished(request, span, now_s, one.error, task=batch.task, state=state, more=more)
    return [formatting, whole]


__all__ = ["NO_TRACE", "AnyTrace", "BatchTrace", "WorkerTracing"]
