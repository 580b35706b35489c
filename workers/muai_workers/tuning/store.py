"""What the tuner remembers, in the state store: its state, what it learnt, what it decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from muai_producers.store import Store
from muai_workers.tuning.records import Knowledge, Place, TunerState, TuningEvent

KEPT_EVENTS = 1000

# KEYS: state, history, knowledge. ARGV: the state as it was read ('' for none), the new one, most events, number of
# events and they, oldest first, then place and knowledge of each that was learnt.
_COMMIT = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
local at = 5
for _ = 1, tonumber(ARGV[4]) do
  redis.call('LPUSH', KEYS[2], ARGV[at])
  at = at + 1
end
redis.call('LTRIM', KEYS[2], 0, tonumber(ARGV[3]) - 1)
while ARGV[at] do
  redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1])
  at = at + 2
end
return 1
"""


class TuningStore:
    """Reads and writes it.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        prefix = f"{store.keys.prefix}:tuner"
        self._keys = [f"{prefix}:state", f"{prefix}:history", f"{prefix}:knowledge"]
        self._commit = self._client.register_script(_COMMIT)

    def state(self) -> tuple[TunerState, bytes]:
        """The state; and the bytes that `commit` wants back. One of another version of this program is as none."""
        raw: bytes = self._client.get(self._keys[0]) or b""
        try:
            return (msgspec.json.decode(raw, type=TunerState) if raw else TunerState()), raw
        except msgspec.ValidationError:
            return TunerState(), raw

    def commit(
        self,
        seen: bytes,
        state: TunerState,
        events: Sequence[TuningEvent] = (),
        learnt: Sequence[tuple[Place, Knowledge]] = (),
    ) -> bytes | None:
        """Write what was decided; returns what to hand to the next `commit`. None, and nothing written, when another
        has written since `seen`."""
        raw = msgspec.json.encode(state)
        args: list[Any] = [seen, raw, KEPT_EVENTS, len(events), *(msgspec.json.encode(event) for event in events)]
        for place, knowledge in learnt:
            args += (place.key, msgspec.json.encode(knowledge))
        return raw if self._commit(keys=self._keys, args=args) else None

    def knowledge(self, place: Place) -> Knowledge | None:
        """What was learnt of a place."""
        raw = self._client.hget(self._keys[2], place.key)
        return None if raw is None else _knowledge(raw)

    def all_knowledge(self) -> dict[str, Knowledge]:
        """What was learnt of every place, by `Place.key`."""
        found = {name.decode(): _knowledge(raw) for name, raw in self._client.hgetall(self._keys[2]).items()}
        return {name: known for name, known in sorted(found.items()) if known is not None}

    def forget(self) -> None:
        """Forget all that was learnt: the next trials begin anew."""
        self._client.delete(self._keys[2])

    def history(self, count: int = 100) -> list[TuningEvent]:
        """The last decisions, newest first."""
        return [msgspec.json.decode(raw, type=TuningEvent) for raw in self._client.lrange(self._keys[1], 0, count - 1)]


def _knowledge(raw: bytes) -> Knowledge | None:
    try:
        return msgspec.json.decode(raw, type=Knowledge)
    except msgspec.ValidationError:
        return None  # of another version of this program
