"""Streams in Redis: one Redis Stream per request, written by whoever holds the request now and by nobody else.

A worker claims the streams of a batch when it begins to run it. From then on what an earlier holder still writes is
refused: one that was stopped for long and woke up does not know that its work went to another. Nor is anything written
once the request has its terminal result, from which readers take whatever the stream lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.store import Store

MAX_ENTRIES = 1_000_000
"""An entry holds at least one token of the text as it stands, and no request may ask for more tokens than this
(`Parameters.max_tokens`): so no text of an answer within the limits is trimmed."""

# What a stream's holder is known by lies beside it: the token of its claim, and the number of its next write, so that a
# write whose answer got lost can be repeated. ARGV: prefix, token, ttl_s, then ids.
CLAIM = """
local found = {}
for i = 4, #ARGV do
  local stream = ARGV[1] .. ARGV[i]
  local owner = stream .. ':owner'
  redis.call('HSET', owner, 'token', ARGV[2], 'next', 0)
  redis.call('EXPIRE', owner, ARGV[3])
  found[#found + 1] = redis.call('XRANGE', stream, '-', '+')
end
return found
"""

# ARGV: prefix, ttl_s of streams, ttl_s of owners, most entries, then six per write: id, token, number, kind ('+' more
# text, '!' a new beginning, 'x' nothing more will come), characters before, text. Returns 1 for each write that stands,
# 0 for each that was refused. A new beginning makes all before it void, so only it is kept.
APPEND = """
local prefix, written = ARGV[1], {}
for i = 5, #ARGV, 6 do
  local id, token, number, kind = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
  local stream = prefix .. id
  local owner = stream .. ':owner'
  local held = redis.call('HMGET', owner, 'token', 'next')
  local is_holder = held[1] == token
  if kind == 'x' then
    if is_holder then redis.call('DEL', owner) end
    written[#written + 1] = 1
  elseif not is_holder then
    written[#written + 1] = 0
  elseif number < tonumber(held[2]) then
    written[#written + 1] = 1
  else
    local state = redis.call('GETRANGE', 'celery-task-meta-' .. id, 11, 13)
    if state == 'SUC' or state == 'FAI' or state == 'REV' then
      redis.call('DEL', owner)
      written[#written + 1] = 0
    else
      redis.call('XADD', stream, 'MAXLEN', '~', ARGV[4], '*', 'k', kind, 'p', ARGV[i + 4], 't', ARGV[i + 5])
      if kind == '!' then redis.call('XTRIM', stream, 'MAXLEN', 1) end
      redis.call('EXPIRE', stream, ARGV[2])
      redis.call('HSET', owner, 'next', number + 1)
      redis.call('EXPIRE', owner, ARGV[3])
      redis.call('PUBLISH', stream, '')
      written[#written + 1] = 1
    end
  end
end
return written
"""
MORE, RESTART, CLOSE = "+", "!", "x"


class Entry(NamedTuple):
    """A piece of text as it lies in the stream."""

    restarts: bool
    chars_before: int
    text: str


@dataclass(frozen=True)
class Write:
    """One entry on its way into a stream."""

    request_id: str
    token: str
    number: int
    """Counts the writes of one claim, from 0."""
    kind: str
    chars_before: int = 0
    text: str = ""


def read_entry(fields: dict[bytes, bytes]) -> Entry:
    """An entry from its fields."""
    text = fields[b"t"].decode("utf-8", "surrogatepass")
    return Entry(fields[b"k"] == RESTART.encode(), int(fields[b"p"]), text)


def joined(entries: Sequence[Entry]) -> str | None:
    """The text of all entries of a stream; None when its beginning is lost."""
    texts: list[str] = []
    num_chars = 0
    for entry in entries:
        if entry.restarts:
            texts, num_chars = [], 0
        if entry.chars_before != num_chars:
            return None
        texts.append(entry.text)
        num_chars += len(entry.text)
    return "".join(texts)


class StreamStore:
    """Streams' operations, each one round trip for any number of requests.

    Args:
        ttl_s: how long a stream is kept after the last that was added to it.
    Raises:
        redis.exceptions.RedisError: from every method, when the state store does not answer.
    """

    def __init__(self, store: Store, *, ttl_s: int) -> None:
        self._prefix = store.keys.stream("")
        self._ttl_s = ttl_s
        self._owner_ttl_s = store.result_ttl_s
        self._claim = store.client.register_script(CLAIM)
        self._append = store.client.register_script(APPEND)

    @classmethod
    def under(cls, settings: Settings, store: Store) -> StreamStore:
        """Streams as the configuration wants them kept."""
        return cls(store, ttl_s=settings.queue.stream_ttl_s)

    def claim(self, token: str, request_ids: Sequence[str]) -> list[str | None]:
        """Become the holder of streams, whoever held them before.

        Returns:
            what each of them holds by now; None where its beginning is lost.
        """
        found = self._claim(keys=[], args=[self._prefix, token, self._owner_ttl_s, *request_ids])
        return [joined([read_entry(_pairs(fields)) for _, fields in entries]) for entries in found]

    def append(self, writes: Sequence[Write]) -> list[bool]:
        """Add to streams; False for each write that was refused, as will be all that follow it under its token.

        A write may be repeated when its answer got lost.
        """
        args: list[Any] = [self._prefix, self._ttl_s, self._owner_ttl_s, MAX_ENTRIES]
        for write in writes:
            text = write.text.encode("utf-8", "surrogatepass")
            args += (write.request_id, write.token, write.number, write.kind, write.chars_before, text)
        return [bool(flag) for flag in self._append(keys=[], args=args)]


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Fields as a script gives them: names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
