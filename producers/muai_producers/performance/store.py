"""Performance data in the state store: counts added by every process, read over any window, made coarser with age.

One hash per series and bucket of time. A process adds its counts with one script, which remembers how far it has come:
counts that are sent again because the answer got lost are not counted again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from muai_producers.performance.buckets import FINEST, Level, Span, levels, spans, to_make
from muai_producers.performance.series import Host, Series, Tally, read_member
from muai_producers.store import Store

WRITER_TTL_S = 600
FIELDS_PER_CALL = 4000
"""Bounds how long one call of the script may take."""
READS_PER_TRIP = 512
Buckets = Mapping[tuple[int, str], Tally]
"""By where the bucket of the finest level begins, and the series' member."""

# KEYS: how far the writer has come, the index of series. ARGV: number of this write, seconds to remember that; then per
# hash: its name, seconds to keep it, the series, when it was seen, number of fields, and they with their counts.
_WRITE = """
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then return 0 end
local at = 3
while ARGV[at] do
  local key, count = ARGV[at], tonumber(ARGV[at + 4])
  for i = at + 5, at + 3 + 2 * count, 2 do redis.call('HINCRBY', key, ARGV[i], ARGV[i + 1]) end
  redis.call('EXPIRE', key, ARGV[at + 1])
  redis.call('ZADD', KEYS[2], 'GT', ARGV[at + 3], ARGV[at + 2])
  at = at + 5 + 2 * count
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""


class PerformanceStore:
    """Reads and writes the data.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store, retention_s: int) -> None:
        self._client: Any = store.client
        self._prefix = f"{store.keys.prefix}:perf"
        self._index = f"{self._prefix}:series"
        self._made = f"{self._prefix}:made"
        self._writer = f"{self._prefix}:writer:{secrets.token_hex(8)}"
        self._write = self._client.register_script(_WRITE)
        self._number = 0
        self.levels: tuple[Level, ...] = levels(retention_s)

    def _bucket(self, size_s: int, start_s: int, member: str) -> str:
        return f"{self._prefix}:{size_s}:{start_s}:{member}"

    # -- writing -------------------------------------------------------------------------------------------------

    def calls(self, buckets: Buckets) -> list[list[Any]]:
        """The calls that add these counts, to be made by `call` in this order. One thread at a time may write."""
        calls: list[list[Any]] = []
        room = 0
        for (start_s, member), tally in buckets.items():
            flat = [part for pair in tally.fields() for part in pair]
            for first in range(0, len(flat), FIELDS_PER_CALL):
                part = flat[first : first + FIELDS_PER_CALL]
                if room < len(part):
                    self._number += 1
                    calls.append([self._number, WRITER_TTL_S])
                    room = FIELDS_PER_CALL
                key = self._bucket(FINEST.size_s, start_s, member)
                seen_s = start_s + FINEST.size_s
                calls[-1] += (key, FINEST.keep_s, member, seen_s, len(part) // 2, *part)
                room -= len(part)
        return calls

    def call(self, call: Sequence[Any]) -> None:
        """Make a call, or make it again: it counts once."""
        self._write(keys=[self._writer, self._index], args=call)

    # -- reading -------------------------------------------------------------------------------------------------

    def made(self) -> dict[int, int]:
        """By size, up to when a level's buckets have been made."""
        return {int(size): int(end_s) for size, end_s in self._client.hgetall(self._made).items()}

    def members(self, since_s: float) -> list[Series | Host]:
        """The series that were seen since then."""
        found = self._client.zrangebyscore(self._index, f"({since_s}", "+inf")
        read = (read_member(member.decode()) for member in found)
        return [one for one in read if one is not None]

    def read(self, since_s: float, now_s: float, wanted: Iterable[Series | Host]) -> tuple[dict[str, Tally], float]:
        """What was counted of each series in a window, and where the window begins, widened to its first bucket."""
        window = spans(since_s, now_s, self.made(), self.levels)
        members = [one.member for one in wanted]
        tallies = {member: Tally() for member in members}
        places = [
            (member, self._bucket(span.size_s, start_s, member))
            for span in window
            for start_s in span.starts()
            for member in members
        ]
        for (member, _), fields in zip(places, self._hashes([key for _, key in places]), strict=True):
            tallies[member].add_fields(fields)
        return tallies, float(window[0].start_s)

    def each(self, since_s: float, now_s: float, member: str, level: Level) -> list[tuple[int, Tally]]:
        """A series bucket by bucket, of those that hold anything: none coarser than `level`, and finer ones where that
        is not made yet."""
        window = spans(since_s, now_s, self.made(), self.levels[: self.levels.index(level) + 1])
        places = [(start_s, span.size_s) for span in window for start_s in span.starts()]
        keys = [self._bucket(size_s, start_s, member) for start_s, size_s in places]
        found = []
        for (start_s, _), fields in zip(places, self._hashes(keys), strict=True):
            if fields:
                tally = Tally()
                tally.add_fields(fields)
                found.append((start_s, tally))
        return found

    def _hashes(self, keys: Sequence[str]) -> Iterable[Mapping[bytes, bytes]]:
        for first in range(0, len(keys), READS_PER_TRIP):
            pipe = self._client.pipeline(transaction=False)
            for key in keys[first : first + READS_PER_TRIP]:
                pipe.hgetall(key)
            yield from pipe.execute()

    # -- keeping house -------------------------------------------------------------------------------------------

    def roll_up(self, now_s: float) -> int:
        """Add finished buckets up into coarser ones; returns how many were made. Doing it again changes nothing."""
        made, count = self.made(), 0
        for below, level in zip(self.levels, self.levels[1:], strict=False):
            starts = to_make(level, below, made, now_s)
            if not starts:
                continue
            members = [one.member for one in self.members(starts[0])]
            for start_s in starts:
                count += self._make(level, below, start_s, members)
            made[level.size_s] = starts[-1] + level.size_s
            self._client.hset(self._made, level.size_s, made[level.size_s])
        return count

    def _make(self, level: Level, below: Level, start_s: int, members: Sequence[str]) -> int:
        inner = Span(below.size_s, start_s, start_s + level.size_s)
        keys = [self._bucket(below.size_s, part_s, member) for member in members for part_s in inner.starts()]
        parts, count = iter(self._hashes(keys)), 0
        pipe = self._client.pipeline(transaction=True)
        for member in members:
            tally = Tally()
            for _ in inner.starts():
                tally.add_fields(next(parts))
            fields = dict(tally.fields())
            if fields:
                # Whole anew, not added to: a roll-up that is made again, or by two at once, counts nothing twice.
                key = self._bucket(level.size_s, start_s, member)
                pipe.delete(key)
                pipe.hset(key, mapping=fields)
                pipe.expire(key, level.keep_s)
                count += 1
        pipe.execute()
        return count

    def forget_dead(self, now_s: float) -> int:
        """Drop the names of series whose data have all expired; returns how many."""
        return int(self._client.zremrangebyscore(self._index, "-inf", now_s - self.levels[-1].keep_s))
