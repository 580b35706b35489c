"""Uploads: multipart bodies of any size, written to the files' folder piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from muai_producers.errors import InvalidRequestError, MalformedMessageError, PayloadTooLargeError
from muai_producers.files.folder import refusing_bad_disks
from muai_producers.gateway.failures import UnsupportedMediaTypeError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

WRITTEN_TOGETHER = 1_000_000
MAX_FIELD_BYTES = 10_000
MAX_FIELDS = 32
MAX_NAME_CHARS = 256


@dataclass
class Upload:
    """What an upload holds."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None: no file has come."""
    num_bytes: int = 0


class UploadReader:
    """Writes the part `file` of a multipart body to a file, and gathers the other parts.

    Args:
        target: where the file's content goes.
    """

    def __init__(self, content_type: str, target: BinaryIO, max_file_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise UnsupportedMediaTypeError("the body must be multipart/form-data with the parts purpose and file")
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self._parser = MultipartParser(options[b"boundary"], callbacks)
        self._target = target
        self._max_file_bytes = max_file_bytes
        self._upload = Upload()
        self._is_whole = False
        self._header_name = self._header_text = b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._value = bytearray()

    async def read(self, chunks: AsyncIterator[bytes], executor: Executor) -> Upload:
        """Read the whole body; parsing and writing happen on the executor's threads.

        Raises:
            MalformedMessageError, InvalidRequestError, PayloadTooLargeError: what is wrong with it.
            DiskFullError: there is no room for it.
        """
        loop = asyncio.get_running_loop()
        waiting = bytearray()
        async for chunk in chunks:
            waiting += chunk
            if len(waiting) >= WRITTEN_TOGETHER:
                await loop.run_in_executor(executor, self._feed, bytes(waiting))
                waiting.clear()
        await loop.run_in_executor(executor, self._feed, bytes(waiting))
        if not self._is_whole:
            raise MalformedMessageError("the multipart body ends before its last boundary")
        if self._upload.filename is None:
            raise InvalidRequestError("the part file is missing", {"field": "file"})
        return self._upload

    def _feed(self, data: bytes) -> None:
        try:
            with refusing_bad_disks():
                if data:
                    self._parser.write(data)
        except FormParserError as error:
            raise MalformedMessageError(f"the body is no multipart/form-data: {error}") from None

    # -- what the parser calls ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._disposition = b""
        self._value.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_text += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_text
        self._header_name = self._header_text = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self._upload.filename is not None:
                raise InvalidRequestError("the part file may come once", {"field": "file"})
            self._upload.filename = clean_filename(options.get(b"filename", b"").decode("utf-8", "replace"))
        elif len(self._upload.fields) >= MAX_FIELDS:
            raise InvalidRequestError(f"the body has more than {MAX_FIELDS} parts", {"field": self._name[:100]})

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._upload.num_bytes += end - start
            if self._upload.num_bytes > self._max_file_bytes:
                raise PayloadTooLargeError(
                    f"the file has more than {self._max_file_bytes} bytes (gateway.files.max_file_mb)",
                    {"field": "file", "max_bytes": self._max_file_bytes},
                )
            self._target.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"the part {self._name[:100]} has more than {MAX_FIELD_BYTES} bytes", {"field": self._name[:100]}
            )

    def _end_part(self) -> None:
        if not self._is_file:
            self._upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._is_whole = True


def clean_filename(given: str) -> str:
    """The last part of a name, without what no file name should hold; it is shown, never used as a path."""
    name = PurePosixPath(given.replace("\\", "/")).name
    return "".join(char for char in name if char.isprintable())[:MAX_NAME_CHARS] or "file"
