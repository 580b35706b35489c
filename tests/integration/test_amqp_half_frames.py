"""A connection to RabbitMQ that goes silent in the middle of a frame: told by heartbeats, as between frames."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest
from amqp.exceptions import ConnectionForced
from kombu import Connection, Consumer, Queue
from tests.chaos.proxy import Proxy
from tests.transport_support import rabbitmq_url

pytestmark = pytest.mark.rabbitmq
HEARTBEAT_S = 1
BIG = "x" * 1_000_000


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy(5672)
    try:
        yield proxy
    finally:
        proxy.close()


def test_given_half_a_frame_when_nothing_follows_then_the_loop_goes_on_and_the_connection_is_given_up(
    proxy: Proxy,
) -> None:
    url = rabbitmq_url()
    through = url.replace(":5672", f":{proxy.port}")
    queue = Queue(f"half-frames-{os.getpid()}", auto_delete=True, durable=False)
    connection = Connection(through, transport="muai_batching.amqp:Transport", heartbeat=HEARTBEAT_S)
    received: list[str] = []
    with Connection(url) as sender:
        Consumer(connection, queue, callbacks=[lambda body, message: received.append(body)], no_ack=True).consume()
        producer = sender.Producer()
        producer.publish("whole", routing_key=queue.name)
        connection.drain_events(timeout=5)
        assert received == ["whole"]
        proxy.swallow()
        producer.publish(BIG, routing_key=queue.name)
        with pytest.raises(ConnectionForced):
            listen(connection, 10 * HEARTBEAT_S)
    assert received == ["whole"]
    assert proxy.num_swallowed == 1
    connection.collect()  # closing would wait for an answer


def listen(connection: Connection, limit_s: float) -> None:
    """What an event loop does: read what there is without waiting, and see to the heartbeats."""
    ended_s = time.monotonic() + limit_s
    while time.monotonic() < ended_s:
        select.select([connection.connection.transport.sock], [], [], 0.1)
        try:
            connection.drain_events(timeout=0)  # stock py-amqp asks for the rest, and never returns from here
        except TimeoutError:
            connection.heartbeat_check()


def test_given_a_message_that_comes_in_pieces_then_it_is_read_whole() -> None:
    queue = Queue(f"pieces-{os.getpid()}", auto_delete=True, durable=False)
    with Connection(rabbitmq_url(), transport="muai_batching.amqp:Transport") as connection:
        received: list[str] = []
        with Consumer(connection, queue, callbacks=[lambda body, message: received.append(body)], no_ack=True):
            connection.Producer().publish(BIG, routing_key=queue.name)
            ended_s = time.monotonic() + 10
            while not received and time.monotonic() < ended_s:
                try:
                    connection.drain_events(timeout=0)
                except TimeoutError:
                    continue
        assert received == [BIG]
