"""The requests that were answered last: what a console shows of them."""

from __future__ import annotations

from typing import Any

import msgspec

from muai_producers.store import Store

MAX_RECENT = 100
"""Kept by the script that writes answers, of all tenants and of each."""
MAX_META_BYTES = 65_536
"""A larger result is not read for a list: that would cost more than it tells."""
# KEYS: the list. ARGV: how many, most bytes of a stored state. Answers with a line and what is stored of it, in turn:
# the state, its length where it is too long, or nothing where it has expired.
_READ = """
local found = {}
for _, line in ipairs(redis.call('LRANGE', KEYS[1], 0, tonumber(ARGV[1]) - 1)) do
  local key = 'celery-task-meta-' .. string.match(line, '^[^\\t]*')
  local length = redis.call('STRLEN', key)
  found[#found + 1] = line
  if length > tonumber(ARGV[2]) then found[#found + 1] = length
  else found[#found + 1] = redis.call('GET', key) or '' end
end
return found
"""


class Told(msgspec.Struct, frozen=True):
    """What of a result a list shows; outputs are passed over."""

    engine_used: str = ""
    latency_ms: float | None = None
    batch_size: int | None = None
    code: str = ""
    """Of a failure."""
    exc_message: tuple[str, dict[str, Any]] | None = None


class StoredSummary(msgspec.Struct, frozen=True):
    """A stored state, no more of it than a list shows."""

    status: str
    result: Told | None = None
    date_done: str | None = None


class RecentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was answered lately."""

    id: str
    tenant: str
    """'' where it was not admitted by a client or gateway of ours."""
    model: str
    """As `tenant`."""
    admitted_at: float | None
    """Wall-clock seconds since the epoch, whole ones; None as `tenant`."""
    summary: StoredSummary | None
    """None where the result is too large to be read for a list."""


class _StoredStatus(msgspec.Struct, frozen=True):
    status: str
    date_done: str | None = None


_decode_summary = msgspec.json.Decoder(StoredSummary).decode
_decode_status = msgspec.json.Decoder(_StoredStatus).decode


def _decode(state: bytes) -> StoredSummary:
    """A stored state; of a result that has another form than ours, its state alone."""
    try:
        return _decode_summary(state)
    except msgspec.ValidationError:
        bare = _decode_status(state)
        return StoredSummary(bare.status, date_done=bare.date_done)


class Recent:
    """Reads the lists.

    Raises:
        redis.exceptions.RedisError: the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._key = store.keys.recent

    def newest(self, limit: int, tenant: str | None = None) -> list[RecentRequest]:
        """Newest first, without those whose results have expired.

        Args:
            tenant: whose; None: everybody's.
        """
        key = self._key if tenant is None else f"{self._key}:{tenant}"
        flat = self._client.eval(_READ, 1, key, min(limit, MAX_RECENT), MAX_META_BYTES)
        return [_read(line, state) for line, state in zip(flat[::2], flat[1::2], strict=True) if state != b""]


def _read(line: bytes, state: bytes | int) -> RecentRequest:
    request_id, *entry = line.decode().split("\t")
    tenant, model, _, admitted_s = entry if len(entry) == 4 else ("", "", "", "")
    return RecentRequest(
        id=request_id,
        tenant=tenant,
        model=model,
        admitted_at=float(admitted_s) if admitted_s else None,
        summary=None if isinstance(state, int) else _decode(state),
    )
