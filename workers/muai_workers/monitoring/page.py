"""Serves a page of metrics, and nothing else, from a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from muai_producers.monitoring.guard import Standings, guarded

log = logging.getLogger(__name__)
TRY_AGAIN_S = 5.0
TIMEOUT_S = 10.0
"""How long a client may take over its request."""
Collect = Callable[[], Iterable[Metric]]


class _Families:
    """What prometheus_client's encoders ask for metrics."""

    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Restarted at once, it must get its port back; a port on which somebody listens is still refused.
    allow_reuse_address = True
    path: str
    collect: Collect
    standings: Standings

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no failure of ours."""
        log.debug("the metrics page was not read to its end by %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "muai"
    sys_version = ""
    timeout = TIMEOUT_S
    MESSAGES: ClassVar[dict[int, bytes]] = {404: b"not found\n", 500: b"the metrics could not be read\n"}

    def do_GET(self) -> None:
        """Answer with the page."""
        if urlsplit(self.path).path != self.server.path:
            self._answer(404, "text/plain; charset=utf-8", self.MESSAGES[404])
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = None
        with guarded("metrics", self.server.standings):
            body = encode(_Families(self.server.collect))
        if body is None:
            self._answer(500, "text/plain; charset=utf-8", self.MESSAGES[500])
        else:
            self._answer(200, content_type, body)

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """A scrape every few seconds is no news."""


class MetricsPage:
    """A page at a host, port and path. A port that is taken is tried again until it is free; nothing is raised.

    Args:
        port: 0 takes any that is free; `port` says which.
    """

    def __init__(self, host: str, port: int, path: str, collect: Collect, standings: Standings) -> None:
        self._host, self.port, self._path = host, port, path
        self._collect = collect
        self._standings = standings
        self._server: _Server | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_served(self) -> bool:
        """Whether the page can be asked for."""
        return self._server is not None

    def start(self) -> None:
        """Serve from now on, or as soon as the port is free. A second call does nothing."""
        if self._thread is not None:
            return
        self._bind()
        self._thread = threading.Thread(target=self._serve, name="muai-metrics-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._server is not None:
            self._server.server_close()

    def _bind(self) -> None:
        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in self._host else socket.AF_INET

        try:
            server = Server((self._host, self.port), _Handler)
        except OSError as error:
            self._standings.report(
                "metrics",
                f"the page cannot be served at {self._host}:{self.port} ({error.strerror or error}); "
                "monitoring.prometheus.port names another port",
            )
            return
        server.path, server.collect, server.standings = self._path, self._collect, self._standings
        self.port = server.server_address[1]
        self._server = server
        self._standings.clear("metrics")
        log.info("metrics at http://%s:%d%s", self._host, self.port, self._path)

    def _serve(self) -> None:
        while self._server is None:
            if self._closed.wait(TRY_AGAIN_S):
                return
            with guarded("metrics", self._standings):
                self._bind()
        self._server.serve_forever(poll_interval=0.2)
