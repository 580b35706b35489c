"""A broadcast of which half arrives, and nothing after it: its consumer gives the connection up and goes on."""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path
from typing import Any

import kombu
import pytest
from tests.chaos.proxy import Proxy
from tests.transport_support import OURS, own_redis

pytestmark = pytest.mark.redis
LIMIT_S = 15.0
BIG = "x" * 1_000_000


def test_given_half_a_broadcast_when_nothing_follows_then_the_consumer_is_told_of_a_lost_connection(
    tmp_path: Path,
) -> None:
    with own_redis(tmp_path) as redis:
        proxy = Proxy(redis.port)
        exchange = kombu.Exchange(f"fan-{uuid.uuid4().hex[:6]}", type="fanout", durable=False, auto_delete=True)
        received: list[Any] = []
        through = f"redis://127.0.0.1:{proxy.port}/0"
        try:
            with kombu.Connection(redis.url, transport=OURS) as sender:
                connection = kombu.Connection(through, transport=OURS)
                heard = kombu.Queue(f"fan-{uuid.uuid4().hex[:6]}", exchange, durable=False, auto_delete=True)
                kombu.Consumer(connection, heard, callbacks=[lambda body, message: received.append(body)]).consume()
                producer = sender.Producer()
                listen(connection, lambda: True)
                producer.publish("whole", exchange=exchange, routing_key="", declare=[exchange])
                listen(connection, lambda: bool(received))
                assert received == ["whole"]
                proxy.swallow()
                producer.publish(BIG, exchange=exchange, routing_key="")
                with pytest.raises(connection.connection_errors):
                    listen(connection, lambda: False)
                assert received == ["whole"]
                connection.collect()
        finally:
            proxy.close()


def listen(connection: Any, ended: Any) -> None:
    """What an event loop does: read what there is, look whether it is enough."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.2)
        if ended():
            return
