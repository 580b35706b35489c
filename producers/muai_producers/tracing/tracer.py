"""`OTelTracer`: spans through OpenTelemetry's SDK, live ones and those that are told afterwards."""

from __future__ import annotations

import functools
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from muai_producers.errors import MuaiError
from muai_producers.logs.context import current
from muai_producers.logs.redaction import Redactor
from muai_producers.monitoring.guard import guarded
from muai_producers.tracing import names
from muai_producers.tracing.base import Attributes, Finished, TracingState
from muai_producers.tracing.context import UNTRACED, SpanId, Trace, root_trace
from muai_producers.tracing.export import SpanQueue, attribute_values, hush_exporters, make_exporter
from muai_producers.tracing.sampling import HeadSampler

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.monitoring import TracingSettings

MAX_STACK_CHARS = 8192
MAX_MESSAGE_CHARS = 1024
_KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
_SCOPE = InstrumentationScope(names.SCOPE)
_SAMPLED, _NOT_SAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
_OK = Status(StatusCode.OK)


class OTelTracer:
    """See `muai_producers.tracing.base.Tracer`. The application's own OpenTelemetry is left alone.

    Args:
        role: what this process is, told with each span: `gateway`, `collector`, `worker`, `control`.
        make_exporter_: for tests and other destinations; None: the OTLP collector of the settings.
        redactor: what is kept out of errors' messages and stacks; None: nothing.
    """

    enabled = True

    def __init__(
        self,
        config: TracingSettings,
        role: str = "",
        *,
        make_exporter_: Callable[[], SpanExporter] | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        hush_exporters()
        self._redactor = redactor or Redactor(contents=True)
        make = make_exporter_ or functools.partial(make_exporter, config)
        self._spans = SpanQueue(make, config.export_timeout_ms / 1000)
        self._sampler = HeadSampler(config.sample_rate, config.max_traces_per_s or None)
        self._resource = _HashedOnce.of(
            Resource.create(
                {
                    "service.name": config.service_name,
                    "service.instance.id": f"{role or 'python'}-{os.getpid()}@{socket.gethostname()}",
                    "muai.role": role or None,
                }
            )
        )
        self._provider = TracerProvider(
            sampler=ParentBased(_Head(self)),
            resource=self._resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_span_attribute_length=MAX_STACK_CHARS),
        )
        self._provider.add_span_processor(self._spans)
        self._tracer = self._provider.get_tracer(names.SCOPE)

    # -- sampling --------------------------------------------------------------------------------------------------

    @property
    def sample_rate(self) -> float:
        """Share of the requests that are traced; may be set at any time."""
        return self._sampler.rate

    @sample_rate.setter
    def sample_rate(self, rate: float) -> None:
        self._sampler.rate = rate

    def reconfigure(self, settings: Settings) -> None:
        """See `Tracer`."""
        self._sampler.rate = settings.monitoring.tracing.sample_rate

    def takes(self, trace_id: int) -> bool:
        """The head decision on a trace, or on a number by chance."""
        return not self._spans.is_paused and self._sampler.takes(trace_id, time.monotonic())

    def head(self, request_id: str) -> Trace:
        """See `Tracer`."""
        return root_trace(request_id) if self.takes(random.getrandbits(64)) else UNTRACED

    # -- spans that have ended -------------------------------------------------------------------------------------

    def record(self, spans: Sequence[Finished]) -> None:
        """See `Tracer`."""
        if spans and not self._spans.is_paused:
            with guarded("traces"):
                self._spans.add(self._readable(span) for span in spans if span.id.sampled)

    def _readable(self, span: Finished) -> ReadableSpan:
        parent = None if span.parent_id is None else SpanId(span.id.trace_id, span.parent_id, True, span.id.state)
        attributes = attribute_values(span.attributes)
        end_ns = round(max(span.start_s, span.end_s) * 1e9)
        status = _OK
        events: tuple[Event, ...] = ()
        if span.error is not None:
            told = self._told(span.error, span.inputs)
            attributes |= told
            status = Status(StatusCode.ERROR, told[names.ERROR_MESSAGE])
            events = (_exception_event(told, end_ns),)
        return ReadableSpan(
            span.name,
            context=_context(span.id, is_remote=False),
            parent=None if parent is None else _context(parent, is_remote=True),
            resource=self._resource,
            attributes=attributes,
            events=events,
            links=[Link(_context(link, is_remote=True)) for link in span.links],
            kind=_KINDS[span.kind],
            status=status,
            start_time=round(span.start_s * 1e9),
            end_time=end_ns,
            instrumentation_scope=_SCOPE,
        )

    def _told(self, error: BaseException, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return error_attributes(error, lambda text: self._redactor.clean(text, inputs))

    # -- live spans ------------------------------------------------------------------------------------------------

    @contextmanager
    def trace_request(self, request_id: str) -> Iterator[api.Span]:
        """See `Tracer`."""
        with self._live(names.REQUEST, SpanKind.SERVER, {names.REQUEST_ID: request_id}) as span:
            yield span

    @contextmanager
    def trace_workflow(self, workflow_name: str) -> Iterator[api.Span]:
        """See `Tracer`. A workflow within one is a step of it, and is called by its name."""
        outer = api.get_current_span()
        is_step = getattr(outer, "name", "") == names.WORKFLOW_EXECUTION
        name = workflow_name if is_step else names.WORKFLOW_EXECUTION
        attributes = {names.STEP if is_step else names.WORKFLOW_TYPE: workflow_name}
        with self._live(name, SpanKind.INTERNAL, attributes) as span:
            yield span

    @contextmanager
    def trace_inference(self, model_name: str, engine: str) -> Iterator[api.Span]:
        """See `Tracer`."""
        attributes = {names.MODEL_NAME: model_name, names.ENGINE: engine, names.GEN_AI_MODEL: model_name}
        with self._live(names.INFERENCE, SpanKind.INTERNAL, attributes) as span:
            yield span

    @contextmanager
    def trace_part(self, name: str, attributes: Attributes, within: SpanId | None = None) -> Iterator[api.Span]:
        """See `Tracer`."""
        parent = None
        if within is not None:
            parent = api.set_span_in_context(api.NonRecordingSpan(_context(within, is_remote=True)))
        with self._live(name, SpanKind.INTERNAL, attribute_values(attributes), parent) as span:
            yield span

    @contextmanager
    def _live(self, name: str, kind: SpanKind, attributes: dict[str, Any], parent: Any = None) -> Iterator[api.Span]:
        span = self._tracer.start_span(name, parent, kind, attributes)
        with api.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield span
            except BaseException as error:
                self.record_error(span, error)
                raise
            if span.is_recording() and getattr(span, "status", _OK).status_code is StatusCode.UNSET:
                span.set_status(_OK)

    def record_error(self, span: api.Span, error: BaseException) -> None:
        """See `Tracer`."""
        if not span.is_recording():
            return
        told = self._told(error, current().inputs)
        span.set_attributes(told)
        span.set_status(Status(StatusCode.ERROR, told[names.ERROR_MESSAGE]))
        event = _exception_event(told, time.time_ns())
        span.add_event(event.name, event.attributes, event.timestamp)

    # -- the rest --------------------------------------------------------------------------------------------------

    def state(self) -> TracingState:
        """See `Tracer`."""
        return self._spans.state()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Export what waits now; False when that took longer."""
        return self._spans.force_flush(round(timeout_s * 1000))

    def close(self, timeout_s: float | None = None) -> None:
        """See `Tracer`."""
        self._spans.shutdown(timeout_s)


class _HashedOnce(Resource):
    """A resource whose hash is kept: the exporters take it once a span, and the SDK's writes JSON for it each time."""

    _hash: int

    @classmethod
    def of(cls, resource: Resource) -> _HashedOnce:
        """The same resource."""
        made = cls(resource.attributes, resource.schema_url)
        made._hash = hash(resource)
        return made

    def __hash__(self) -> int:
        return self._hash


class _Head(Sampler):
    """The head decision, for live spans without a parent."""

    def __init__(self, tracer: OTelTracer) -> None:
        self._tracer = tracer

    def should_sample(
        self,
        parent_context: Any,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Any = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """See `Sampler`."""
        is_taken = self._tracer.takes(trace_id)
        return SamplingResult(Decision.RECORD_AND_SAMPLE if is_taken else Decision.DROP, attributes, trace_state)

    def get_description(self) -> str:
        """See `Sampler`."""
        return f"MuaiHead({self._tracer.sample_rate})"


def error_attributes(error: BaseException, mask: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Type, message and stack of an error, under the specification's names and OpenTelemetry's error type.

    The stack is that of the first cause: what an engine's library raised, where an engine failed.
    """
    message = error.message if isinstance(error, MuaiError) else str(error)
    stack = "".join(traceback.format_exception(error))[-MAX_STACK_CHARS:]
    if mask is not None:
        message, stack = mask(message), mask(stack)
    told: dict[str, Any] = {
        names.ERROR_TYPE: type(error).__name__,
        names.ERROR_MESSAGE: message[:MAX_MESSAGE_CHARS],
        names.STACK_TRACE: stack,
        names.OTEL_ERROR_TYPE: error.code if isinstance(error, MuaiError) else type(error).__qualname__,
    }
    if isinstance(error, MuaiError):
        told[names.RETRYABLE] = error.retryable
    return told


def _exception_event(told: dict[str, Any], at_ns: int) -> Event:
    attributes = {
        names.EXCEPTION_TYPE: told[names.ERROR_TYPE],
        names.EXCEPTION_MESSAGE: told[names.ERROR_MESSAGE],
        names.EXCEPTION_STACKTRACE: told[names.STACK_TRACE],
    }
    return Event(names.EXCEPTION, attributes, at_ns)


def _context(span: SpanId, *, is_remote: bool) -> SpanContext:
    state = TraceState.from_header([span.state]) if span.state else None
    return SpanContext(span.trace_id, span.span_id, is_remote, _SAMPLED if span.sampled else _NOT_SAMPLED, state)
