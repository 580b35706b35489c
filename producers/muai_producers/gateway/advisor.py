"""Advice alone, as an ASGI application: analysis, plans, and the runtime configuration that applies them."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from muai_producers.connections import state_client
from muai_producers.errors import MuaiError
from muai_producers.gateway import openapi, openapi_advice, openapi_config
from muai_producers.gateway.advice_routes import AdviceRoutes
from muai_producers.gateway.app import PUBLIC, installed_version
from muai_producers.gateway.callers import Doorkeeper
from muai_producers.gateway.config_routes import ConfigRoutes
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.edge import Edge
from muai_producers.gateway.failures import JSON_TYPE, ErrorBody, answer_http_error, answer_muai_error
from muai_producers.gateway.health import Health, Observer, health
from muai_producers.gateway.routes import DirectRoute
from muai_producers.gateway.submission import RequestBuilder
from muai_producers.keys import Keys
from muai_producers.rates import Rates
from muai_producers.runtime_config.following import ConfigFollower
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

THREADS = 4


class Advisor:
    """What it holds: its connections and threads. Connects when first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = state_client(settings.queue.state_url)
        store = Store(self._client, prefix=settings.queue.key_prefix)
        self._live = LiveSettings(settings, f"{socket.gethostname()}-{os.getpid()} (advisor)")
        self._follower = ConfigFollower(self._live)
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="muai-advisor")
        self._observer = Observer(settings, self._executor)
        self.drain = Drain(settings.monitoring.server.graceful_shutdown_timeout, lambda: None)
        gateway = settings.gateway
        self.doorkeeper = Doorkeeper(
            Keys(store, gateway.keys_file),
            Rates(store),
            self._executor,
            required=gateway.require_keys,
            cache_s=gateway.key_cache_s,
        )
        check_size = RequestBuilder(settings, None).check_size
        self._advice = AdviceRoutes(self._live, store, self._executor, check_size)
        self._config = ConfigRoutes(self._live, store, self._executor, check_size)
        self._started_s = time.monotonic()

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        app.router.route_class = DirectRoute
        self._advice.register(app)
        self._config.register(app)
        app.router.get(self._settings.monitoring.server.health_check_path, **openapi.HEALTH)(self.health)

    async def health(self, _: Request) -> Response:
        """How the installation does."""
        verdict = health(
            await self._observer.picture(),
            self._live.current,
            uptime_s=time.monotonic() - self._started_s,
            draining=self.drain.draining,
        )
        status = 503 if verdict.status == "unhealthy" else 200
        return Response(msgspec.json.encode(verdict), status, media_type=JSON_TYPE)

    def start(self) -> None:
        """Belong to the running event loop."""
        self._follower.start()
        self._follower.take_sighup()
        self.drain.take_signals()

    def close(self) -> None:
        """Close connections and threads."""
        self._follower.close()
        self.drain.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._observer.close()
        self._client.close()


def create_advisor(settings: Settings) -> FastAPI:
    """The application, for any ASGI server. It connects once it is served."""
    advisor = Advisor(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        advisor.start()
        try:
            yield
        finally:
            advisor.close()

    app = FastAPI(
        title="MuAI advisor",
        version=installed_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        exception_handlers={MuaiError: answer_muai_error, HTTPException: answer_http_error},
    )
    advisor.register(app)
    app.add_middleware(
        Edge,
        drain=advisor.drain,
        doorkeeper=advisor.doorkeeper,
        always_open=frozenset({settings.monitoring.server.health_check_path}),
        public=PUBLIC,
    )
    types = (Health, ErrorBody, *openapi_advice.TYPES, *openapi_config.TYPES)
    app.openapi = functools.partial(openapi.document, app, types, is_gateway=False)  # type: ignore[method-assign]
    return app
