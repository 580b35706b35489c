"""What can go wrong with a claim. Connection errors stay those of redis-py, as kombu and Celery expect them."""

from __future__ import annotations

from collections.abc import Sequence


class TransportError(Exception):
    """Base of the errors that this transport raises itself."""


class LeaseLostError(TransportError):
    """Some claims are no longer held by this process, so nothing was changed.

    Another consumer has the messages, or will get them: whatever was computed for them must be thrown away.
    """

    def __init__(self, tags: Sequence[int]) -> None:
        shown = ", ".join(map(str, tags[:5])) + (", …" if len(tags) > 5 else "")
        super().__init__(f"{len(tags)} claim(s) no longer held by this consumer: {shown}")
        self.tags = tuple(tags)


class SettleCommandError(TransportError):
    """Redis refused one command of a settlement; the claims are still held.

    Commands before the refused one took effect: keep to commands that can only fail for want of the server.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"settlement stopped at command {index}: {reason}")
        self.index = index
        self.reason = reason


class FencedError(TransportError):
    """Redis does not know this consumer as living: its claims belong to others now. Handled inside the ledger."""


class StaleClaimError(TransportError):
    """Redis refused a claim whose tags were used before. Handled inside the ledger."""
