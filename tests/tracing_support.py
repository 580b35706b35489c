"""A real OTLP receiver, over gRPC and over HTTP, and what it has received as trees."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from tests.transport_support import wait_until


@dataclass(frozen=True)
class Received:
    """One span, as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    """Trace id and span id of each."""
    is_error: bool
    is_ok: bool
    message: str
    events: tuple[str, ...]
    resource: dict[str, Any]


@dataclass
class Inbox:
    """What has come so far."""

    spans: list[Received] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: Any) -> None:
        with self.lock:
            for group in request.resource_spans:
                resource = _plain(group.resource.attributes)
                self.spans += [_received(span, resource) for scope in group.scope_spans for span in scope.spans]

    def now(self) -> list[Received]:
        with self.lock:
            return list(self.spans)

    def of_request(self, request_id: str) -> list[Received]:
        return [span for span in self.now() if span.attributes.get("request_id") == request_id]

    def wait_for(self, request_id: str, *names: str, timeout_s: float = 20.0) -> list[Received]:
        """The request's spans, once there is one for each of these names; a name given twice wants two."""

        def complete() -> list[Received]:
            spans = self.of_request(request_id)
            return spans if Counter(names) <= Counter(span.name for span in spans) else []

        try:
            found: list[Received] = wait_until(complete, timeout_s, f"spans {names}")
        except AssertionError:
            raise AssertionError(
                f"wanted {names}, have {[span.name for span in self.of_request(request_id)]}"
            ) from None
        return found


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)


def _received(span: Any, resource: dict[str, Any]) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _plain(span.attributes),
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        span.status.code == 2,
        span.status.code == 1,
        span.status.message,
        tuple(event.name for event in span.events),
        resource,
    )


class _Servicer(TraceServiceServicer):  # type: ignore[misc]
    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def Export(self, request: Any, context: Any) -> Any:
        self._inbox.take(request)
        return ExportTraceServiceResponse()


@contextmanager
def grpc_receiver(port: int = 0) -> Iterator[tuple[str, Inbox]]:
    """An OTLP receiver over gRPC: its address, and what it gets."""
    inbox = Inbox()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(_Servicer(inbox), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", inbox
    finally:
        server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[tuple[str, Inbox]]:
    """The same over HTTP, at /v1/traces and nowhere else."""
    inbox = Inbox()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_right = self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            if is_right:
                request = ExportTraceServiceRequest()
                request.ParseFromString(body)
                inbox.take(request)
            self.send_response(200 if is_right else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", inbox
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Tree = tuple[str, tuple[Any, ...]]
"""A span's name, and the trees of its children in the order of their beginnings."""


def tree_of(spans: Sequence[Received], outer: str = "") -> Tree:
    """The one tree that the spans form.

    Args:
        outer: id of the caller's span that the root is a child of; '' where there is none.
    """
    assert len({span.trace_id for span in spans}) == 1, "spans of several traces"
    ids = [span.span_id for span in spans]
    assert len(set(ids)) == len(ids), sorted(span.name for span in spans if ids.count(span.span_id) > 1)
    roots = [span for span in spans if span.parent_id == outer]
    assert len(roots) == 1, [(span.name, span.parent_id) for span in spans if span.parent_id not in ids]
    tree = _tree(roots[0], spans)
    assert _size(tree) == len(spans), f"not all spans hang on the root: {tree}"
    return tree


def _tree(span: Received, spans: Sequence[Received]) -> Tree:
    children = sorted(
        (one for one in spans if one.parent_id == span.span_id), key=lambda one: (one.start_ns, one.end_ns)
    )
    return span.name, tuple(_tree(one, spans) for one in children)


def _size(tree: Tree) -> int:
    return 1 + sum(_size(child) for child in tree[1])


def names_of(tree: Tree) -> dict[str, list[str]]:
    """The names of the children, by the names of those that have some."""
    name, children = tree
    found = {name: sorted(child[0] for child in children)} if children else {}
    for child in children:
        for parent, below in names_of(child).items():
            found[parent] = sorted([*found.get(parent, []), *below])
    return found
