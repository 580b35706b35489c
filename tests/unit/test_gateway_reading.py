"""Bodies and queries of HTTP requests, within their bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from muai_producers.errors import InvalidRequestError, PayloadTooLargeError
from muai_producers.gateway import reading
from muai_producers.gateway.failures import BodyTimeoutError, UnsupportedMediaTypeError
from muai_producers.gateway.reading import headers_of, query_of, read_json, wait_of

JSON = (b"content-type", b"application/json")


def a_request(
    *messages: dict[str, Any], query: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = (JSON,)
) -> Request:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return Request({"type": "http", "method": "POST", "query_string": query, "headers": list(headers)}, receive)


def piece(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def at_most_10(num_bytes: int) -> None:
    if num_bytes > 10:
        raise PayloadTooLargeError("more than 10")


async def read(request: Request) -> bytes:
    return await read_json(request, headers_of(request), at_most_10)


async def test_given_a_body_in_pieces_then_it_is_put_together() -> None:
    assert await read(a_request(piece(b"ab", more=True), piece(b"", more=True), piece(b"cd"))) == b"abcd"


async def test_given_a_body_that_grows_too_large_or_says_it_will_then_the_rest_is_not_waited_for() -> None:
    with pytest.raises(PayloadTooLargeError):
        await read(a_request(piece(b"123456", more=True), piece(b"123456", more=True)))
    with pytest.raises(PayloadTooLargeError):
        await read(a_request(headers=[JSON, (b"content-length", b"11")]))


async def test_given_a_body_that_does_not_come_then_its_sender_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BODY_TIMEOUT_S", 0.01)
    with pytest.raises(BodyTimeoutError):
        await read(a_request(piece(b"ab", more=True)))


async def test_given_a_sender_that_goes_away_then_its_half_body_is_no_body() -> None:
    with pytest.raises(ClientDisconnect):
        await read(a_request(piece(b"ab", more=True), {"type": "http.disconnect"}))


@pytest.mark.parametrize(
    "headers", [[(b"content-type", b"text/plain")], [JSON, (b"content-encoding", b"gzip")]], ids=["type", "encoding"]
)
async def test_given_another_kind_of_body_then_it_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        await read(a_request(piece(b"{}"), headers=headers))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", {}),
        (b"wait=30", {"wait": "30"}),
        (b"wait=", {"wait": ""}),
        (b"wait=%33%30", {"wait": "30"}),
        (b"wait=1&after=x", {"wait": "1", "after": "x"}),
        (b"a+b=c", {"a b": "c"}),
        (b"wait", {"wait": ""}),
    ],
)
def test_given_a_query_then_plain_or_encoded_it_says_the_same(query: bytes, expected: dict[str, str]) -> None:
    assert query_of(a_request(query=query)) == expected


@pytest.mark.parametrize("query", [b"wait=-1", b"wait=61", b"wait=soon", b"wait=1e3", b"wait="])
def test_given_a_time_that_may_not_be_waited_then_the_field_is_named(query: bytes) -> None:
    with pytest.raises(InvalidRequestError) as wrong:
        wait_of(a_request(query=query), {})
    assert wrong.value.details["field"] == "wait"


def test_given_a_preference_then_it_is_capped_and_the_query_goes_before_it() -> None:
    assert wait_of(a_request(), {"prefer": "respond-async, wait=100"}) == (60.0, True)
    assert wait_of(a_request(query=b"wait=5"), {"prefer": "wait=100"}) == (5.0, False)
    assert wait_of(a_request(), {}) == (0.0, False)
