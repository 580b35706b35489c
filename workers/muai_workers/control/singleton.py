"""One run at a time, fleet-wide, of a task that several control workers may be asked to run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@contextmanager
def singleton(client: Any, key: str, ttl_s: float) -> Iterator[bool]:
    """Yield whether this caller may run; the claim ends with the block, or after `ttl_s` if its process dies."""
    token = secrets.token_hex(8)
    is_ours = bool(client.set(key, token, nx=True, px=int(ttl_s * 1000)))
    try:
        yield is_ours
    finally:
        if is_ours:
            client.eval(_RELEASE, 1, key, token)
