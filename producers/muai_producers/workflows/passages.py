"""Documents, cut into passages: kept by tenant and collection, with a log of changes that indexes follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from muai_producers.errors import InvalidRequestError

BATCH = 500


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a document, as answers cite it."""

    id: str
    """Of the document and the place in it: `guide#3`."""
    document_id: str
    title: str
    text: str
    url: str = ""
    vector: bytes = b""
    """Its embedding, fp32, little-endian."""


class Changes(msgspec.Struct, frozen=True):
    """What happened to a collection since a version."""

    version: int
    added: list[Passage]
    removed: list[str]


class Passages(Protocol):
    """Keeps passages. A document that is put again replaces its older self."""

    def put(self, tenant: str, collection: str, passages: Sequence[Passage], max_passages: int) -> None:
        """Keep the passages of whole documents.

        Raises:
            InvalidRequestError: the collection would have more than `max_passages`; nothing was kept.
        """
        ...

    def changes(self, tenant: str, collection: str, since: int) -> Changes:
        """What changed after version `since`; 0 gives everything."""
        ...

    def remove(self, tenant: str, collection: str, document_id: str) -> int:
        """Forget a document; returns how many passages it had."""
        ...


def check_room(have: int, more: int, max_passages: int, collection: str) -> None:
    """Raise when `more` passages do not fit."""
    if have + more > max_passages:
        raise InvalidRequestError(
            f"collection {collection!r} has {have} passages, {more} more do not fit: workflows.max_passages is "
            f"{max_passages}",
            {"collection": collection, "passages": have, "max_passages": max_passages},
        )


class MemoryPassages:
    """Of this process alone."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], dict[str, Passage]] = {}
        self._log: dict[tuple[str, str], list[str]] = {}
        self._lock = threading.Lock()

    def put(self, tenant: str, collection: str, passages: Sequence[Passage], max_passages: int) -> None:
        """See `Passages.put`."""
        with self._lock:
            kept = self._kept.setdefault((tenant, collection), {})
            documents = {passage.document_id for passage in passages}
            older = [one.id for one in kept.values() if one.document_id in documents]
            check_room(len(kept) - len(older), len(passages), max_passages, collection)
            for passage_id in older:
                del kept[passage_id]
            kept.update({passage.id: passage for passage in passages})
            log = self._log.setdefault((tenant, collection), [])
            log += older
            log += [passage.id for passage in passages]

    def changes(self, tenant: str, collection: str, since: int) -> Changes:
        """See `Passages.changes`."""
        with self._lock:
            log = self._log.get((tenant, collection), [])
            kept = self._kept.get((tenant, collection), {})
            changed = dict.fromkeys(log[since:])
            added = [kept[one] for one in changed if one in kept]
            return Changes(len(log), added, [one for one in changed if one not in kept])

    def remove(self, tenant: str, collection: str, document_id: str) -> int:
        """See `Passages.remove`."""
        with self._lock:
            kept = self._kept.get((tenant, collection), {})
            gone = [one.id for one in kept.values() if one.document_id == document_id]
            for passage_id in gone:
                del kept[passage_id]
            self._log.setdefault((tenant, collection), []).extend(gone)
            return len(gone)


# KEYS: passages (hash), documents (hash: id → its passages' ids), versions (zset: id → version), counter.
# ARGV: most passages, number of documents, then for each: id, number of passages, and id and passage of each.
# Returns {1} or {0, passages there, passages more}.
_PUT = """
local at, more, older = 3, 0, 0
for d = 1, tonumber(ARGV[2]) do
  local before = redis.call('HGET', KEYS[2], ARGV[at])
  if before then older = older + #cjson.decode(before) end
  local n = tonumber(ARGV[at + 1])
  more, at = more + n, at + 2 + 2 * n
end
local have = redis.call('HLEN', KEYS[1]) - older
if have + more > tonumber(ARGV[1]) then return {0, have, more} end
at = 3
for d = 1, tonumber(ARGV[2]) do
  local document, n, ids = ARGV[at], tonumber(ARGV[at + 1]), {}
  local version = redis.call('INCR', KEYS[4])
  local before = redis.call('HGET', KEYS[2], document)
  if before then
    for _, id in ipairs(cjson.decode(before)) do
      redis.call('HDEL', KEYS[1], id)
      redis.call('ZADD', KEYS[3], version, id)
    end
  end
  for i = 0, n - 1 do
    local id = ARGV[at + 2 + 2 * i]
    redis.call('HSET', KEYS[1], id, ARGV[at + 3 + 2 * i])
    redis.call('ZADD', KEYS[3], version, id)
    ids[#ids + 1] = id
  end
  if n > 0 then redis.call('HSET', KEYS[2], document, cjson.encode(ids))
  else redis.call('HDEL', KEYS[2], document) end
  at = at + 2 + 2 * n
end
return {1}
"""


class RedisPassages:
    """In the state store: any number of control workers keep indexes over one collection."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._put = client.register_script(_PUT)

    def _keys(self, tenant: str, collection: str) -> list[str]:
        base = f"{self._prefix}:passages:{tenant}\t{collection}"
        return [base, f"{base}:documents", f"{base}:versions", f"{base}:version"]

    def put(self, tenant: str, collection: str, passages: Sequence[Passage], max_passages: int) -> None:
        """See `Passages.put`."""
        by_document: dict[str, list[Passage]] = {}
        for passage in passages:
            by_document.setdefault(passage.document_id, []).append(passage)
        self._write(tenant, collection, by_document, max_passages)

    def _write(self, tenant: str, collection: str, by_document: dict[str, list[Passage]], max_passages: int) -> None:
        args: list[Any] = [max_passages, len(by_document)]
        for document_id, passages in by_document.items():
            args += (document_id, len(passages))
            for passage in passages:
                args += (passage.id, msgspec.msgpack.encode(passage))
        reply = self._put(keys=self._keys(tenant, collection), args=args)
        if not reply[0]:
            check_room(int(reply[1]), int(reply[2]), max_passages, collection)

    def changes(self, tenant: str, collection: str, since: int) -> Changes:
        """See `Passages.changes`."""
        passages_key, _, versions_key, counter_key = self._keys(tenant, collection)
        version = int(self._client.get(counter_key) or 0)
        if version == since:
            return Changes(version, [], [])
        ids = [raw.decode() for raw in self._client.zrangebyscore(versions_key, f"({since}", version)]
        added: list[Passage] = []
        removed: list[str] = []
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            for passage_id, raw in zip(chunk, self._client.hmget(passages_key, chunk), strict=True):
                if raw is None:
                    removed.append(passage_id)
                else:
                    added.append(msgspec.msgpack.decode(raw, type=Passage))
        return Changes(version, added, removed)

    def remove(self, tenant: str, collection: str, document_id: str) -> int:
        """See `Passages.remove`."""
        raw = self._client.hget(self._keys(tenant, collection)[1], document_id)
        self._write(tenant, collection, {document_id: []}, 2**53)
        return 0 if raw is None else len(msgspec.json.decode(raw))


def cut(text: str, words: int) -> list[str]:
    """Cut a text into passages of about `words` words, at ends of sentences where there are any near."""
    passages: list[str] = []
    current: list[str] = []
    for word in text.split():
        current.append(word)
        ends_sentence = word[-1] in ".!?…"
        if len(current) >= words or (ends_sentence and len(current) >= words * 3 // 4):
            passages.append(" ".join(current))
            current = []
    if current:
        passages.append(" ".join(current))
    return passages
