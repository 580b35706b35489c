"""What was said in a conversation before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

Turns = list[dict[str, str]]
"""Role and content of each turn, oldest first."""

# KEYS: list, set of runs. ARGV: run, ttl_s, turns kept, then the turns. A run that is repeated adds nothing.
_APPEND = """
if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then return 0 end
for i = 4, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('LTRIM', KEYS[1], -tonumber(ARGV[3]), -1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
"""
KEPT_TURNS = 10_000


class History(Protocol):
    """The turns of conversations, by tenant and conversation."""

    def turns(self, tenant: str, conversation_id: str, limit: int) -> Turns:
        """The last `limit` turns."""
        ...

    def append(self, tenant: str, conversation_id: str, run_id: str, turns: Sequence[dict[str, str]]) -> None:
        """Add turns, once for each run."""
        ...

    def forget(self, tenant: str, conversation_id: str) -> None:
        """Forget a conversation; unknown ones do nothing."""
        ...


class MemoryHistory:
    """Of this process alone."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], Turns] = {}
        self._runs: set[tuple[str, str, str]] = set()
        self._lock = threading.Lock()

    def turns(self, tenant: str, conversation_id: str, limit: int) -> Turns:
        """See `History.turns`."""
        with self._lock:
            return self._turns.get((tenant, conversation_id), [])[-limit:] if limit else []

    def append(self, tenant: str, conversation_id: str, run_id: str, turns: Sequence[dict[str, str]]) -> None:
        """See `History.append`."""
        with self._lock:
            if (tenant, conversation_id, run_id) not in self._runs:
                self._runs.add((tenant, conversation_id, run_id))
                kept = self._turns.setdefault((tenant, conversation_id), [])
                kept += turns
                del kept[:-KEPT_TURNS]

    def forget(self, tenant: str, conversation_id: str) -> None:
        """See `History.forget`."""
        with self._lock:
            self._turns.pop((tenant, conversation_id), None)
            self._runs = {run for run in self._runs if run[:2] != (tenant, conversation_id)}


class RedisHistory:
    """In the state store, for every control worker.

    Args:
        ttl_s: how long a silent conversation is kept.
    """

    def __init__(self, client: Any, prefix: str, ttl_s: int) -> None:
        self._client = client
        self._prefix = prefix
        self._ttl_s = ttl_s

    def _key(self, tenant: str, conversation_id: str) -> str:
        # A tab cannot stand in a name, so no two pairs have one key.
        return f"{self._prefix}:conversation:{tenant}\t{conversation_id}"

    def turns(self, tenant: str, conversation_id: str, limit: int) -> Turns:
        """See `History.turns`."""
        if not limit:
            return []
        raw = self._client.lrange(self._key(tenant, conversation_id), -limit, -1)
        return [msgspec.json.decode(turn) for turn in raw]

    def append(self, tenant: str, conversation_id: str, run_id: str, turns: Sequence[dict[str, str]]) -> None:
        """See `History.append`."""
        key = self._key(tenant, conversation_id)
        encoded = [msgspec.json.encode(turn) for turn in turns]
        self._client.eval(_APPEND, 2, key, f"{key}:runs", run_id, self._ttl_s, KEPT_TURNS, *encoded)

    def forget(self, tenant: str, conversation_id: str) -> None:
        """See `History.forget`."""
        key = self._key(tenant, conversation_id)
        self._client.delete(key, f"{key}:runs")
