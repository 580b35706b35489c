"""The gateway as an ASGI application. It keeps nothing: any number of them may serve side by side."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from muai_producers.batches.store import BatchStore
from muai_producers.client import InferenceClient
from muai_producers.connections import state_client
from muai_producers.errors import MuaiError
from muai_producers.files.folder import FileFolder
from muai_producers.files.shelf import FileShelf
from muai_producers.gateway import (
    openapi,
    openapi_advice,
    openapi_batches,
    openapi_config,
    openapi_files,
    openapi_watch,
)
from muai_producers.gateway.admission import Admission
from muai_producers.gateway.advice_routes import AdviceRoutes
from muai_producers.gateway.batch_routes import BatchRoutes
from muai_producers.gateway.callers import Doorkeeper
from muai_producers.gateway.config_routes import ConfigRoutes
from muai_producers.gateway.console.console import Console
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.edge import Edge
from muai_producers.gateway.failures import answer_http_error, answer_muai_error
from muai_producers.gateway.file_routes import FileRoutes
from muai_producers.gateway.health import Observer
from muai_producers.gateway.openai_api.failures import OpenAIErrors
from muai_producers.gateway.openai_api.routes import OpenAIRoutes
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.routes import Routes
from muai_producers.gateway.sessions import Sessions
from muai_producers.gateway.stream_routes import StreamRoutes
from muai_producers.gateway.streams import StreamHub
from muai_producers.gateway.watch_routes import WatchRoutes
from muai_producers.gateway.workflow_routes import WorkflowRoutes
from muai_producers.keys import Keys
from muai_producers.monitoring.pushing import MetricsPusher, start_pushing
from muai_producers.rates import Rates
from muai_producers.runtime_config.following import ConfigFollower
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.store import Limits
from muai_producers.tracing import create_tracer

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.wire import InferenceRequest

PUBLIC = frozenset({"/openapi.json"})
"""Needs no key, beside health and readiness: it says what there is, and holds nobody's data."""
THREADS = 8
"""Admission holds at most one of them, look-ups another; the rest is for what single requests ask."""


class Gateway:
    """What one gateway holds: its connections, threads, and the requests under way. Connects when first needed."""

    def __init__(self, settings: Settings) -> None:
        server = settings.monitoring.server
        self._settings = settings
        self._pusher: MetricsPusher | None = None
        self.live = LiveSettings(settings, f"{socket.gethostname()}-{os.getpid()} (gateway)")
        self._follower = ConfigFollower(self.live)
        self._client = InferenceClient(settings, live=self.live)
        self._listener_client = state_client(settings.queue.state_url)
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="muai-gateway")
        self.hub = ResultHub(self._client.store, self._listener_client, self._executor)
        self._stream_client = state_client(settings.queue.state_url)
        self.streams = StreamHub(self._client.store, self._stream_client)
        self.drain = Drain(server.graceful_shutdown_timeout, self._hurry)
        self._observer = Observer(settings, self._executor)
        store = self._client.store
        self.tracer = create_tracer(settings, "gateway")
        self.live.subscribe(self.tracer.reconfigure, settings)
        admission = Admission(self._submit, store, self.hub, lambda: self._client.limits, self.tracer)
        gateway = settings.gateway
        self.doorkeeper = Doorkeeper(
            Keys(store, gateway.keys_file),
            Rates(store),
            self._executor,
            required=gateway.require_keys,
            cache_s=gateway.key_cache_s,
            sessions=Sessions(store, gateway.console.session_s) if gateway.console.enabled else None,
        )
        self.routes = Routes(
            settings,
            store,
            self.hub,
            admission,
            self._observer,
            self.drain,
            self.doorkeeper,
            self._executor,
            self.tracer,
        )
        shelf = FileShelf(store, FileFolder.from_settings(settings), gateway.files)
        batches = BatchStore(store, gateway.files.keep_s)
        self.file_routes = FileRoutes(shelf, batches, gateway.files.max_file_bytes, self._executor)
        self.batch_routes = BatchRoutes(shelf, batches, gateway.batches, self.routes.builder, self._executor)
        self.workflows = WorkflowRoutes(settings, self._client, self.hub, self.doorkeeper, self._executor, self.tracer)
        self.stream_routes = StreamRoutes(self.hub, self.streams)
        self.openai_routes = OpenAIRoutes(
            settings, self.routes, self.hub, self.streams, self.drain, self.doorkeeper, self._executor
        )
        self.watch_routes = WatchRoutes(settings, store, self._executor)
        self.config_routes = ConfigRoutes(self.live, store, self._executor, self.routes.builder.check_size)
        self.advice_routes = AdviceRoutes(self.live, store, self._executor, self.routes.builder.check_size)
        self.console = Console(
            settings, installed_version(), self._client, self._observer, self.doorkeeper, self.drain, self._executor
        )
        self.always_open = frozenset({server.health_check_path, server.readiness_check_path})

    def _submit(self, requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        return self._client.submitter().submit(requests, limits)

    def _hurry(self) -> None:
        self.hub.hurry()
        self.streams.hurry()

    def start(self) -> None:
        """Belong to the running event loop."""
        self.live.subscribe(self.routes.on_settings, self.live.started_with)
        self.live.subscribe(self.console.on_settings, self.live.started_with)
        self._follower.start()
        self._follower.take_sighup()
        self.hub.start()
        self.streams.start()
        self.drain.take_signals()
        self._pusher = start_pushing(self._settings, "gateway", "gateway")

    def close(self) -> None:
        """Close connections and threads."""
        self._follower.close()
        self.drain.close()
        if self._pusher is not None:
            self._pusher.close()
        self.hub.close()
        self.streams.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.console.close()
        self._observer.close()
        self._listener_client.close()
        self._stream_client.close()
        self._client.close()
        self.tracer.close()


def create_gateway(settings: Settings) -> FastAPI:
    """The application, for any ASGI server. It connects once it is served."""
    gateway = Gateway(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.start()
        try:
            yield
        finally:
            gateway.close()

    app = FastAPI(
        title="MuAI",
        version=installed_version(),
        docs_url=None,  # the pages that these would be come from other people's servers
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own looks for providers several times per request, a twentieth of what one costs.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        exception_handlers={MuaiError: answer_muai_error, HTTPException: answer_http_error},
    )
    gateway.routes.register(app)
    gateway.workflows.register(app, gateway.routes.builder.check_size)
    gateway.stream_routes.register(app)
    gateway.openai_routes.register(app)
    gateway.file_routes.register(app)
    gateway.batch_routes.register(app)
    gateway.watch_routes.register(app)
    gateway.config_routes.register(app)
    gateway.advice_routes.register(app)
    gateway.console.register(app)
    app.add_middleware(
        Edge,
        drain=gateway.drain,
        doorkeeper=gateway.doorkeeper,
        always_open=gateway.always_open,
        public=PUBLIC | gateway.console.public,
    )
    app.add_middleware(OpenAIErrors)  # the outermost: what the others refuse is told in the same shape
    types = (
        *openapi_files.TYPES,
        *openapi_batches.TYPES,
        *openapi_watch.TYPES,
        *openapi_config.TYPES,
        *openapi_advice.TYPES,
        *gateway.console.types,
    )
    app.openapi = functools.partial(openapi.document, app, types)  # type: ignore[method-assign]
    return app


def installed_version() -> str:
    """This program's version, as documents tell it."""
    try:
        return importlib.metadata.version("muai")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"
