"""What the rest of MuAI knows of tracing: a protocol, and the tracer of those who do not trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from muai_producers.tracing.context import SpanId, Trace

if TYPE_CHECKING:
    from muai_config import Settings

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Attributes = Mapping[str, Any]
"""Values are texts, numbers, booleans, or lists of one of them; None is left out."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A span whose beginning and end are known: most of MuAI's are told afterwards, when they cost nobody's time."""

    name: str
    id: SpanId
    parent_id: int | None
    start_s: float
    """Wall-clock seconds since the epoch, as `end_s`."""
    end_s: float
    attributes: Attributes
    kind: Kind = "internal"
    links: Sequence[SpanId] = ()
    error: BaseException | None = None
    inputs: Sequence[Mapping[str, Any]] = ()
    """What clients sent that the error may quote; it is taken out of the span."""


@dataclass(frozen=True)
class TracingState:
    """How tracing does, for health checks and metrics."""

    exported: int = 0
    """Spans, as `dropped`."""
    dropped: int = 0
    failures: int = 0
    """Exports that failed."""
    error: str | None = None
    """Why the last export failed; None: it did not."""


class Tracer(Protocol):
    """Makes spans. Nothing of it raises, and nothing of it waits for the network."""

    enabled: bool

    def head(self, request_id: str) -> Trace:
        """What `InferenceRequest.trace` of a request is to hold whose sender told no trace: the sampling decision."""
        ...

    def record(self, spans: Sequence[Finished]) -> None:
        """Hand over spans that have ended."""
        ...

    def trace_request(self, request_id: str) -> Any:
        """Context manager: the span of a request, from here on the current one of this thread or task."""
        ...

    def trace_workflow(self, workflow_name: str) -> Any:
        """Context manager: the span of a workflow's execution, or of one of its steps, below the current one."""
        ...

    def trace_inference(self, model_name: str, engine: str) -> Any:
        """Context manager: the span of an inference, below the current one."""
        ...

    def trace_part(self, name: str, attributes: Attributes, within: SpanId | None = None) -> Any:
        """Context manager: any other span, below the current one, or below one that is elsewhere."""
        ...

    def record_error(self, span: Any, error: BaseException) -> None:
        """Note an error in a span that one of the others gave: type, message and stack."""
        ...

    def reconfigure(self, settings: Settings) -> None:
        """Work by these settings from now on; what can be changed at run time is the sample rate."""
        ...

    def state(self) -> TracingState:
        """How it does."""
        ...

    def close(self, timeout_s: float | None = None) -> None:
        """Export what is left, in so many seconds at most."""
        ...


class NoTracer:
    """Traces nothing."""

    enabled = False

    def head(self, request_id: str) -> Trace:
        """See `Tracer`; nothing: who comes after decides."""
        return {}

    def record(self, spans: Sequence[Finished]) -> None:
        """See `Tracer`."""

    @contextmanager
    def trace_request(self, request_id: str) -> Iterator[None]:
        """See `Tracer`."""
        yield

    @contextmanager
    def trace_workflow(self, workflow_name: str) -> Iterator[None]:
        """See `Tracer`."""
        yield

    @contextmanager
    def trace_inference(self, model_name: str, engine: str) -> Iterator[None]:
        """See `Tracer`."""
        yield

    @contextmanager
    def trace_part(self, name: str, attributes: Attributes, within: SpanId | None = None) -> Iterator[None]:
        """See `Tracer`."""
        yield

    def record_error(self, span: Any, error: BaseException) -> None:
        """See `Tracer`."""

    def reconfigure(self, settings: Settings) -> None:
        """See `Tracer`."""

    def state(self) -> TracingState:
        """See `Tracer`."""
        return TracingState()

    def close(self, timeout_s: float | None = None) -> None:
        """See `Tracer`."""


NO_TRACER = NoTracer()
