"""Who may find whose prompts in a prefix cache that an engine shares among all requests."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

MAX_KNOWN = 100_000


class CacheSalts:
    """A secret for each conversation, and one for the rest of each tenant's requests. Thread-safe.

    What is computed under one secret is found under that alone: so nobody finds, or learns from the time an answer
    takes, what another tenant or another conversation has asked. A conversation that has ended gets a new secret should
    its name come back; what was kept of it is out of reach, and goes when room is needed. The same holds for what was
    not heard of for longest where there are more than `MAX_KNOWN`.
    """

    def __init__(self) -> None:
        self._salts: OrderedDict[tuple[str, str | None], str] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tenant: str, conversation_id: str | None) -> str:
        """The secret to compute a request under."""
        key = (tenant, conversation_id)
        with self._lock:
            salt = self._salts.setdefault(key, secrets.token_hex(16))
            self._salts.move_to_end(key)
            if len(self._salts) > MAX_KNOWN:
                self._salts.popitem(last=False)
            return salt

    def forget(self, tenant: str, conversation_id: str) -> None:
        """The conversation has ended."""
        with self._lock:
            self._salts.pop((tenant, conversation_id), None)
