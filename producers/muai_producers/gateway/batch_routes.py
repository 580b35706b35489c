"""`/v1/batches`: make, look, list, cancel. The control worker runs them."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.batches.records import (
    MAX_WINDOW_S,
    BatchBody,
    BatchEndedError,
    BatchList,
    BatchObject,
    BatchRecord,
    window_s,
)
from muai_producers.batches.store import BatchStore, Versioned
from muai_producers.errors import IdempotencyConflictError, InvalidRequestError
from muai_producers.files.shelf import FileShelf
from muai_producers.gateway import openapi_batches as documented
from muai_producers.gateway.callers import Caller, caller_of
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.file_routes import asking
from muai_producers.gateway.pages import page_of
from muai_producers.gateway.reading import headers_of, query_of, read_json
from muai_producers.gateway.submission import RequestBuilder, idempotency_key, read_struct

if TYPE_CHECKING:
    from muai_config.gateway import BatchSettings

DEFAULT_LIMIT = 20
KEYED = uuid.UUID("5b0f6a52-27de-5b5c-8d0e-3f9a4a1c7b11")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(BatchBody).decode


class BatchRoutes:
    """The endpoints of batches."""

    def __init__(
        self,
        shelf: FileShelf,
        batches: BatchStore,
        settings: BatchSettings,
        builder: RequestBuilder,
        executor: Executor,
    ) -> None:
        self._shelf = shelf
        self._batches = batches
        self._settings = settings
        self._check_size = builder.check_size
        self._executor = executor

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.post("/v1/batches", **documented.CREATE)(self.create)
        router.get("/v1/batches", **documented.LIST)(self.list)
        router.get("/v1/batches/{id}", **documented.GET)(self.get)
        router.post("/v1/batches/{id}/cancel", **documented.CANCEL)(self.cancel)

    async def create(self, request: Request) -> Response:
        """Make a batch of a file's lines."""
        headers = headers_of(request)
        body = read_struct(_decode, await read_json(request, headers, self._check_size))
        caller = caller_of(request)
        key = idempotency_key(None, headers)
        record = _new_record(body, caller, key)
        found = await asking(self._executor, lambda: self._create(record))
        if found.record.body != body:
            raise IdempotencyConflictError(
                f"idempotency key {key!r} was used by batch {found.record.id} with other content",
                {"idempotency_key": key, "batch_id": found.record.id},
            )
        return _answer(found.shown())

    def _create(self, record: BatchRecord) -> Versioned:
        file = self._shelf.get(record.body.input_file_id, record.tenant)
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"file {file.id} was uploaded for {file.purpose}, not for batch", {"field": "input_file_id"}
            )
        return self._batches.create(record, self._settings.max_open_per_tenant)

    async def list(self, request: Request) -> Response:
        """The caller's batches."""
        tenant = caller_of(request).tenant
        found = await asking(self._executor, lambda: self._batches.batches_of(tenant))
        batches, has_more = page_of(found, query_of(request), DEFAULT_LIMIT)
        first_id, last_id = (batches[0].id, batches[-1].id) if batches else (None, None)
        page = BatchList(data=batches, first_id=first_id, last_id=last_id, has_more=has_more)
        return Response(_encode(page), media_type=JSON_TYPE)

    async def get(self, request: Request) -> Response:
        """How far a batch is."""
        return _answer((await self._find(request)).shown())

    async def cancel(self, request: Request) -> Response:
        """Cancel a batch that has not ended."""
        found = await self._find(request)
        if found.record.ended:
            raise BatchEndedError(
                f"batch {found.record.id} has ended ({found.record.status}) and cannot be cancelled",
                {"id": found.record.id, "status": found.record.status},
            )
        await asking(self._executor, lambda: self._batches.cancel(found.record.id))
        return await self.get(request)

    async def _find(self, request: Request) -> Versioned:
        batch_id, caller = request.path_params["id"], caller_of(request)
        tenant = caller.tenant if caller.is_confined else None
        return await asking(self._executor, lambda: self._batches.get(batch_id, tenant))


def _new_record(body: BatchBody, caller: Caller, key: str | None) -> BatchRecord:
    seconds = window_s(body.completion_window)
    if seconds > MAX_WINDOW_S:
        raise InvalidRequestError(
            f"completion_window may be {MAX_WINDOW_S // 3600}h at most, got {body.completion_window}",
            {"field": "completion_window"},
        )
    now_s = int(time.time())
    made = uuid.uuid4() if key is None else uuid.uuid5(KEYED, f"{caller.tenant} {key}")
    return BatchRecord(
        id=f"batch_{made.hex}",
        tenant=caller.tenant,
        body=body,
        limits=caller.limits,
        created_at=now_s,
        expires_at=now_s + seconds,
    )


def _answer(batch: BatchObject) -> Response:
    return Response(_encode(batch), media_type=JSON_TYPE)
