"""What every request passes first, where the server cancels it or the gateway drains."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from muai_producers.gateway.draining import Drain
from muai_producers.gateway.edge import Edge

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/v1/x", "headers": []}


class Everybody:
    async def identify(self, _: Any) -> None:
        return None


def an_edge(app: Any) -> tuple[Edge, Drain]:
    drain = Drain(1.0, lambda: None)
    return Edge(app, drain, Everybody(), frozenset({"/health"}), frozenset()), drain  # type: ignore[arg-type]


async def hanging(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


async def call(edge: Edge, **scope: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await edge({**SCOPE, **scope}, receive, send)
    return sent


async def test_given_a_server_that_cancels_what_is_left_then_it_is_told_503_and_when_to_come_again() -> None:
    edge, drain = an_edge(hanging)
    calling = asyncio.create_task(call(edge))
    await asyncio.sleep(0)
    assert drain.num_active == 1
    drain.draining = True
    calling.cancel()
    start, body = await calling
    headers = dict(start["headers"])
    assert start["status"] == 503
    assert (headers[b"retry-after"], headers[b"connection"]) == (b"1", b"close")
    assert json.loads(body["body"])["error"]["code"] == "shutting_down"
    assert drain.num_active == 0


async def test_given_a_cancel_that_is_no_end_of_the_gateway_then_it_goes_on_as_one() -> None:
    edge, _ = an_edge(hanging)
    calling = asyncio.create_task(call(edge))
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def test_given_a_caller_that_is_still_being_identified_then_the_drain_waits_for_it() -> None:
    edge, drain = an_edge(hanging)
    known = asyncio.Event()
    edge._doorkeeper.identify = lambda _: known.wait()  # type: ignore[assignment, method-assign, return-value]
    calling = asyncio.create_task(call(edge))
    await asyncio.sleep(0)
    assert drain.num_active == 1
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
