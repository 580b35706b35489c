"""Trace context as it travels, and the ids that follow from a request's: pure, and without OpenTelemetry.

A request's own span is made when its terminal result is written, by whichever process writes it; its children are made
elsewhere and earlier. So the id of that span follows from the request's id, and everybody who holds the request knows
it. `InferenceRequest.trace` carries the W3C context of the request's *parent*. A request that nobody's trace led to
is a root, and is its own parent there: the standard has no way to write "none", and what has to travel is the
decision whether it is traced.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from typing import Any

from muai_producers.wire import InferenceRequest, TraceHeader

Trace = dict[TraceHeader, str]
"""`InferenceRequest.trace`."""
TRACEPARENT: TraceHeader = "traceparent"
TRACESTATE: TraceHeader = "tracestate"
_PATTERN = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01
_MAX_STATE = 512


@dataclass(frozen=True, slots=True)
class SpanId:
    """One span of one trace, and whether the trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool
    state: str = ""
    """The W3C `tracestate`, passed on as it came."""

    def traceparent(self) -> str:
        """As the W3C header has it."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"

    def as_trace(self) -> Trace:
        """As `InferenceRequest.trace` has it."""
        trace: Trace = {TRACEPARENT: self.traceparent()}
        if self.state:
            trace[TRACESTATE] = self.state
        return trace


def read_trace(traceparent: Any, tracestate: Any = "") -> SpanId | None:
    """The span that the two W3C headers name; None where they name none or are malformed, as the standard wants."""
    match = _PATTERN.fullmatch(traceparent) if isinstance(traceparent, str) and len(traceparent) <= 256 else None
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if not trace_id or not span_id:
        return None
    is_text = isinstance(tracestate, str) and len(tracestate) <= _MAX_STATE and tracestate.isascii()
    state = tracestate if is_text and tracestate.isprintable() else ""
    return SpanId(trace_id, span_id, bool(int(match[4], 16) & _SAMPLED), state)


def derived_span_id(*parts: str) -> int:
    """The id of a span that several processes must know without telling each other; never 0."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) or 1


def derived_trace_id(request_id: str) -> int:
    """The trace of a request that begins one; never 0."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=16, person=b"trace").digest()) or 1


def root_trace(request_id: str) -> Trace:
    """What `InferenceRequest.trace` of a request holds that begins its own trace."""
    return SpanId(derived_trace_id(request_id), derived_span_id(request_id), True).as_trace()


UNTRACED: Trace = SpanId(1, 1, False).as_trace()
"""What it holds of one that is not traced: the decision alone, at next to no cost."""


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """The span of one request, and what it is a child of."""

    own: SpanId
    parent_id: int | None
    """None: it is the root of its trace."""

    def child(self, span_id: int) -> SpanId:
        """A span of the same trace."""
        return SpanId(self.own.trace_id, span_id, self.own.sampled, self.own.state)


def is_sampled(request: InferenceRequest) -> bool:
    """Whether spans are to be made of a request: what it costs those that are not traced."""
    traceparent = request.trace.get(TRACEPARENT)
    return traceparent is not None and traceparent[-1] in "13579bdf"


def request_span(request: InferenceRequest) -> RequestSpan | None:
    """The request's span; None where it is not traced."""
    return span_of(request.id, request.trace) if request.trace and is_sampled(request) else None


def span_of(request_id: str, trace: Trace) -> RequestSpan | None:
    """The span of whatever has this id and was asked for in this trace; None where it is not traced."""
    parent = read_trace(trace.get(TRACEPARENT), trace.get(TRACESTATE, ""))
    if parent is None or not parent.sampled:
        return None
    span_id = derived_span_id(request_id)
    own = SpanId(parent.trace_id, span_id, True, parent.state)
    return RequestSpan(own, None if parent.span_id == span_id else parent.span_id)


def current_trace() -> Trace:
    """The trace context of the calling code, where the application uses OpenTelemetry; else empty.

    It is not imported for this: an application that has not imported it has no span to be continued.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return {}
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    state = context.trace_state.to_header() if context.trace_state else ""
    if len(state) > _MAX_STATE:
        state = ""
    return SpanId(context.trace_id, context.span_id, bool(context.trace_flags & _SAMPLED), state).as_trace()
