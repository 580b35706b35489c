"""The parts of tracing by themselves: headers, addresses, the pause after a failure, and the end of a process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from muai_config import build_settings
from muai_producers.tracing import NO_TRACER, Finished, create_tracer
from muai_producers.tracing.context import SpanId, read_trace, root_trace, span_of
from muai_producers.tracing.export import MAX_WAITING, http_endpoint, protocol_of
from muai_producers.tracing.failing import Breaker
from muai_producers.tracing.tracer import OTelTracer

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        "",
        GOOD.upper(),
        GOOD + "-more",
        "ff" + GOOD[2:],
        GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        GOOD.replace("00f067aa0ba902b7", "0" * 16),
        GOOD[:-1],
        "x" * 10_000,
    ],
)
def test_Given_a_malformed_traceparent_Then_it_is_as_if_there_were_none(bad: object) -> None:
    assert read_trace(bad) is None


def test_Given_a_traceparent_of_a_later_version_Then_what_is_known_of_it_is_read() -> None:
    read = read_trace("cc" + GOOD[2:] + "-more", "vendor=1")
    assert read == SpanId(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, True, "vendor=1")


def test_Given_a_tracestate_that_is_none_Then_the_traceparent_holds_alone() -> None:
    for state in ("a\nb", "ä=1", "x" * 600, 7):
        assert read_trace(GOOD, state) == read_trace(GOOD)


def test_Given_a_request_that_begins_its_trace_Then_it_has_no_parent() -> None:
    span = span_of("r1", root_trace("r1"))
    assert span is not None
    assert span.parent_id is None
    other = span_of("r2", root_trace("r1"))
    assert other is not None
    assert other.parent_id == span.own.span_id, "another request in that trace is its child"


@pytest.mark.parametrize(
    ("endpoint", "wanted", "expected"),
    [
        ("http://localhost:4317", "auto", "grpc"),
        ("http://localhost:4318", "auto", "http"),
        ("https://otlp.example.com/otlp/v1/traces", "auto", "http"),
        ("http://localhost:4317", "http", "http"),
        ("http://localhost:4318", "grpc", "grpc"),
    ],
)
def test_Given_an_endpoint_Then_the_protocol_follows_where_none_is_set(
    endpoint: str, wanted: str, expected: str
) -> None:
    assert protocol_of(endpoint, wanted) == expected


def test_Given_an_HTTP_endpoint_without_a_path_Then_it_is_given_the_usual_one() -> None:
    assert http_endpoint("http://c:4318") == http_endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert http_endpoint("http://c:4318/own") == "http://c:4318/own"


def test_Given_failures_Then_tracing_pauses_and_says_so_once() -> None:
    breaker = Breaker(pause_s=10.0)
    assert not breaker.is_open(0.0)
    assert breaker.failed("down", 0.0)
    assert not breaker.failed("down", 11.0)
    assert breaker.is_open(20.0)
    assert not breaker.is_open(21.0)
    assert breaker.failures == 2
    assert breaker.succeeded()
    assert not breaker.succeeded()


class _Hanging(SpanExporter):
    """A collector that takes the connection and says nothing."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.released.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.released.set()


def _span(number: int) -> Finished:
    return Finished("s", SpanId(1, number + 1, True), None, 1.0, 2.0, {})


def _tracer(exporter: SpanExporter, timeout_ms: int = 30_000) -> OTelTracer:
    config = build_settings({"monitoring": {"tracing": {"export_timeout_ms": timeout_ms}}}, {})
    return OTelTracer(config.monitoring.tracing, make_exporter_=lambda: exporter)


def test_Given_a_collector_that_hangs_Then_what_waits_is_bounded_and_nobody_is_held_up() -> None:
    exporter = _Hanging()
    tracer = _tracer(exporter)
    tracer.record([_span(0)])
    assert exporter.entered.wait(10)
    started_s = time.monotonic()
    for start in range(0, 3 * MAX_WAITING, 512):
        tracer.record([_span(number) for number in range(start, start + 512)])
    assert tracer.state().dropped == 2 * MAX_WAITING
    assert time.monotonic() - started_s < 10.0
    exporter.released.set()
    tracer.close(10.0)


def test_Given_a_collector_that_hangs_Then_a_process_ends_within_the_export_timeout() -> None:
    tracer = _tracer(_Hanging(), timeout_ms=300)
    tracer.record([_span(0)])
    started_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - started_s < 5.0


def test_Given_a_process_that_ends_Then_what_waits_is_exported() -> None:
    memory = InMemorySpanExporter()
    tracer = _tracer(memory)
    tracer.record([_span(number) for number in range(1000)])
    tracer.close()
    assert len(memory.get_finished_spans()) == 1000
    tracer.record([_span(0)])
    assert tracer.state().dropped == 1


def test_Given_tracing_switched_off_Then_there_is_no_tracer() -> None:
    assert create_tracer(build_settings({"monitoring": {"tracing": {"enabled": False}}}, {}), "x") is NO_TRACER
    assert create_tracer(build_settings({"monitoring": {"enabled": False}}, {}), "x") is NO_TRACER


def test_Given_no_OpenTelemetry_Then_one_line_says_so_and_nothing_is_traced() -> None:
    code = """
import logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout)
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Gone())
from muai_config import build_settings
from muai_producers.tracing import create_tracer
tracer = create_tracer(build_settings({}, {}), "worker")
with tracer.trace_request("r"), tracer.trace_workflow("w"), tracer.trace_inference("m", "e") as span:
    tracer.record_error(span, ValueError())
assert not tracer.enabled and tracer.head("r") == {}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert "pip install 'muai[monitoring]'" in line
    assert done.stderr == ""


def test_Given_the_client_alone_Then_OpenTelemetry_is_not_imported() -> None:
    code = "import sys, muai_producers; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
