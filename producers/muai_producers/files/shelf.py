"""What is known of files, by tenant, in the state store."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from muai_producers.files.folder import FileFolder
from muai_producers.files.records import (
    FileObject,
    FileRecord,
    FileUnavailableError,
    Purpose,
    StorageFullError,
    UnknownFileError,
)
from muai_producers.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from muai_config.gateway import FilesSettings

# KEYS: files, the tenant's files, bytes by tenant. ARGV: id, record, tenant, bytes, now, most bytes of a tenant
# (-1: any). A record that is there already stays as it is: putting a file twice changes nothing.
PUT = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return -1 end
local used = tonumber(redis.call('HGET', KEYS[3], ARGV[3]) or '0')
if tonumber(ARGV[6]) >= 0 and used + tonumber(ARGV[4]) > tonumber(ARGV[6]) then return used end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1])
redis.call('HINCRBY', KEYS[3], ARGV[3], ARGV[4])
return -1
"""
# KEYS: as PUT. ARGV: id, tenant, bytes.
DROP = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[3], ARGV[2], string.format('%d', -tonumber(ARGV[3])))
return 1
"""
_decode = msgspec.json.Decoder(FileRecord).decode


class FileShelf:
    """The files of an installation.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store, folder: FileFolder, settings: FilesSettings) -> None:
        self.folder = folder
        self._settings = settings
        self._client: Any = store.client
        self._prefix = store.keys.prefix
        self._files = f"{self._prefix}:files"
        self._put = self._client.register_script(PUT)
        self._drop = self._client.register_script(DROP)

    def new_file(
        self,
        tenant: str,
        filename: str,
        purpose: Purpose,
        num_bytes: int,
        *,
        keep_s: int | None = None,
        file_id: str | None = None,
    ) -> FileRecord:
        """The record of a file that is about to be put."""
        now_s = int(time.time())
        keep_s = self._settings.keep_s if keep_s is None else min(keep_s, self._settings.keep_s)
        made = FileObject(
            id=file_id or f"file-{uuid.uuid4().hex}",
            bytes=num_bytes,
            created_at=now_s,
            expires_at=now_s + keep_s,
            filename=filename,
            purpose=purpose,
        )
        return FileRecord(tenant=tenant, file=made)

    def put(self, record: FileRecord, *, limited: bool = True) -> None:
        """Make a file known whose content is in the folder.

        Args:
            limited: refuse it where the tenant's files would take too much; outputs of batches are not refused.
        Raises:
            StorageFullError: they would; nothing was kept.
        """
        most = self._settings.max_tenant_mb * 1_000_000 if limited else -1
        file = record.file
        args = [file.id, msgspec.json.encode(record), record.tenant, file.bytes, time.time(), most]
        used = self._put(keys=self._keys(record.tenant), args=args)
        if used >= 0:
            raise StorageFullError(
                f"your files take {used} bytes, and {file.bytes} more would be over {most} "
                "(gateway.files.max_tenant_mb); delete some",
                {"used_bytes": used, "max_bytes": most},
            )

    def get(self, file_id: str, tenant: str | None) -> FileObject:
        """A file.

        Args:
            tenant: whose it must be; None: anybody's.
        Raises:
            UnknownFileError: there is none, or it is another's: the two look the same.
        """
        raw = self._client.hget(self._files, file_id)
        record = None if raw is None else _decode(raw)
        if record is None or tenant not in (None, record.tenant) or record.file.expires_at <= time.time():
            raise UnknownFileError(
                f"there is no file {file_id[:100]!r}: it was never uploaded, was deleted, or has expired",
                {"id": file_id[:256]},
            )
        return record.file

    def path(self, file: FileObject) -> Path:
        """Where its content lies.

        Raises:
            FileUnavailableError: not where it should.
        """
        path = self.folder.content(file.id)
        if not path.is_file():
            raise FileUnavailableError(
                f"the content of file {file.id} is not in this process's folder: gateway.files.folder must be one "
                "folder for all gateways and control workers",
                {"id": file.id},
            )
        return path

    def files_of(self, tenant: str) -> list[FileObject]:
        """A tenant's files, newest first."""
        ids = self._client.zrevrange(self._of(tenant), 0, -1)
        kept = self._client.hmget(self._files, ids) if ids else []
        now_s = time.time()
        found = [_decode(raw).file for raw in kept if raw is not None]
        return [file for file in found if file.expires_at > now_s]

    def delete(self, file_id: str, tenant: str | None) -> None:
        """Delete a file; raises as `get`."""
        self.get(file_id, tenant)
        self._delete(_decode(self._client.hget(self._files, file_id)))

    def expire(self, now_s: float | None = None) -> int:
        """Delete what has been kept long enough; returns how many."""
        now_s = time.time() if now_s is None else now_s
        over = [record for record in self._all() if record.file.expires_at <= now_s]
        for record in over:
            self._delete(record)
        return len(over)

    def is_known(self, file_id: str) -> bool:
        """Whether a file of this id is kept."""
        return bool(self._client.hexists(self._files, file_id))

    def _all(self) -> Iterator[FileRecord]:
        for _, raw in self._client.hscan_iter(self._files, count=500):
            yield _decode(raw)

    def _delete(self, record: FileRecord) -> None:
        # Known first, content second: cut off between the two, what is left is swept.
        self._drop(keys=self._keys(record.tenant), args=[record.file.id, record.tenant, record.file.bytes])
        self.folder.delete(record.file.id)

    def _of(self, tenant: str) -> str:
        return f"{self._prefix}:files-of:{tenant}"

    def _keys(self, tenant: str) -> list[str]:
        return [self._files, self._of(tenant), f"{self._prefix}:file-bytes"]
