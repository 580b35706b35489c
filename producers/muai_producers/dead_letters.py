"""Dead letters: what ended without a result through no wish of its sender, kept to be looked at and replayed."""

from __future__ import annotations

import base64
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from muai_producers.errors import InvalidRequestError, MuaiError
from muai_producers.monitoring import instruments
from muai_producers.monitoring.recorder import recorder
from muai_producers.store import Store
from muai_producers.wire import InferenceRequest

MAX_ENTRIES = 100_000
"""Older entries go first."""
PAGE = 500
MAX_RAW_BYTES = 64_000
_ENTRY_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
REPLAYS = uuid.UUID("6f3a6f0c-8c1b-5d0e-9a53-2f1f6b0f7d11")
# KEYS: the stream. ARGV: how many. Answers with each entry's id and, of its fields, those that a list shows.
_NEWEST = """
local shown = {request_id = 1, model = 1, code = 1, message = 1, attempts = 1, died_at = 1}
local found = {}
for _, entry in ipairs(redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])) do
  local fields = {}
  for i = 1, #entry[2], 2 do
    local name, value = entry[2][i], entry[2][i + 1]
    if not shown[name] then value = name == 'request' and '1' or '' end
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  found[#found + 1] = {entry[1], fields}
end
return found
"""


@dataclass(frozen=True)
class DeadLetter:
    """One entry. `request` is None for a message that is no request; then `raw` has its bytes (64,000 at most)."""

    entry_id: str
    request_id: str
    model: str
    code: str
    message: str
    attempts: list[dict[str, Any]]
    died_at: float
    """Wall-clock seconds since the epoch."""
    request: InferenceRequest | None
    raw: bytes


@dataclass(frozen=True)
class DeadLetterLine:
    """An entry as a list shows it: without the request, which may be large."""

    entry_id: str
    request_id: str
    model: str
    code: str
    message: str
    attempts: list[dict[str, Any]]
    died_at: float
    """Wall-clock seconds since the epoch."""
    is_request: bool
    """Whether it can be replayed."""


class DeadLetters:
    """The dead letters of one installation: a capped Redis stream in the state store.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._key = store.keys.dead

    def add(self, request: InferenceRequest, error: MuaiError) -> None:
        """Keep a request whose engines are spent, or that kills its workers."""
        self._append(
            request_id=request.id,
            model=request.model,
            error=error,
            content={"request": msgspec.json.encode(request)},
        )

    def add_message(self, request_id: str, body: bytes | str, error: MuaiError) -> None:
        """Keep a message that is no request: undecodable, of a refused content type, or for an unknown task."""
        raw = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else bytes(body)
        self._append(
            request_id=request_id, model="", error=error, content={"raw": base64.b64encode(raw[:MAX_RAW_BYTES])}
        )

    def _append(self, *, request_id: str, model: str, error: MuaiError, content: dict[str, bytes]) -> None:
        fields = {
            "request_id": request_id,
            "model": model,
            "code": error.code,
            "message": error.message[:2000],
            "attempts": msgspec.json.encode(error.details.get("attempts", [])),
            "died_at": repr(time.time()),
            **content,
        }
        self._client.xadd(self._key, fields, maxlen=MAX_ENTRIES, approximate=True)
        recorder.count(instruments.DIED, error.code)

    def __len__(self) -> int:
        return int(self._client.xlen(self._key))

    def newest(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """Newest first."""
        last, left = "+", limit if limit is not None else MAX_ENTRIES
        while left > 0:
            page = self._client.xrevrange(self._key, max=last, count=min(PAGE, left))
            for entry_id, fields in page:
                yield _letter(entry_id.decode(), fields)
            if len(page) < min(PAGE, left):
                return
            left -= len(page)
            last = f"({page[-1][0].decode()}"

    def lines(self, limit: int) -> list[DeadLetterLine]:
        """The newest entries as a list shows them, newest first."""
        return [
            _line(entry_id.decode(), dict(zip(flat[::2], flat[1::2], strict=True)))
            for entry_id, flat in self._client.eval(_NEWEST, 1, self._key, limit)
        ]

    def entries(self, entry_ids: Sequence[str]) -> list[DeadLetter]:
        """The entries of those ids that exist, in the order given.

        Raises:
            InvalidRequestError: an id is none of an entry.
        """
        if not all(_ENTRY_ID.fullmatch(entry_id) for entry_id in entry_ids):
            raise InvalidRequestError("an entry's id is two numbers with a dash between them", {"field": "entry"})
        pipe = self._client.pipeline(transaction=False)
        for entry_id in entry_ids:
            pipe.xrange(self._key, entry_id, entry_id)
        return [_letter(found.decode(), fields) for page in pipe.execute() for found, fields in page]

    def get(self, entry_ids: Sequence[str]) -> list[DeadLetter]:
        """The entries of those ids that exist; an entry's id or its request's."""
        wanted = set(entry_ids)
        return [letter for letter in self.newest() if letter.entry_id in wanted or letter.request_id in wanted]

    def remove(self, entry_ids: Sequence[str]) -> int:
        """Delete entries; returns how many there were."""
        return int(self._client.xdel(self._key, *entry_ids)) if entry_ids else 0

    def purge(self) -> int:
        """Delete all entries; returns how many there were."""
        count = len(self)
        self._client.delete(self._key)
        return count


def replayed(entry_id: str, request: InferenceRequest, deadline_s: float | None, now_s: float) -> InferenceRequest:
    """The request to submit for a dead letter.

    Its id follows from the entry's: a replay that is cut off between acceptance and the entry's removal, and then
    done again, submits the same request, not a second one. What belonged to the first sending alone (deadline,
    idempotency key, reply channel, trace) is left out.
    """
    return msgspec.structs.replace(
        request,
        id=str(uuid.uuid5(REPLAYS, f"{request.id} {entry_id}")),
        deadline=None if deadline_s is None else now_s + deadline_s,
        idempotency_key=None,
        reply_to=None,
        trace={},
        submitted_at=now_s,
    )


def _line(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetterLine:
    return DeadLetterLine(
        entry_id=entry_id,
        request_id=fields[b"request_id"].decode(),
        model=fields[b"model"].decode(),
        code=fields[b"code"].decode(),
        message=fields[b"message"].decode(),
        attempts=msgspec.json.decode(fields[b"attempts"]),
        died_at=float(fields[b"died_at"]),
        is_request=bool(fields.get(b"request")),
    )


def _letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    encoded = fields.get(b"request")
    return DeadLetter(
        entry_id=entry_id,
        request_id=fields[b"request_id"].decode(),
        model=fields[b"model"].decode(),
        code=fields[b"code"].decode(),
        message=fields[b"message"].decode(),
        attempts=msgspec.json.decode(fields[b"attempts"]),
        died_at=float(fields[b"died_at"]),
        request=msgspec.json.decode(encoded, type=InferenceRequest) if encoded else None,
        raw=base64.b64decode(fields.get(b"raw", b"")),
    )
