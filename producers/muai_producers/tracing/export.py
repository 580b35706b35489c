"""Sending spans to an OTLP collector: from a thread of its own, out of a bounded queue, and never at a cost.

OpenTelemetry's `BatchSpanProcessor` would do but for three things: it does not say what it dropped, it goes on at full
cost while its collector is down, and its end waits for retries to run out (docs/adr/0020-tracing-afterwards.md).
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, attach, detach, set_value
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from muai_producers.monitoring.events import spans_settled
from muai_producers.monitoring.guard import guarded, standings
from muai_producers.tracing.base import TracingState
from muai_producers.tracing.failing import Breaker

if TYPE_CHECKING:
    from muai_config.monitoring import TracingSettings

MAX_WAITING = 8192
MAX_PER_EXPORT = 512
EVERY_S = 1.0
PATIENCE_S = 1.0
"""An export under way for so long counts as failing when the process is to end."""
HTTP_PORT = 4318
HTTP_PATH = "/v1/traces"
Protocol = Literal["grpc", "http"]


def protocol_of(endpoint: str, wanted: str) -> Protocol:
    """How to speak with the collector: as wanted, and where that is `auto`, as the address lets one guess.

    OTLP over HTTP has port 4318 by convention, and a path; over gRPC it has 4317 and none.
    """
    if wanted in ("grpc", "http"):
        return "http" if wanted == "http" else "grpc"
    parts = urlsplit(endpoint)
    return "http" if parts.port == HTTP_PORT or parts.path.strip("/") else "grpc"


def http_endpoint(endpoint: str) -> str:
    """The address that traces are posted to: an address without a path is a collector's, and is given the usual one."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + HTTP_PATH


def make_exporter(config: TracingSettings) -> SpanExporter:
    """The exporter that the settings ask for. Its variables, such as OTEL_EXPORTER_OTLP_HEADERS, hold as usual."""
    timeout_s = config.export_timeout_ms / 1000
    if protocol_of(config.endpoint, config.protocol) == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=http_endpoint(config.endpoint), timeout=timeout_s)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(endpoint=config.endpoint, timeout=timeout_s)


def hush_exporters() -> None:
    """The exporters write a line for each try that fails; `SpanQueue` writes one for the first and one for the last."""
    for name in ("opentelemetry.exporter.otlp", "opentelemetry.sdk.trace.export", "opentelemetry.exporter.http"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class SpanQueue(SpanProcessor):
    """Keeps spans until they are exported.

    Args:
        make: makes the exporter, in the exporting thread: whoever starts a process does not wait for it.
        timeout_s: longest that one export may take.
        monotonic_s: for the pause after a failure.
    """

    def __init__(
        self,
        make: Callable[[], SpanExporter],
        timeout_s: float,
        *,
        every_s: float = EVERY_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._exporter: SpanExporter | None = None
        self._timeout_s = timeout_s
        self._every_s = every_s
        self._monotonic_s = monotonic_s
        self._waiting: collections.deque[ReadableSpan] = collections.deque()
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._exported = self._dropped = 0
        self._told = (0, 0)
        self._begun_s: float | None = None
        self._thread: threading.Thread | None = None

    # -- what makes spans calls ------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether the collector does not answer, and spans are not kept."""
        return self._breaker.is_open(self._monotonic_s())

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """See `SpanProcessor`."""

    def on_end(self, span: ReadableSpan) -> None:
        """See `SpanProcessor`."""
        context = span.context
        if context is not None and context.trace_flags.sampled:
            self.add((span,))

    def add(self, spans: Iterable[ReadableSpan]) -> None:
        """Keep spans for the next export; those that do not fit, and those of a pause, are dropped and counted."""
        spans = list(spans)
        with self._lock:
            room = 0 if self._ending.is_set() or self.is_paused else MAX_WAITING - len(self._waiting)
            self._waiting.extend(spans[:room])
            self._dropped += max(0, len(spans) - room)
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._export_all, name="muai-spans", daemon=True)
                self._thread.start()
        if len(self._waiting) >= MAX_PER_EXPORT:
            self._wake.set()

    def state(self) -> TracingState:
        """How it does."""
        return TracingState(self._exported, self._dropped, self._breaker.failures, self._breaker.error)

    # -- the exporting thread --------------------------------------------------------------------------------------

    def _export_all(self) -> None:
        while not self._ending.is_set():
            self._wake.wait(self._every_s)
            self._wake.clear()
            self._export_waiting(self._ending.is_set)
        self._export_waiting(lambda: False)

    def _export_waiting(self, stop: Callable[[], bool]) -> None:
        while self._waiting and not stop():
            with self._lock:
                spans = [self._waiting.popleft() for _ in range(min(MAX_PER_EXPORT, len(self._waiting)))]
            self._begun_s = self._monotonic_s()
            error = self._export(spans)
            self._begun_s = None
            self._settle(len(spans), error)

    def _export(self, spans: list[ReadableSpan]) -> str | None:
        """What went wrong; None: nothing did."""
        is_done = False
        with guarded("traces"):
            token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
            try:
                if self._exporter is None:
                    self._exporter = self._make()
                is_done = self._exporter.export(spans) is SpanExportResult.SUCCESS
            finally:
                detach(token)
        return None if is_done else "the OTLP collector does not take them (monitoring.tracing.endpoint)"

    def _tell(self) -> None:
        """Hand on to the metrics what has become of spans since the last time."""
        exported, dropped = self._exported, self._dropped
        spans_settled(exported - self._told[0], dropped - self._told[1])
        self._told = (exported, dropped)

    def _settle(self, num_spans: int, error: str | None) -> None:
        self._count(num_spans, error)
        self._tell()

    def _count(self, num_spans: int, error: str | None) -> None:
        if error is None:
            self._exported += num_spans
            if self._breaker.succeeded():
                standings.clear("traces")
            return
        is_news = self._breaker.failed(error, self._monotonic_s())
        with self._lock:
            self._dropped += num_spans + len(self._waiting)
            self._waiting.clear()
        if is_news:
            standings.report("traces", error)

    # -- the end ---------------------------------------------------------------------------------------------------

    def shutdown(self, timeout_s: float | None = None) -> None:
        """Export what waits, in `timeout_s` or the longest that an export may take; at once where the last failed."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._wake.set()
        begun_s = self._begun_s
        is_hanging = begun_s is not None and self._monotonic_s() - begun_s > PATIENCE_S
        if is_hanging or self._breaker.error is not None:
            self._waiting.clear()
            self._shut_exporter()
        if self._thread is not None:
            self._thread.join(self._timeout_s if timeout_s is None else timeout_s)
        self._shut_exporter()

    def _shut_exporter(self) -> None:
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            with guarded("traces"):
                exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """See `SpanProcessor`."""
        deadline_s = self._monotonic_s() + timeout_millis / 1000
        self._wake.set()
        while self._waiting or self._begun_s is not None:
            if self._monotonic_s() >= deadline_s:
                return False
            time.sleep(0.005)
        return True


def attribute_values(attributes: Any) -> dict[str, Any]:
    """Attributes without those that are None."""
    return {name: value for name, value in attributes.items() if value is not None}
