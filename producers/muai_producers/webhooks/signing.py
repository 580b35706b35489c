"""Signatures of webhooks, in the form of the Standard Webhooks convention, for which receivers find libraries.

Three headers: `webhook-id` (the same for every try of one delivery), `webhook-timestamp` (seconds) and
`webhook-signature`: `v1,` and the base64 of HMAC-SHA256 over `ID.TIMESTAMP.BODY`. The key is what follows `whsec_` in
the secret, decoded from base64.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import TYPE_CHECKING

from muai_producers.errors import InvalidRequestError

if TYPE_CHECKING:
    from muai_config.gateway import WebhookSettings

MIN_SECRET_CHARS = 32
TOLERANCE_S = 300.0
"""How old a receiver should let a timestamp be: a delivery that was listened to cannot be played again later."""


class Signer:
    """Signs deliveries, each tenant's with a secret of its own.

    The tenants' secrets are made from one that the operator keeps, so that nothing needs to be stored for them.
    """

    def __init__(self, master: bytes) -> None:
        self._master = master

    @classmethod
    def from_settings(cls, settings: WebhookSettings) -> Signer:
        """The signer of an installation.

        Raises:
            InvalidRequestError: gateway.webhooks.secret_file is not set, cannot be read, or is too short.
        """
        file = settings.secret_file
        if file is None:
            raise InvalidRequestError("gateway.webhooks.secret_file is not set: there is no secret to sign with")
        try:
            master = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"gateway.webhooks.secret_file: {file} cannot be read: {error}") from error
        if len(master) < MIN_SECRET_CHARS:
            raise InvalidRequestError(
                f"gateway.webhooks.secret_file: {file} holds {len(master)} characters; {MIN_SECRET_CHARS} at least, "
                "as `openssl rand -base64 32` makes them"
            )
        return cls(master.encode())

    def secret_of(self, tenant: str) -> str:
        """What the tenant's receivers check signatures with."""
        return "whsec_" + base64.b64encode(self._key_of(tenant)).decode()

    def headers(self, tenant: str, delivery_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
        """The headers that sign one try."""
        return {
            "webhook-id": delivery_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": _signature(self._key_of(tenant), delivery_id, timestamp_s, body),
        }

    def _key_of(self, tenant: str) -> bytes:
        return hmac.new(self._master, b"muai webhook " + tenant.encode(), hashlib.sha256).digest()


def _signature(key: bytes, delivery_id: str, timestamp_s: int, body: bytes) -> str:
    signed = f"{delivery_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def verify(secret: str, headers: dict[str, str], body: bytes, now_s: float) -> bool:
    """Whether a delivery is genuine and recent: what a receiver does, here for receivers in Python.

    Args:
        headers: of the delivery, their names in lower case.
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        timestamp_s = int(headers["webhook-timestamp"])
        expected = _signature(key, headers["webhook-id"], timestamp_s, body)
        given = headers["webhook-signature"].split(" ")
    except (KeyError, ValueError):
        return False
    is_recent = abs(now_s - timestamp_s) <= TOLERANCE_S
    return is_recent and any(hmac.compare_digest(expected, one) for one in given)
