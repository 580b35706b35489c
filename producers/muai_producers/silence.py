"""Connections to Redis that learn from one another that the network has gone silent.

A firewall that has forgotten its connections befalls all of them at once, and tells nobody. Each would find out for
itself, by a time-out of its own, one after the other: seconds of a loop that stands still. Here the first one says it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import redis
from redis.connection import AbstractConnection

_silent_s: dict[tuple[Any, ...], float] = {}
"""Monotonic moment of the last reply that stayed away, by server."""

if TYPE_CHECKING:
    _Base = AbstractConnection
else:
    _Base = object


class _Heeding(_Base):
    """Taken out of its pool, a connection that has not heard since another one waited in vain is made anew."""

    _heard_s = 0.0

    def connect(self) -> Any:
        if self.is_connected and self._heard_s < _silent_s.get(self._server(), 0.0):
            self.disconnect()  # type: ignore[no-untyped-call]
        return super().connect()  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = super().read_response(*args, **kwargs)
        except redis.TimeoutError:
            _silent_s[self._server()] = time.monotonic()
            raise
        self._heard_s = time.monotonic()
        return response

    def _server(self) -> tuple[Any, ...]:
        # A Unix socket has a path instead; a connection by Sentinel knows its host once it has one.
        return tuple(getattr(self, name, None) for name in ("host", "port", "path"))


def heeding(base: type[AbstractConnection]) -> type[AbstractConnection]:
    """A kind of connection of redis-py that heeds what the others of this process have found out."""
    return cast("type[AbstractConnection]", type(f"Heeding{base.__name__}", (_Heeding, base), {}))
