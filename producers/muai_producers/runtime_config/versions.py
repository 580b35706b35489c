"""The versions of the runtime configuration, in the state store: each a whole, written once, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from muai_producers.errors import ConfigConflictError, UnknownVersionError
from muai_producers.store import Store

KEPT_VERSIONS = 1000
MAX_TEXT = 500
"""Characters of who and why that are kept."""
APPLIED_S = 30
"""How long a process's word on what it applies counts; it is renewed three times in that time."""

# KEYS: versions, channel. ARGV: the version that the new one was made from, the new one, kept versions.
_ADVANCE = """
local current = redis.call('HGET', KEYS[1], 'current') or '0'
if current ~= ARGV[1] then return {0, current} end
local number = tonumber(current) + 1
redis.call('HSET', KEYS[1], 'v' .. number, ARGV[2], 'current', number)
redis.call('HDEL', KEYS[1], 'v' .. (number - tonumber(ARGV[3])))
redis.call('PUBLISH', KEYS[2], number)
return {1, tostring(number)}
"""

# KEYS: applied. ARGV: process, what it applies. Entries carry the store's clock: hosts' clocks need not agree.
_TELL = """
local time = redis.call('TIME')
return redis.call('HSET', KEYS[1], ARGV[1], time[1] .. '\\t' .. ARGV[2])
"""

# KEYS: applied. ARGV: seconds that an entry counts. Forgets the entries that are older.
_READ = """
local now, found = tonumber(redis.call('TIME')[1]), {}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  local at, rest = string.match(entries[i + 1], '^(%d+)\\t(.*)$')
  if at and now - tonumber(at) <= tonumber(ARGV[1]) then
    found[#found + 1] = entries[i]
    found[#found + 1] = rest
  else
    redis.call('HDEL', KEYS[1], entries[i])
  end
end
return found
"""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried on one process before all have it."""

    process: str
    overrides: dict[str, Any]
    """Of this process alone, over those of all."""


class ConfigVersion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of the runtime configuration."""

    number: int = 0
    """Counted from 1; 0: nothing was ever changed."""
    overrides: dict[str, Any] = {}
    """All that differs from what files and environments say, by dotted key."""
    changed: dict[str, Any] = {}
    """What this version changed: the new values."""
    removed: tuple[str, ...] = ()
    """The keys that go by files and environments again."""
    restores: int | None = None
    """The version that this one went back to."""
    at: float = 0.0
    """Wall-clock seconds since the epoch."""
    by: str = ""
    why: str = ""
    canary: Canary | None = None
    """A trial that lasts until the next version, whoever makes it."""

    def overrides_of(self, process: str) -> dict[str, Any]:
        """What one process works by."""
        if self.canary is None or self.canary.process != process:
            return self.overrides
        return {**self.overrides, **self.canary.overrides}


class Applied(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which version a process works by."""

    process: str
    version: int
    wanted: int = 0
    """The version that it could not apply; 0: it has none but `version`."""
    error: str = ""
    """Why it could not."""


@dataclass(frozen=True)
class ConfigKeys:
    """Names in Redis."""

    prefix: str

    @property
    def versions(self) -> str:
        return f"{self.prefix}:config"

    @property
    def channel(self) -> str:
        """Where the number of each new version is told."""
        return f"{self.prefix}:config:news"

    @property
    def applied(self) -> str:
        return f"{self.prefix}:config:applied"


NOTHING = ConfigVersion()


class ConfigVersions:
    """Reads and writes versions, and what processes say of them.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self.keys = ConfigKeys(store.keys.prefix)
        self._advance = self._client.register_script(_ADVANCE)
        self._tell = self._client.register_script(_TELL)
        self._read = self._client.register_script(_READ)

    def current_number(self) -> int:
        """The number of the latest version; 0 where there is none."""
        return int(self._client.hget(self.keys.versions, "current") or 0)

    def current(self) -> ConfigVersion:
        """The latest version."""
        number = self.current_number()
        return self.version(number) if number else NOTHING

    def version(self, number: int) -> ConfigVersion:
        """A version by its number; 0 is the state before the first.

        Raises:
            UnknownVersionError: there is none, or it is too old to be kept.
        """
        if number == 0:
            return NOTHING
        raw = self._client.hget(self.keys.versions, f"v{number}")
        if raw is None:
            raise UnknownVersionError(
                f"there is no version {number} of the runtime configuration; `muai config history` lists them",
                {"version": number},
            )
        return msgspec.json.decode(raw, type=ConfigVersion)

    def history(self, count: int = 20) -> list[ConfigVersion]:
        """The latest versions, newest first."""
        current = self.current_number()
        numbers = range(current, max(0, current - count), -1)
        found = self._client.hmget(self.keys.versions, [f"v{number}" for number in numbers]) if numbers else []
        return [msgspec.json.decode(raw, type=ConfigVersion) for raw in found if raw is not None]

    def advance(self, version: ConfigVersion) -> None:
        """Make a version the latest, and tell everybody.

        Raises:
            ConfigConflictError: another one was made meanwhile; nothing was written.
        """
        made_from = version.number - 1
        done, current = self._advance(
            keys=[self.keys.versions, self.keys.channel],
            args=[made_from, msgspec.json.encode(version), KEPT_VERSIONS],
        )
        if not done:
            raise ConfigConflictError(
                f"the runtime configuration is at version {int(current)} by now, not {made_from}: look, and try again",
                {"version": int(current), "expected": made_from},
            )

    def tell_applied(self, applied: Applied) -> None:
        """Say which version a process works by."""
        self._tell(keys=[self.keys.applied], args=[applied.process, msgspec.json.encode(applied)])

    def forget_applied(self, process: str) -> None:
        """A process is going."""
        self._client.hdel(self.keys.applied, process)

    def applied(self) -> list[Applied]:
        """What every living process works by, by name."""
        flat = self._read(keys=[self.keys.applied], args=[APPLIED_S])
        return sorted(
            (msgspec.json.decode(raw, type=Applied) for raw in flat[1::2]), key=lambda applied: applied.process
        )


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What leads from one set of overrides to another: new values by key, and the keys that go."""
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    return changed, tuple(key for key in old if key not in new)
