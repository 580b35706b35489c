"""Names of the Redis keys that hold the transport's state."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_STATE_PREFIX = "muai:transport"


@dataclass(frozen=True)
class StateKeys:
    """The state's keys under one prefix (the broker's `global_keyprefix` included).

    `beats`: hash, consumer → number of heartbeats; negative once its claims are being taken back.
    `floors`: hash, consumer → highest tag that a claim of this consumer may no longer use.
    `deliveries`: hash, sha1 of a payload → consumers that died holding it.
    `undecodable`: list of payloads that are not kombu messages.
    """

    prefix: str = DEFAULT_STATE_PREFIX

    @property
    def beats(self) -> str:
        return f"{self.prefix}:beats"

    @property
    def floors(self) -> str:
        return f"{self.prefix}:floors"

    @property
    def deliveries(self) -> str:
        return f"{self.prefix}:deliveries"

    @property
    def undecodable(self) -> str:
        return f"{self.prefix}:undecodable"

    def claims(self, consumer: str) -> str:
        """Hash, tag → netstring of the list's key followed by the payload, of what `consumer` holds."""
        return f"{self.prefix}:claims:{consumer}"
