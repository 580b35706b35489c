"""`GET /v1/inference/{id}/stream`: a request's text as server-sent events, resumable at any gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from urllib.parse import parse_qs

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.gateway import openapi
from muai_producers.gateway.callers import caller_of
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.sse import HEARTBEAT, EventStream, event
from muai_producers.gateway.streams import News, StreamHub
from muai_producers.streams.text import Offset

END = ".end"
"""Ends the id of the last event. A browser that comes back with it is told, by 204, to come no more."""
_encode = msgspec.json.Encoder().encode


class StreamRoutes:
    """The endpoint for readers."""

    def __init__(self, hub: ResultHub, streams: StreamHub) -> None:
        self._hub = hub
        self._streams = streams

    def register(self, app: FastAPI) -> None:
        """Give the application the path with its documentation."""
        app.router.get("/v1/inference/{id}/stream", **openapi.STREAM)(self.stream)

    async def stream(self, request: Request) -> EventStream | Response:
        """A request's text as it comes."""
        request_id = request.path_params["id"]
        after = _last_event(request)
        if after is not None and after.endswith(END):
            return Response(status_code=204)
        if after is not None:
            Offset.parse(after)
        await self._hub.look(request_id, caller_of(request))  # or 404
        return EventStream(self._events(request_id, after))

    async def _events(self, request_id: str, after: str | None) -> AsyncGenerator[bytes, None]:
        yield b"retry: 1000\n\n"
        async for news in self._streams.read(request_id, after):
            yield _written(news)


def _last_event(request: Request) -> str | None:
    """The id of the last event that the reader has seen: browsers send a header, others may put it in the query."""
    told = request.headers.get("last-event-id") or parse_qs(request.url.query).get("after", [""])[0]
    return told.strip() or None


def _written(news: News) -> bytes:
    chunks = [
        event(_encode({"text": one.text} if one.kind == "text" else {}), name=one.kind, event_id=one.offset)
        for one in news.events
        if one.kind != "result"
    ]
    if news.end is not None:
        chunks.append(event(_encode(news.end), name="end", event_id=f"{news.offset}{END}"))
    return b"".join(chunks) or HEARTBEAT
