"""Batches in the state store. A record is written only over the version that its writer has read, so that of two
processes at one batch one finds out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from muai_producers.batches.records import ENDED, BatchObject, BatchRecord, TooManyBatchesError, UnknownBatchError
from muai_producers.store import Store

# KEYS: the batch, the tenant's batches, open batches, the tenant's open batches.
# ARGV: id, record, now, most open batches of a tenant.
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 'known' end
if redis.call('SCARD', KEYS[4]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'version', 1)
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
redis.call('SADD', KEYS[4], ARGV[1])
return 'created'
"""
# KEYS: as CREATE, then statistics. ARGV: id, record, version read, seconds that an ended batch is kept ('' while it is
# open), requests in the queue, requests that have ended since the version read.
SAVE = """
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'in_queue', ARGV[5])
redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HINCRBY', KEYS[5], 'batch_requests_ended', ARGV[6])
if ARGV[4] ~= '' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('SREM', KEYS[4], ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[4])
end
return 1
"""
# KEYS: the batch. ARGV: now. The first who asks is remembered; the runner looks at each step.
CANCEL = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSETNX', KEYS[1], 'cancelling_at', ARGV[1]) end
"""
_decode = msgspec.json.Decoder(BatchRecord).decode


class Versioned(msgspec.Struct, frozen=True):
    """A record as it was read."""

    record: BatchRecord
    version: int
    cancelling_at: int | None

    def shown(self) -> BatchObject:
        """As callers see it."""
        return self.record.shown(self.cancelling_at)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of batches' lines, and those of everybody else."""

    open_ids: tuple[str, ...]
    """Batches that are not finished."""
    own_in_queue: int
    """Of lines, as far as records say."""
    others_admitted: int
    """Of everybody else, ever, about: what a runner that died in a step has sent is counted with them until its step is
    done again."""


class BatchStore:
    """The batches of an installation.

    Args:
        keep_s: how long an ended batch can be asked for.
    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store, keep_s: int) -> None:
        self._client: Any = store.client
        self._prefix = store.keys.prefix
        self._inflight, self._stats = store.keys.inflight, store.keys.stats
        self._keep_s = keep_s
        self._open = f"{self._prefix}:batches-open"
        self._create = self._client.register_script(CREATE)
        self._save = self._client.register_script(SAVE)
        self._cancel = self._client.register_script(CANCEL)

    def create(self, record: BatchRecord, max_open: int) -> Versioned:
        """Keep a new batch; one of the same id that is there already is returned as it is.

        Raises:
            TooManyBatchesError: the tenant has `max_open` that are not finished.
        """
        args = [record.id, msgspec.json.encode(record), time.time(), max_open]
        verdict = self._create(keys=self._keys(record), args=args)
        if verdict == b"full":
            raise TooManyBatchesError(
                f"{max_open} of your batches are not finished (gateway.batches.max_open_per_tenant)",
                {"allowed": max_open, "retry_after_s": 60.0},
            )
        return self.get(record.id)

    def get(self, batch_id: str, tenant: str | None = None) -> Versioned:
        """A batch.

        Args:
            tenant: whose it must be; None: anybody's.
        Raises:
            UnknownBatchError: there is none, or it is another's.
        """
        found = self._read([batch_id])[0]
        if found is None or tenant not in (None, found.record.tenant):
            raise UnknownBatchError(f"there is no batch {batch_id[:100]!r}", {"id": batch_id[:256]})
        return found

    def batches_of(self, tenant: str) -> list[BatchObject]:
        """A tenant's batches, newest first."""
        of_tenant = self._of(tenant)
        ids = [raw.decode() for raw in self._client.zrevrange(of_tenant, 0, -1)]
        found = self._read(ids)
        gone = [batch_id for batch_id, batch in zip(ids, found, strict=True) if batch is None]
        if gone:
            self._client.zrem(of_tenant, *gone)
        return [batch.shown() for batch in found if batch is not None]

    def open_ids(self) -> list[str]:
        """Ids of the batches that are not finished, oldest first."""
        return [raw.decode() for raw in self._client.zrange(self._open, 0, -1)]

    def reading(self, file_id: str, tenant: str) -> str | None:
        """A batch of the tenant that is not finished and reads the file; None: there is none."""
        ids = [raw.decode() for raw in self._client.smembers(self._open_of(tenant))]
        for batch in self._read(ids):
            if batch is not None and batch.record.body.input_file_id == file_id:
                return batch.record.id
        return None

    def is_open(self, batch_id: str) -> bool:
        """Whether the batch is not finished."""
        return self._client.zscore(self._open, batch_id) is not None

    def save(self, record: BatchRecord, found: Versioned) -> bool:
        """Write a record over the version that was read; False when another has written since."""
        keep_s = self._keep_s if record.status in ENDED else ""
        before, after = (
            {one for line in each.open_lines for one in line.request_ids} for each in (found.record, record)
        )
        args = [record.id, msgspec.json.encode(record), found.version, keep_s, len(after), len(before - after)]
        return bool(self._save(keys=[*self._keys(record), self._stats], args=args))

    def traffic(self) -> Traffic:
        """What is asked of the installation.

        Every request was admitted, and is in flight or answered; those of lines are in a record, or have ended.
        """
        pipe = self._client.pipeline(transaction=False)
        pipe.hlen(self._inflight).hmget(self._stats, "answered", "batch_requests_ended")
        open_ids = tuple(self.open_ids())
        for batch_id in open_ids:
            pipe.hget(self._key(batch_id), "in_queue")
        in_flight, (answered, ended), *queued = pipe.execute()
        own = sum(int(one or 0) for one in queued)
        return Traffic(open_ids, own, in_flight + int(answered or 0) - int(ended or 0) - own)

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled; its runner does it."""
        self._cancel(keys=[self._key(batch_id)], args=[int(time.time())])

    def _read(self, batch_ids: list[str]) -> list[Versioned | None]:
        pipe = self._client.pipeline(transaction=False)
        for batch_id in batch_ids:
            pipe.hmget(self._key(batch_id), "record", "version", "cancelling_at")
        return [
            None if raw is None else Versioned(_decode(raw), int(version), None if asked is None else int(asked))
            for raw, version, asked in pipe.execute()
        ]

    def _key(self, batch_id: str) -> str:
        return f"{self._prefix}:batch:{batch_id}"

    def _of(self, tenant: str) -> str:
        return f"{self._prefix}:batches-of:{tenant}"

    def _open_of(self, tenant: str) -> str:
        return f"{self._prefix}:batches-open-of:{tenant}"

    def _keys(self, record: BatchRecord) -> list[str]:
        return [self._key(record.id), self._of(record.tenant), self._open, self._open_of(record.tenant)]
