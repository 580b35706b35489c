"""`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models/{id}`."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.errors import ModelNotFoundError
from muai_producers.gateway.answers import catalog
from muai_producers.gateway.callers import Doorkeeper, caller_of
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.openai_api import document
from muai_producers.gateway.openai_api.answers import chat_completion, completion, embedding_list
from muai_producers.gateway.openai_api.bodies import (
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    Generation,
    read_body,
)
from muai_producers.gateway.openai_api.calls import Calls
from muai_producers.gateway.openai_api.chunks import ChatForm, TextForm, written
from muai_producers.gateway.openai_api.translation import (
    chat_inferences,
    completion_inferences,
    embedding_inferences,
)
from muai_producers.gateway.reading import headers_of, read_json, trace_of
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.routes import Routes
from muai_producers.gateway.sse import EventStream
from muai_producers.gateway.streams import StreamHub
from muai_producers.gateway.submission import InferenceBody
from muai_producers.wire import InferenceRequest

if TYPE_CHECKING:
    from muai_config import Settings

_encode = msgspec.json.Encoder().encode


class OpenAIRoutes:
    """The endpoints that OpenAI's clients know."""

    def __init__(
        self,
        settings: Settings,
        routes: Routes,
        hub: ResultHub,
        streams: StreamHub,
        drain: Drain,
        doorkeeper: Doorkeeper,
        executor: Executor,
    ) -> None:
        self._check_size = routes.builder.check_size
        self._doorkeeper = doorkeeper
        self._executor = executor
        self._calls = Calls(hub, streams, routes.builder, routes.admissions, routes.revoke, drain, executor)
        self._models = {entry.id: _encode(entry) for entry in catalog(settings).data}

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.post("/v1/chat/completions", **document.CHAT)(self.chat)
        router.post("/v1/completions", **document.COMPLETION)(self.completion)
        router.post("/v1/embeddings", **document.EMBEDDING)(self.embeddings)
        router.get("/v1/models/{id:path}", **document.MODEL)(self.model)

    async def chat(self, request: Request) -> Response | EventStream:
        """Go on with a chat."""
        body = read_body(await self._read(request), ChatCompletionBody)
        requests = await self._build(request, chat_inferences(body))
        if body.stream:
            form = ChatForm(requests[0].id, body.model, body.include_usage)
            return await self._stream(request, body, requests, form)
        results = await self._calls.results(requests, request.receive, caller_of(request).limits)
        return _answer(chat_completion(requests[0].id, body.model, results))

    async def completion(self, request: Request) -> Response | EventStream:
        """Go on with texts."""
        body = read_body(await self._read(request), CompletionBody)
        requests = await self._build(request, completion_inferences(body))
        if body.stream:
            form = TextForm(requests[0].id, body.model, body.include_usage)
            return await self._stream(request, body, requests, form)
        results = await self._calls.results(requests, request.receive, caller_of(request).limits)
        return _answer(completion(requests[0].id, body.model, results, body.n or 1))

    async def _stream(
        self, request: Request, body: Generation, requests: list[InferenceRequest], form: ChatForm | TextForm
    ) -> EventStream:
        told = await self._calls.follow(requests, request.receive, caller_of(request).limits)
        return EventStream(written(told, form, body.n or 1, body.include_usage))

    async def embeddings(self, request: Request) -> Response:
        """Embed texts; each is a request of its own, and may travel in a batch of its own."""
        body = read_body(await self._read(request), EmbeddingBody)
        requests = await self._build(request, embedding_inferences(body))
        results = await self._calls.results(requests, request.receive, caller_of(request).limits)
        # Thousands of vectors take a while to write: not on the event loop.
        encoded = await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: _encode(embedding_list(body.model, results, body.encoding_format))
        )
        return Response(encoded, media_type=JSON_TYPE)

    async def _read(self, request: Request) -> bytes:
        return await read_json(request, headers_of(request), self._check_size)

    async def _build(self, request: Request, inferences: list[InferenceBody]) -> list[InferenceRequest]:
        """The requests of a call, counted against its caller's requests per minute."""
        caller = caller_of(request)
        headers = headers_of(request)
        requests = self._calls.build(inferences, headers, tenant=caller.tenant, trace=trace_of(request))
        await self._doorkeeper.charge(caller, len(requests))
        return requests

    async def model(self, request: Request) -> Response:
        """One model of the catalog."""
        name = request.path_params["id"]
        if name not in self._models:
            raise ModelNotFoundError(f"there is no model {name[:100]!r}; GET /v1/models lists them", {"field": "model"})
        return Response(self._models[name], media_type=JSON_TYPE)


def _answer(answer: msgspec.Struct) -> Response:
    return Response(_encode(answer), media_type=JSON_TYPE)
