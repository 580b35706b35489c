"""What every HTTP request passes first: its ids, the drain, its key, and the end of every exception."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Container, Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muai_producers.errors import InvalidRequestError, MuaiError
from muai_producers.gateway.callers import CALLER_KEY, Doorkeeper
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.failures import REQUEST_ID_KEY, DrainingError, error_response
from muai_producers.gateway.reading import TRACE_KEY
from muai_producers.logs import log_context
from muai_producers.monitoring import instruments
from muai_producers.monitoring.recorder import recorder
from muai_producers.wire import TraceHeader

log = logging.getLogger(__name__)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,200}")
_CUT_OFF = DrainingError(
    "this gateway stopped before it could answer; whether the request was accepted is not known: send it again, with "
    "the same Idempotency-Key if it had one"
)
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Edge:
    """ASGI middleware.

    Args:
        always_open: paths that are answered while the gateway drains, and are not waited for; they need no key.
        public: further paths that need no key.
    """

    def __init__(
        self, app: ASGIApp, drain: Drain, doorkeeper: Doorkeeper, always_open: Container[str], public: Container[str]
    ) -> None:
        self._app = app
        self._drain = drain
        self._doorkeeper = doorkeeper
        self._always_open = always_open
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        is_valid = given is not None and _REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and is_valid else secrets.token_hex(12).encode()
        scope[REQUEST_ID_KEY] = request_id.decode()
        scope[TRACE_KEY] = trace = _trace(scope["headers"])
        told = [(b"x-request-id", request_id)]
        if trace:
            told.append((b"traceparent", trace["traceparent"].encode()))
        has_begun = False
        arrived_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                _record(scope, message["status"], time.perf_counter() - arrived_s)
                # A connection that stays open is one whose next request meets a server that is gone.
                parting = [(b"connection", b"close")] if self._drain.draining else []
                message["headers"] = [*message["headers"], *told, *parting]
            await send(message)

        try:
            if given is not None and not is_valid:
                raise InvalidRequestError(
                    "the header X-Request-Id must have 1 to 200 visible ASCII characters", {"field": "X-Request-Id"}
                )
            traceparent = trace.get("traceparent", "")
            with log_context(http_request_id=scope[REQUEST_ID_KEY], trace_id=traceparent[3:35]):
                await self._pass_on(scope, receive, send_with_id)
        except ClientDisconnect:
            log.debug("request %s: the client went away", scope[REQUEST_ID_KEY])
        except asyncio.CancelledError:
            # The server's time to stop is over and it cancels what is left, which would be a bare 500.
            if has_begun or not self._drain.draining:
                raise
            log.warning("request %s was cut off by the end of this gateway", scope[REQUEST_ID_KEY])
            await error_response(_CUT_OFF, scope[REQUEST_ID_KEY])(scope, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise
            failure = error if isinstance(error, MuaiError) else _unforeseen(scope)
            await error_response(failure, scope[REQUEST_ID_KEY])(scope, receive, send_with_id)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in self._always_open:
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            raise DrainingError("this gateway is stopping; send the request again, another one takes it")
        self._drain.num_active += 1
        try:
            if scope["path"] not in self._public:
                scope[CALLER_KEY] = await self._doorkeeper.identify(scope["headers"])
            caller = scope.get(CALLER_KEY)
            with log_context(tenant=None if caller is None else caller.tenant):
                await self._app(scope, receive, send)
        finally:
            self._drain.num_active -= 1


def _record(scope: Scope, status: int, took_s: float) -> None:
    # The route as it is declared, not the path: ids in paths would make a series of each.
    route = getattr(scope.get("route"), "path", None) or instruments.OTHER
    method = scope["method"] if scope["method"] in METHODS else instruments.OTHER
    recorder.record(
        (instruments.HTTP_REQUESTS, (route, method, str(status)), 1), (instruments.HTTP_SECONDS, (route,), (took_s,))
    )


def _trace(headers: Iterable[tuple[bytes, bytes]]) -> dict[TraceHeader, str]:
    """The W3C trace context; empty where there is none or it is malformed, which the standard says to pass over."""
    found = {name: value for name, value in headers if name in (b"traceparent", b"tracestate")}
    parent, state = found.get(b"traceparent"), found.get(b"tracestate", b"")
    if parent is None or not _TRACEPARENT.fullmatch(parent):
        return {}
    trace: dict[TraceHeader, str] = {"traceparent": parent.decode()}
    if state and len(state) <= 512 and state.isascii() and state.decode().isprintable():
        trace["tracestate"] = state.decode()
    return trace


def _unforeseen(scope: Scope) -> MuaiError:
    caller = scope.get(CALLER_KEY)
    with log_context(http_request_id=scope[REQUEST_ID_KEY], tenant=None if caller is None else caller.tenant):
        log.exception("request %s failed", scope[REQUEST_ID_KEY])
    return MuaiError("an internal error; the gateway's log has more under the request id")
