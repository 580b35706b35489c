"""Errors as OpenAI's clients read them, whoever raised them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muai_producers.errors import EnginesExhaustedError, MuaiError
from muai_producers.gateway.openai_api.bodies import UnsupportedFieldError

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/files", "/v1/batches")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class StreamRestartedError(MuaiError):
    """The text was begun anew, which chunks cannot say: what was sent cannot be taken back."""

    code = "stream_restarted"
    retryable = True
    http_status = 502


class OpenAIError(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    """A sentence for people."""
    type: str
    """`invalid_request_error`, `authentication_error`, `permission_error`, `rate_limit_error` or `server_error`."""
    param: str | None
    """The field that is wrong, where one is."""
    code: str
    """Stable; what a program should look at."""
    details: dict[str, Any] = {}
    request_id: str = ""
    """The X-Request-Id of this HTTP request."""


class OpenAIErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is an error."""

    error: OpenAIError


def error_body(status: int, code: str, message: str, details: dict[str, Any], request_id: str = "") -> OpenAIErrorBody:
    """An error in OpenAI's shape; ours is in it as well."""
    field = str(details.get("field") or "").removeprefix("inputs.").removeprefix("parameters.")
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return OpenAIErrorBody(
        error=OpenAIError(
            message=message, type=kind, param=field or None, code=code, details=details, request_id=request_id
        )
    )


def told_error(error: MuaiError) -> MuaiError:
    """The error as its client should see it: what no engine has is the request's fault, not the engines'."""
    if isinstance(error, EnginesExhaustedError):
        refusals = [attempt["error"] for attempt in error.attempts]
        lacking = [one for one in refusals if one.get("code") == "unsupported_parameter"]
        if lacking and all(one.get("code") in ("unsupported_parameter", "engine_unavailable") for one in refusals):
            details = lacking[0].get("details") or {}
            return UnsupportedFieldError(
                str(lacking[0].get("message", "")), {"field": details.get("parameter", ""), "attempts": error.attempts}
            )
    return error


class OpenAIErrors:
    """ASGI middleware: every error on these paths leaves in OpenAI's shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_ours(scope["path"]):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def translate(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
                return
            if start is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                body = _translated(start["status"], body)
                start["headers"] = [
                    (name, str(len(body)).encode() if name == b"content-length" else value)
                    for name, value in start["headers"]
                ]
                await send(start)
                await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, translate)


def _is_ours(path: str) -> bool:
    return path in PATHS or path.startswith(("/v1/models/", "/v1/files/", "/v1/batches/"))


def _translated(status: int, body: bytes) -> bytes:
    try:
        error = json.loads(body)["error"]
        fields = error["code"], error["message"], error["details"], error["request_id"]
    except (ValueError, KeyError, TypeError):
        return body
    return msgspec.json.encode(error_body(status, *fields))
