"""What a webhook's body says."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from muai_producers.gateway.standing import Standing

KINDS = {"SUCCESS": "inference.succeeded", "FAILURE": "inference.failed", "REVOKED": "inference.cancelled"}


class HookBody(msgspec.Struct, frozen=True, kw_only=True):
    """Word of a request's end."""

    type: str
    """`inference.succeeded`, `inference.failed` or `inference.cancelled`."""
    timestamp: str
    """When the body was written, ISO 8601."""
    data: Standing
    """As GET /v1/inference/{id} answers."""


def hook_body(standing: Standing, now_s: float) -> bytes:
    """The body that tells where a finished request stands."""
    when = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
    return msgspec.json.encode(HookBody(type=KINDS[standing.state], timestamp=when, data=standing))
