"""Server-sent events: how they are written, and the answer that carries them for as long as its client listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)
HEARTBEAT_S = 15.0
"""Proxies drop connections that are silent for a minute or so."""
SEND_TIMEOUT_S = 30.0
"""A client that takes nothing for so long is left to come back and read on from where it was."""
HEARTBEAT = b": still there\n\n"


def event(data: bytes, *, name: str = "", event_id: str = "") -> bytes:
    """One event; `data` is JSON and so has no line breaks."""
    head = f"id: {event_id}\n" if event_id else ""
    head += f"event: {name}\n" if name else ""
    return b"%bdata: %b\n\n" % (head.encode(), data)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response. Ends with its chunks, with its client, or with a client's patience to take any.

    Args:
        chunks: closed in every case.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, gone):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await self._chunks.aclose()
        if not pump.cancelled():
            pump.result()

    async def _pump(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache, no-transform"),
            (b"x-accel-buffering", b"no"),  # nginx would keep it back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            log.info("a stream's reader took nothing for %g s; it may come back", SEND_TIMEOUT_S)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
