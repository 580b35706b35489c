"""What is known of a file, and what can be wrong with one."""

from __future__ import annotations

from typing import Literal

import msgspec

from muai_producers.errors import MuaiError, RequestError

Purpose = Literal["batch", "batch_output", "user_data"]
UPLOADED: tuple[Purpose, ...] = ("batch", "user_data")
"""What a caller may upload a file for."""


class UnknownFileError(RequestError):
    """No file of that id is known: never uploaded, deleted, or expired."""

    code = "file_not_found"
    http_status = 404


class FileInUseError(RequestError):
    """A batch that is not finished reads the file."""

    code = "file_in_use"
    http_status = 409


class StorageFullError(RequestError):
    """The tenant's files take as much as they may."""

    code = "storage_full"
    http_status = 413


class FileUnavailableError(MuaiError):
    """The file is known, and this process does not find its content in its folder."""

    code = "file_unavailable"
    retryable = True
    http_status = 503


class DiskFullError(MuaiError):
    """The disk has no room."""

    code = "disk_full"
    retryable = True
    http_status = 507


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file, in OpenAI's shape."""

    id: str
    object: str = "file"
    bytes: int
    created_at: int
    """Wall-clock seconds since the epoch."""
    expires_at: int
    filename: str
    purpose: Purpose
    status: str = "processed"


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of files."""

    object: str = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A file is gone."""

    id: str
    object: str = "file"
    deleted: bool = True


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a file."""

    tenant: str
    file: FileObject
