"""`/api/v1/analyze` and `/api/v1/optimize`: what would help an instance, for those who run the installation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.advice.applying import apply_plan
from muai_producers.advice.engine import OptimizationEngine
from muai_producers.advice.records import AnalysisRequest, ApplyRequest, OptimizationRequest
from muai_producers.gateway import openapi_advice as documented
from muai_producers.gateway.callers import caller_of
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.file_routes import asking
from muai_producers.gateway.reading import headers_of, read_json
from muai_producers.gateway.submission import read_struct
from muai_producers.gateway.watch_routes import check_operator
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions

if TYPE_CHECKING:
    from muai_producers.runtime_config.live import LiveSettings
    from muai_producers.store import Store

Body = TypeVar("Body")
_encode = msgspec.json.Encoder().encode
_decode_analysis = msgspec.json.Decoder(AnalysisRequest).decode
_decode_request = msgspec.json.Decoder(OptimizationRequest).decode
_decode_apply = msgspec.json.Decoder(ApplyRequest).decode


class AdviceRoutes:
    """The endpoints; arguments as `ConfigRoutes` has them."""

    def __init__(self, live: LiveSettings, store: Store, executor: Executor, check_size: Callable[[int], None]) -> None:
        self.engine = OptimizationEngine(lambda: live.current, store)
        self._versions = ConfigVersions(store)
        self._editor = ConfigEditor(live.started_with, self._versions)
        self._executor = executor
        self._check_size = check_size

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.post("/api/v1/analyze", **documented.ANALYZE)(self.analyze)
        router.post("/api/v1/optimize", **documented.OPTIMIZE)(self.optimize)
        router.post("/api/v1/optimize/apply", **documented.APPLY)(self.apply)

    async def analyze(self, request: Request) -> Response:
        """What holds an instance up."""
        body = await self._read(request, _decode_analysis)
        found = await asking(self._executor, lambda: self.engine.analyze(body))
        return Response(_encode(found), media_type=JSON_TYPE)

    async def optimize(self, request: Request) -> Response:
        """What would help it."""
        body = await self._read(request, _decode_request)
        plan = await asking(self._executor, lambda: self.engine.generate_plan(body))
        return Response(_encode(plan), media_type=JSON_TYPE)

    async def apply(self, request: Request) -> Response:
        """Do it."""
        body, who = await self._read(request, _decode_apply), caller_of(request).who
        done = await asking(self._executor, lambda: apply_plan(body, self._editor, self._versions, by=who))
        return Response(_encode(done), media_type=JSON_TYPE)

    async def _read(self, request: Request, decode: Callable[[bytes], Body]) -> Body:
        check_operator(request)
        return read_struct(decode, await read_json(request, headers_of(request), self._check_size))
