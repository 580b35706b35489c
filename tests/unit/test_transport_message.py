"""What a stock producer wrote must be read as stock kombu reads it."""

from __future__ import annotations

import datetime as dt
import uuid
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from kombu.transport import virtual
from kombu.utils.json import dumps, loads

from muai_batching.transport import delivery_count
from muai_batching.transport.message import ClaimedMessage, UndecodableError


class _Sink(virtual.Channel):
    """Catches the envelope that a producer would have sent."""

    def __init__(self) -> None:
        client = SimpleNamespace(transport_options={})
        super().__init__(SimpleNamespace(client=client, channel_max=9, _used_channel_ids=[], channels=[]))
        self.envelopes: list[bytes] = []

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        self.envelopes.append(dumps(message).encode())


def envelope(body: Any, **options: Any) -> tuple[bytes, _Sink]:
    sink = _Sink()
    producer = kombu.Producer(sink, auto_declare=False)
    producer.publish(body, exchange="", routing_key="q", **options)
    return sink.envelopes[0], sink


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"text": "naïve ☃", "n": 1}, {}),
        ({"text": "x" * 5000}, {"compression": "zlib"}),
        (b"\x00\xff raw", {"content_type": "application/octet-stream", "content_encoding": "binary"}),
        ({"a": 1}, {"headers": {"at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "id": uuid.UUID(int=5)}}),
        ("", {}),
        ({"a": 1}, {"priority": 6, "correlation_id": "c", "reply_to": "r"}),
    ],
)
def test_given_a_stock_envelope_when_read_then_it_equals_what_stock_reads(body: Any, options: dict[str, Any]) -> None:
    raw, sink = envelope(body, **options)
    ours = ClaimedMessage(raw, sink, 7, 0)
    theirs = virtual.Message(loads(raw), channel=sink)
    for name in ("body", "content_type", "content_encoding", "headers", "delivery_info", "errors"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.accept = theirs.accept = {"application/json", "application/octet-stream", "text/plain"}
    assert ours.payload == theirs.payload
    assert ours.delivery_tag == ours.properties["delivery_tag"] == 7


@pytest.mark.parametrize("raw", [b"", b"junk", b"[1]", b"{}", b'{"properties": null}', b'{"properties": 5}'])
def test_given_what_is_no_kombu_message_when_read_then_it_is_refused_as_such(raw: bytes) -> None:
    with pytest.raises(UndecodableError):
        ClaimedMessage(raw, _Sink(), 1, 0)


def test_given_a_broken_compressed_body_when_read_then_the_error_is_kept_for_the_consumer() -> None:
    raw, sink = envelope({"a": 1}, headers={"compression": "application/x-gzip"})
    assert len(ClaimedMessage(raw, sink, 1, 0).errors) == 1


def test_given_deaths_on_record_when_read_then_message_and_task_request_tell_their_number() -> None:
    raw, sink = envelope({"a": 1})
    message = ClaimedMessage(raw, sink, 1, 3)
    request = SimpleNamespace(headers=None, **{"x-delivery-count": 2})
    assert (delivery_count(message), delivery_count(request)) == (3, 2)
    assert message.delivery_info["redelivered"]
    assert delivery_count(ClaimedMessage(raw, sink, 1, 0)) == 0
