"""The paths: each reads its request, asks, and answers. What is refused is raised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from muai_producers.errors import BrokerError, InvalidRequestError, MuaiError, RequestCancelledError
from muai_producers.gateway import openapi
from muai_producers.gateway.admission import Accepted, Admission, Submission
from muai_producers.gateway.answers import catalog, many_receipts, receipt_of
from muai_producers.gateway.callers import Caller, Doorkeeper, caller_of
from muai_producers.gateway.coalescing import Coalescer
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.failures import JSON_TYPE, AlreadyFinishedError, shown
from muai_producers.gateway.health import Observer, health, readiness
from muai_producers.gateway.reading import headers_of, query_wait, read_json, trace_of, wait_of
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.standing import Standing, read_standing
from muai_producers.gateway.submission import (
    DEADLINE,
    IDEMPOTENCY_KEY,
    PRIORITY,
    InferenceBody,
    RequestBuilder,
    read_body,
    read_many,
)
from muai_producers.store import PENDING, REVOKED, Store, failure_answer

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.wire import InferenceRequest

ADMITTED_TOGETHER = 256
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

    def on_settings(self, settings: Settings) -> None:
        """Work by these settings from now on, as far as they are reloadable."""
        self._settings = settings
        self.builder.on_settings(settings)

    def __init__(
        self,
        settings: Settings,
        store: Store,
        hub: ResultHub,
        admission: Admission,
        observer: Observer,
        drain: Drain,
        doorkeeper: Doorkeeper,
        executor: Executor,
    ) -> None:
        self._settings = settings
        self._store = store
        self._hub = hub
        self._observer = observer
        self._drain = drain
        self._doorkeeper = doorkeeper
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
        router.post("/v1/inference/batch", **openapi.SUBMIT_MANY)(self.submit_many)
        router.get("/v1/inference/{id}", **openapi.GET)(self.get)
        router.delete("/v1/inference/{id}", **openapi.CANCEL)(self.cancel)
        router.get("/v1/models", **openapi.MODELS)(self.models)
        router.get(server.health_check_path, **openapi.HEALTH)(self.health)
        router.get(server.readiness_check_path, **openapi.READY)(self.ready)

    async def submit(self, request: Request) -> Response:
        """Submit a request; with `wait`, stay for the result."""
        headers = headers_of(request)
        caller = caller_of(request)
        wait_s, is_preference = wait_of(request, headers)
        raw = await read_json(request, headers, self.builder.check_size)
        inference = self._build(request, caller, read_body(raw), headers)
        await self._doorkeeper.charge(caller)
        submit = self._submit_and_wait if wait_s > 0 else self._submit
        response = await submit(inference, caller, len(raw), wait_s)
        if is_preference:
            response.headers["preference-applied"] = f"wait={wait_s:g}"
        return response

    async def submit_many(self, request: Request) -> Response:
        """Submit many requests, each accepted or refused by itself."""
        headers = headers_of(request)
        caller = caller_of(request)
        once_each = {name for name in (IDEMPOTENCY_KEY, PRIORITY, DEADLINE) if name in headers}
        if once_each:
            name = min(once_each)
            raise InvalidRequestError(
                f"the header {name} is for one request; say it in each of the requests", {"field": name}
            )
        raw = await read_json(request, headers, self.builder.check_size)
        bodies = read_many(raw, self._settings.gateway.max_requests_per_call)
        built = [self._build_or_error(request, caller, body) for body in bodies]
        await self._doorkeeper.charge(caller, sum(not isinstance(one, MuaiError) for one in built))
        outcomes = await asyncio.gather(*(self._admit_one(one, caller) for one in built))
        return Response(_encode(many_receipts(outcomes)), 202, media_type=JSON_TYPE)

    def _build(
        self, request: Request, caller: Caller, body: InferenceBody, headers: Mapping[str, str]
    ) -> InferenceRequest:
        request_id = self._hub.new_id()
        return self.builder.build(body, headers, request_id, tenant=caller.tenant, trace=trace_of(request))

    def _build_or_error(self, request: Request, caller: Caller, raw: msgspec.Raw) -> InferenceRequest | MuaiError:
        try:
            return self._build(request, caller, read_body(bytes(raw)), {})
        except MuaiError as error:
            return error

    async def _admit_one(self, built: InferenceRequest | MuaiError, caller: Caller) -> Accepted | MuaiError:
        if isinstance(built, MuaiError):
            return built
        try:
            return await self.admissions.add(Submission(built, awaited=False, limits=caller.limits))
        except MuaiError as error:
            return shown(error)  # others of the call may be accepted: each says by itself what became of it

    async def _submit(self, inference: InferenceRequest, caller: Caller, num_bytes: int, _: float) -> Response:
        accepted = await self.admissions.add(Submission(inference, awaited=False, limits=caller.limits), num_bytes)
        is_new = accepted.request_id == inference.id
        state = PENDING if is_new else (await self._hub.look(accepted.request_id)).state
        return _receipted(accepted, inference.id, state)

    async def _submit_and_wait(
        self, inference: InferenceRequest, caller: Caller, num_bytes: int, wait_s: float
    ) -> Response:
        future = self._hub.expect(inference.id)
        try:
            accepted = await self.admissions.add(Submission(inference, awaited=True, limits=caller.limits), num_bytes)
        except BaseException:
            self._hub.forget(inference.id, future)
            raise
        standing = await self._await_result(accepted.request_id, inference.id, future, wait_s)
        if standing.finished:
            return _answer(standing, 200, _also_known(accepted, inference.id))
        return _receipted(accepted, inference.id, standing.state)

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
        wait_s = query_wait(request) or 0.0
        standing = await self._hub.wait(request.path_params["id"], wait_s, caller_of(request))
        return _answer(standing, 200)

    async def cancel(self, request: Request) -> Response:
        """Cancel a request that is not finished."""
        request_id = request.path_params["id"]
        caller = caller_of(request)
        standing = await self._hub.look(request_id, caller)
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
        tenant = self._store.tenant_of(request_id)
        answer = failure_answer(request_id, error, self._hub.channel_of(request_id), state=REVOKED, tenant=tenant)
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


def _answer(standing: Standing, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(standing), status, headers, JSON_TYPE)


def _receipted(accepted: Accepted, sent_id: str, state: str) -> Response:
    receipt = receipt_of(accepted, state)
    headers = {"location": receipt.status_url, **_also_known(accepted, sent_id)}
    return Response(_encode(receipt), 202, headers, JSON_TYPE)


def _also_known(accepted: Accepted, sent_id: str) -> dict[str, str]:
    return {} if accepted.request_id == sent_id else {"idempotent-replayed": "true"}
