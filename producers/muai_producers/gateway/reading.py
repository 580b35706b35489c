"""Reading HTTP requests: headers, the time to wait, and bodies within their bounds."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.failures import JSON_TYPE, BodyTimeoutError, UnsupportedMediaTypeError
from muai_producers.gateway.submission import parse_number
from muai_producers.wire import TraceHeader

MAX_WAIT_S = 60.0
BODY_TIMEOUT_S = 30.0
TRACE_KEY = "muai.trace"
"""Where the ASGI scope keeps the trace context that came in, as `InferenceRequest.trace` has it."""
_PLAIN_QUERY = re.compile(rb"[A-Za-z_]+=[A-Za-z0-9._-]*")
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\b", re.IGNORECASE)


def headers_of(request: Request) -> dict[str, str]:
    """The headers, their names in lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}


def trace_of(request: Request) -> dict[TraceHeader, str]:
    """The trace context that came in; empty where there is none."""
    trace: dict[TraceHeader, str] = request.scope.get(TRACE_KEY, {})
    return trace


def query_of(request: Request) -> dict[str, str]:
    """The query's parameters."""
    query = request.scope["query_string"]
    if not query:
        return {}
    if _PLAIN_QUERY.fullmatch(query):  # one parameter and nothing to be decoded, as nearly always
        name, _, value = query.decode("latin-1").partition("=")
        return {name: value}
    return dict(parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True))


def wait_of(request: Request, headers: Mapping[str, str]) -> tuple[float, bool]:
    """Seconds that the client wants to wait, and whether that was a preference (RFC 7240), which is capped."""
    asked = query_wait(request)
    if asked is not None:
        return asked, False
    preferred = _PREFER_WAIT.search(headers.get("prefer", ""))
    return (min(float(preferred[1]), MAX_WAIT_S), True) if preferred else (0.0, False)


def query_wait(request: Request) -> float | None:
    """The query's `wait`; None where it is left out.

    Raises:
        InvalidRequestError: it is no number of seconds that may be waited.
    """
    told = query_of(request).get("wait")
    if told is None:
        return None
    wait_s = parse_number(told)
    if wait_s is None or wait_s > MAX_WAIT_S:
        raise InvalidRequestError(
            f"wait must be a number of seconds from 0 to {MAX_WAIT_S:g}, got {told[:40]!r}", {"field": "wait"}
        )
    return wait_s


async def read_json(request: Request, headers: Mapping[str, str], check_size: Callable[[int], None]) -> bytes:
    """The body, refused as soon as it is seen to be too large, whether or not its length was announced.

    Args:
        check_size: raises when a body may not have so many bytes.
    Raises:
        UnsupportedMediaTypeError, BodyTimeoutError, and what `check_size` raises.
    """
    media_type = headers.get("content-type", JSON_TYPE).partition(";")[0].strip().lower()
    if media_type != JSON_TYPE:
        raise UnsupportedMediaTypeError(f"the body must be {JSON_TYPE}, got {media_type[:100]!r}")
    _check_announced(headers, check_size)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _whole_body(request, check_size)
    except TimeoutError:
        raise _too_slow(BODY_TIMEOUT_S) from None


async def _whole_body(request: Request, check_size: Callable[[int], None]) -> bytes:
    chunks, num_bytes, is_more = [], 0, True
    while is_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        num_bytes += len(chunks[-1])
        check_size(num_bytes)
        is_more = message.get("more_body", False)
    return b"".join(chunks)


async def body_chunks(
    request: Request, headers: Mapping[str, str], check_size: Callable[[int], None], timeout_s: float
) -> AsyncIterator[bytes]:
    """The body piece by piece; errors as `read_json`, but that of the media type is left to the caller."""
    _check_announced(headers, check_size)
    num_bytes, pieces = 0, aiter(request.stream())
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(deadline_s):  # not around the yield: who reads may never come back
                chunk = await anext(pieces, None)
        except TimeoutError:
            raise _too_slow(timeout_s) from None
        if chunk is None:
            return
        num_bytes += len(chunk)
        check_size(num_bytes)
        yield chunk


def _check_announced(headers: Mapping[str, str], check_size: Callable[[int], None]) -> None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("compressed bodies are not taken; send it without Content-Encoding")
    announced = headers.get("content-length", "")
    if announced.isdecimal():
        check_size(int(announced))


def _too_slow(timeout_s: float) -> BodyTimeoutError:
    return BodyTimeoutError(f"the body did not arrive within {timeout_s:g} s")
