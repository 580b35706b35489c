"""What goes wrong in HTTP, as errors of MuAI's tree, and the one shape in which every error is answered."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from muai_producers.errors import BrokerError, CapacityError, MuaiError, RequestError

log = logging.getLogger(__name__)
JSON_TYPE = "application/json"
REQUEST_ID_KEY = "muai.request_id"
"""Where the ASGI scope keeps the id that the answer carries as X-Request-Id."""
RETRY_AFTER_S = 1.0


class PathNotFoundError(RequestError):
    """Nothing is served at this path."""

    code = "not_found"
    http_status = 404


class UnauthorizedError(RequestError):
    """No API key, or none that is known."""

    code = "unauthorized"
    http_status = 401


class ForbiddenError(RequestError):
    """The caller is known, and may not do this."""

    code = "forbidden"
    http_status = 403


class MethodNotAllowedError(RequestError):
    """The path does not know this method."""

    code = "method_not_allowed"
    http_status = 405


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    code = "body_timeout"
    http_status = 408


class AlreadyFinishedError(RequestError):
    """What is finished cannot be cancelled."""

    code = "already_finished"
    http_status = 409


class UnsupportedMediaTypeError(RequestError):
    """The body is not JSON, or is compressed."""

    code = "unsupported_media_type"
    http_status = 415


class DrainingError(MuaiError):
    """This gateway is stopping and takes nothing new."""

    code = "shutting_down"
    retryable = True
    http_status = 503


BY_STATUS: dict[int, type[RequestError]] = {404: PathNotFoundError, 405: MethodNotAllowedError}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    code: str
    """Stable; what a program should look at."""
    message: str
    """A sentence for people."""
    details: dict[str, Any] = {}
    """The same facts for programs; `field` names the wrong field where one is wrong."""
    request_id: str
    """The X-Request-Id of this HTTP request."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is an error."""

    error: ErrorDetail


def error_response(error: MuaiError, request_id: str) -> Response:
    """The answer to a request that failed with `error`; 429 and 503 say when to try again."""
    error = shown(error)
    detail = ErrorDetail(code=error.code, message=error.message, details=error.details, request_id=request_id)
    response = Response(
        msgspec.json.encode(ErrorBody(error=detail)), status_code=error.http_status, media_type=JSON_TYPE
    )
    if error.http_status == 401:
        response.headers["www-authenticate"] = 'Bearer realm="muai"'
    if error.http_status in (429, 503):
        seconds = error.retry_after_s if isinstance(error, CapacityError) else RETRY_AFTER_S
        response.headers["retry-after"] = str(max(1, math.ceil(seconds)))
    return response


def shown(error: MuaiError) -> MuaiError:
    """The error as callers may see it."""
    if not isinstance(error, BrokerError):
        return error
    # What the connection said names hosts and ports: for the operator, not for whoever calls.
    log.warning("%s", error)
    return BrokerError("the broker or the state store does not answer; try again shortly")


async def answer_muai_error(request: Request, error: Exception) -> Response:
    """Exception handler for MuAI's own errors."""
    assert isinstance(error, MuaiError)
    return error_response(error, request.scope[REQUEST_ID_KEY])


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    found = BY_STATUS.get(error.status_code)
    if found is None:
        failure: MuaiError = RequestError(f"{where}: {error.detail}")
    else:
        told = "there is nothing at this path" if found is PathNotFoundError else "this path has no such method"
        failure = found(f"{where}: {told}; /openapi.json lists what there is")
    response = error_response(failure, request.scope[REQUEST_ID_KEY])
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response
