"""The paths: each reads its request, asks, and answers. What is refused is raised."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from muai_producers.errors import BrokerError, InvalidRequestError, RequestCancelledError
from muai_producers.gateway import openapi
from muai_producers.gateway.admission import Accepted, Admission, Submission
from muai_producers.gateway.answers import Receipt, catalog
from muai_producers.gateway.coalescing import Coalescer
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.failures import (
    JSON_TYPE,
    AlreadyFinishedError,
    BodyTimeoutError,
    UnsupportedMediaTypeError,
)
from muai_producers.gateway.health import Observer, health, readiness
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.standing import Standing, read_standing, status_url
from muai_producers.gateway.submission import RequestBuilder, parse_number, read_body
from muai_producers.store import PENDING, REVOKED, Store, failure_answer

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.wire import InferenceRequest

MAX_WAIT_S = 60.0
BODY_TIMEOUT_S = 30.0
ADMITTED_TOGETHER = 256
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\b", re.IGNORECASE)
_encode = msgspec.json.Encoder().encode
Endpoint = Callable[[Request], Coroutine[Any, Any, ASGIApp]]


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and makes the answer, with nothing of FastAPI's in between.

    Bodies are decoded by msgspec in one pass, and the OpenAPI document is written from the same types; FastAPI's own
    dependencies and exit stacks would be a tenth of what a request costs.
    """

    def __init__(self, path: str, endpoint: Endpoint, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = answer


class Routes:
    """The endpoints of one gateway."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        hub: ResultHub,
        admission: Admission,
        observer: Observer,
        drain: Drain,
        executor: Executor,
    ) -> None:
        self._settings = settings
        self._store = store
        self._hub = hub
        self._observer = observer
        self._drain = drain
        self._executor = executor
        self.builder = RequestBuilder(settings, hub.reply_channel)
        self.admissions: Coalescer[Submission, Accepted] = Coalescer(
            admission.admit, executor, max_items=ADMITTED_TOGETHER
        )
        self._started_s = time.monotonic()
        self._models = _encode(catalog(settings))

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.route_class = DirectRoute
        server = self._settings.monitoring.server
        router.post("/v1/inference", **openapi.SUBMIT)(self.submit)
        router.get("/v1/inference/{id}", **openapi.GET)(self.get)
        router.delete("/v1/inference/{id}", **openapi.CANCEL)(self.cancel)
        router.get("/v1/models", **openapi.MODELS)(self.models)
        router.get(server.health_check_path, **openapi.HEALTH)(self.health)
        router.get(server.readiness_check_path, **openapi.READY)(self.ready)

    async def submit(self, request: Request) -> Response:
        """Submit a request; with `wait`, stay for the result."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
        wait_s, is_preference = _wait(request, headers)
        raw = await self.read(request, headers)
        inference = self.builder.build(read_body(raw), headers, self._hub.new_id())
        submit = self._submit_and_wait if wait_s > 0 else self._submit
        response = await submit(inference, len(raw), wait_s)
        if is_preference:
            response.headers["preference-applied"] = f"wait={wait_s:g}"
        return response

    async def _submit(self, inference: InferenceRequest, num_bytes: int, _: float) -> Response:
        accepted = await self.admissions.add(Submission(inference, awaited=False), num_bytes)
        is_new = accepted.request_id == inference.id
        state = PENDING if is_new else (await self._hub.look(accepted.request_id)).state
        return _receipt(accepted, inference.id, state)

    async def _submit_and_wait(self, inference: InferenceRequest, num_bytes: int, wait_s: float) -> Response:
        future = self._hub.expect(inference.id)
        try:
            accepted = await self.admissions.add(Submission(inference, awaited=True), num_bytes)
        except BaseException:
            self._hub.forget(inference.id, future)
            raise
        standing = await self._await_result(accepted.request_id, inference.id, future, wait_s)
        if standing.finished:
            return _answer(standing, 200, _also_known(accepted, inference.id))
        return _receipt(accepted, inference.id, standing.state)

    async def _await_result(
        self, request_id: str, sent_id: str, future: asyncio.Future[bytes | None], wait_s: float
    ) -> Standing:
        """The accepted request's standing; its id is told whatever happens, for the queue has it."""
        try:
            if request_id == sent_id:
                return await self._hub.settle(request_id, future, wait_s)
            self._hub.forget(sent_id, future)
            return await self._hub.wait(request_id, wait_s)
        except BrokerError:
            return read_standing(request_id, None)

    async def get(self, request: Request) -> Response:
        """Where a request stands; with `wait`, its result as soon as it is there."""
        standing = await self._hub.wait(request.path_params["id"], _query_wait(request) or 0.0)
        return _answer(standing, 200)

    async def cancel(self, request: Request) -> Response:
        """Cancel a request that is not finished."""
        request_id = request.path_params["id"]
        standing = await self._hub.look(request_id)
        if not standing.finished:
            loop = asyncio.get_running_loop()
            if await loop.run_in_executor(self._executor, self.revoke, request_id):
                return _answer(await self._hub.look(request_id), 200)
            standing = await self._hub.look(request_id)
        raise AlreadyFinishedError(
            f"request {request_id} has finished ({standing.state}) and cannot be cancelled",
            {"id": request_id, "state": standing.state},
        )

    def revoke(self, request_id: str) -> bool:
        """Cancel a request; False when it had finished already. Blocks."""
        error = RequestCancelledError(f"request {request_id} was cancelled", {"request_id": request_id})
        answer = failure_answer(request_id, error, self._hub.channel_of(request_id), state=REVOKED)
        return self._store.answer([answer])[0]

    async def models(self, request: Request) -> Response:
        """The catalog."""
        return Response(self._models, media_type=JSON_TYPE)

    async def health(self, request: Request) -> Response:
        """How the installation does."""
        verdict = health(
            await self._observer.picture(),
            self._settings,
            uptime_s=time.monotonic() - self._started_s,
            draining=self._drain.draining,
        )
        return Response(_encode(verdict), 503 if verdict.status == "unhealthy" else 200, media_type=JSON_TYPE)

    async def ready(self, request: Request) -> Response:
        """Whether this gateway should be sent requests."""
        verdict = readiness(await self._observer.picture(), self._settings, draining=self._drain.draining)
        return Response(_encode(verdict), 200 if verdict.ready else 503, media_type=JSON_TYPE)

    async def read_json(self, request: Request) -> bytes:
        """The body of a request that must be JSON, within the limit on its size."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
        return await self.read(request, headers)

    async def read(self, request: Request, headers: Mapping[str, str]) -> bytes:
        """The body, refused as soon as it is seen to be too large, whether or not its length was announced."""
        media_type = headers.get("content-type", JSON_TYPE).partition(";")[0].strip().lower()
        if media_type != JSON_TYPE:
            raise UnsupportedMediaTypeError(f"the body must be {JSON_TYPE}, got {media_type[:100]!r}")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaTypeError("compressed bodies are not taken; send it without Content-Encoding")
        announced = headers.get("content-length", "")
        if announced.isdecimal():
            self.builder.check_size(int(announced))
        chunks, num_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    self.builder.check_size(num_bytes)
                    chunks.append(chunk)
        except TimeoutError:
            raise BodyTimeoutError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        return b"".join(chunks)


def _wait(request: Request, headers: Mapping[str, str]) -> tuple[float, bool]:
    """Seconds that the client wants to wait, and whether that was a preference (RFC 7240), which is capped."""
    asked = _query_wait(request)
    if asked is not None:
        return asked, False
    preferred = _PREFER_WAIT.search(headers.get("prefer", ""))
    return (min(float(preferred[1]), MAX_WAIT_S), True) if preferred else (0.0, False)


def _query_wait(request: Request) -> float | None:
    if not request.scope["query_string"]:
        return None
    told = dict(parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)).get("wait")
    if told is None:
        return None
    wait_s = parse_number(told)
    if wait_s is None or wait_s > MAX_WAIT_S:
        raise InvalidRequestError(
            f"wait must be a number of seconds from 0 to {MAX_WAIT_S:g}, got {told[:40]!r}", {"field": "wait"}
        )
    return wait_s


def _answer(standing: Standing, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(standing), status, headers, JSON_TYPE)


def _receipt(accepted: Accepted, sent_id: str, state: str) -> Response:
    url = status_url(accepted.request_id)
    receipt = Receipt(id=accepted.request_id, status_url=url, state=state, queue_position=accepted.queue_position)
    return Response(_encode(receipt), 202, {"location": url, **_also_known(accepted, sent_id)}, JSON_TYPE)


def _also_known(accepted: Accepted, sent_id: str) -> dict[str, str]:
    return {} if accepted.request_id == sent_id else {"idempotent-replayed": "true"}
