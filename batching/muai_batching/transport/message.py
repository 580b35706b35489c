"""From the raw payload in Redis to a kombu message, at a fraction of stock's cost."""

from __future__ import annotations

import binascii
import sys
from typing import Any

import msgspec
from kombu.compression import decompress
from kombu.utils.json import loads as kombu_loads

from muai_batching.transport import stock

DELIVERY_COUNT = "x-delivery-count"

# kombu's JSON carries dates, UUIDs and bytes as {"__type__": …}; only its own decoder turns them back.
_TYPED = b'"__type__"'

_decode = msgspec.json.Decoder().decode


class UndecodableError(ValueError):
    """A payload is no kombu message."""


class ClaimedMessage(stock.Message):  # type: ignore[misc]
    """A message of a claim; its delivery tag is the claim's tag.

    Raises:
        UndecodableError: the payload is no kombu message.
    """

    def __init__(self, raw: bytes, channel: Any, tag: int, deaths: int) -> None:
        try:
            envelope = kombu_loads(raw) if _TYPED in raw else _decode(raw)
            properties = envelope["properties"]
            headers = envelope.get("headers") or {}
            delivery_info = properties.get("delivery_info") or {}
            body = _body(envelope.get("body"), properties.get("body_encoding"), channel)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise UndecodableError(f"not a kombu message: {exc!r}") from exc
        properties["delivery_tag"] = tag
        self.errors: list[Any] = []
        self.channel = channel
        self.delivery_tag = tag
        self.content_type = envelope.get("content-type")
        self.content_encoding = envelope.get("content-encoding")
        self.delivery_info = delivery_info
        self.headers = headers
        self.properties = properties
        self._raw = envelope
        self._decoded_cache = None
        self._state = "RECEIVED"
        self.accept = None
        self.body = body
        if deaths:
            headers[DELIVERY_COUNT] = deaths
            delivery_info["redelivered"] = True
        if headers and "compression" in headers:
            self._decompress(headers["compression"])

    def _decompress(self, compression: str | None) -> None:
        if not compression:
            return
        try:
            self.body = decompress(self.body, compression)
        except Exception:  # noqa: BLE001 whatever the codec raises is reported where kombu reports it
            self.errors.append(sys.exc_info())


def _body(body: Any, encoding: str | None, channel: Any) -> Any:
    if not body or encoding is None:
        pass
    elif encoding == "base64":
        return binascii.a2b_base64(body)
    else:
        body = channel.decode_body(body, encoding)
    return body.encode() if isinstance(body, str) else body


def delivery_count(message: Any) -> int:
    """How many earlier deliveries of a message ended in the death of its consumer.

    Takes a kombu message or a Celery task's request; reads RabbitMQ quorum queues' `x-delivery-count` as well.
    """
    headers = getattr(message, "headers", None) or {}
    count = headers.get(DELIVERY_COUNT)
    if count is None:
        count = getattr(message, DELIVERY_COUNT, 0)
    return int(count or 0)
