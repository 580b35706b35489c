"""`/v1/files`: upload, list, look, read, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar, get_args

import msgspec
import redis
from fastapi import FastAPI, Request, Response
from starlette.responses import FileResponse

from muai_producers.errors import BrokerError, InvalidRequestError, PayloadTooLargeError
from muai_producers.files.records import UPLOADED, FileDeleted, FileInUseError, FileList, FileObject, Purpose
from muai_producers.files.shelf import FileShelf
from muai_producers.gateway import openapi_files as documented
from muai_producers.gateway.callers import Caller, caller_of
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.pages import page_of
from muai_producers.gateway.reading import body_chunks, headers_of, query_of
from muai_producers.gateway.submission import parse_number
from muai_producers.gateway.uploading import Upload, UploadReader

if TYPE_CHECKING:
    from muai_producers.batches.store import BatchStore

UPLOAD_TIMEOUT_S = 3600.0
ROOM_FOR_FIELDS = 100_000
DEFAULT_LIMIT = 1000
LEAST_KEPT_S = 3600
EXPIRES_ANCHOR, EXPIRES_SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_encode = msgspec.json.Encoder().encode
Answer = TypeVar("Answer")


async def asking(executor: Executor, ask: Callable[[], Answer]) -> Answer:
    """What the state store answers, asked on a thread.

    Raises:
        BrokerError: it does not answer.
    """

    def call() -> Answer:
        try:
            return ask()
        except redis.RedisError as error:
            raise BrokerError(f"the state store does not answer: {error}") from error

    return await asyncio.get_running_loop().run_in_executor(executor, call)


class FileRoutes:
    """The endpoints of files."""

    def __init__(self, shelf: FileShelf, batches: BatchStore, max_file_bytes: int, executor: Executor) -> None:
        self._shelf = shelf
        self._batches = batches
        self._max_file_bytes = max_file_bytes
        self._executor = executor

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        router = app.router
        router.post("/v1/files", **documented.UPLOAD)(self.upload)
        router.get("/v1/files", **documented.LIST)(self.list)
        router.get("/v1/files/{id}", **documented.GET)(self.get)
        router.get("/v1/files/{id}/content", **documented.CONTENT)(self.content)
        router.delete("/v1/files/{id}", **documented.DELETE)(self.delete)

    async def upload(self, request: Request) -> Response:
        """Take a file."""
        headers = headers_of(request)
        folder = self._shelf.folder
        chunks = body_chunks(request, headers, self._check_size, UPLOAD_TIMEOUT_S)
        with folder.writing() as (file, partial):
            reader = UploadReader(headers.get("content-type", ""), file, self._max_file_bytes)
            upload = await reader.read(chunks, self._executor)
            record = self._shelf.new_file(
                caller_of(request).tenant,
                upload.filename or "file",
                _purpose(upload),
                upload.num_bytes,
                keep_s=_keep_s(upload),
            )
            await asking(self._executor, lambda: folder.keep(file, partial, record.file.id))
        try:
            await asking(self._executor, lambda: self._shelf.put(record))
        except BaseException:
            folder.delete(record.file.id)
            raise
        return _answer(record.file)

    async def list(self, request: Request) -> Response:
        """The caller's files."""
        query = query_of(request)
        purpose = query.get("purpose")
        if purpose is not None and purpose not in get_args(Purpose):
            raise InvalidRequestError(
                f"purpose must be one of {', '.join(get_args(Purpose))}, got {purpose[:40]!r}", {"field": "purpose"}
            )
        tenant = caller_of(request).tenant
        found = await asking(self._executor, lambda: self._shelf.files_of(tenant))
        files, has_more = page_of([file for file in found if purpose in (None, file.purpose)], query, DEFAULT_LIMIT)
        first_id, last_id = (files[0].id, files[-1].id) if files else (None, None)
        page = FileList(data=files, first_id=first_id, last_id=last_id, has_more=has_more)
        return Response(_encode(page), media_type=JSON_TYPE)

    async def get(self, request: Request) -> Response:
        """What is known of a file."""
        return _answer(await self._find(request))

    async def content(self, request: Request) -> Response:
        """A file's content; parts of it with the header Range."""
        file = await self._find(request)
        path = await asking(self._executor, lambda: self._shelf.path(file))
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=file.filename,
            headers={"x-content-type-options": "nosniff"},
        )

    async def delete(self, request: Request) -> Response:
        """Delete a file that no open batch reads."""
        file = await self._find(request)
        caller = caller_of(request)
        using = await asking(self._executor, lambda: self._batches.reading(file.id, caller.tenant))
        if using:
            raise FileInUseError(
                f"batch {using} reads file {file.id} and is not finished; cancel it first",
                {"id": file.id, "batch_id": using},
            )
        await asking(self._executor, lambda: self._shelf.delete(file.id, _tenant(caller)))
        return Response(_encode(FileDeleted(id=file.id)), media_type=JSON_TYPE)

    async def _find(self, request: Request) -> FileObject:
        file_id, tenant = request.path_params["id"], _tenant(caller_of(request))
        return await asking(self._executor, lambda: self._shelf.get(file_id, tenant))

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_file_bytes + ROOM_FOR_FIELDS:
            raise PayloadTooLargeError(
                f"the file has more than {self._max_file_bytes} bytes (gateway.files.max_file_mb)",
                {"field": "file", "max_bytes": self._max_file_bytes},
            )


def _tenant(caller: Caller) -> str | None:
    """Whose things the caller sees; None: everybody's."""
    return caller.tenant if caller.is_confined else None


def _purpose(upload: Upload) -> Purpose:
    given = upload.fields.get("purpose")
    for purpose in UPLOADED:
        if given == purpose:
            return purpose
    told = "is missing" if given is None else f"{given[:40]!r} is none that files are uploaded for here"
    raise InvalidRequestError(f"purpose {told}; send one of {', '.join(UPLOADED)}", {"field": "purpose"})


def _keep_s(upload: Upload) -> int | None:
    """How long the caller wants the file to be kept; None: as long as any."""
    anchor, seconds = upload.fields.get(EXPIRES_ANCHOR), upload.fields.get(EXPIRES_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor not in (None, "created_at"):
        raise InvalidRequestError(f"{EXPIRES_ANCHOR} must be created_at", {"field": EXPIRES_ANCHOR})
    value = parse_number(seconds or "", int)
    if value is None or value < LEAST_KEPT_S:
        raise InvalidRequestError(
            f"{EXPIRES_SECONDS} must be a whole number of at least {LEAST_KEPT_S}", {"field": EXPIRES_SECONDS}
        )
    return int(value)


def _answer(file: FileObject) -> Response:
    return Response(_encode(file), media_type=JSON_TYPE)
