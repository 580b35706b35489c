"""Claims under every mishap the network and the processes can do to them, against a real Redis.

What is lost here is a client's request; what is held twice runs twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.transport_support import OwnRedis, own_redis

from muai_batching.transport import LeaseLostError, TransportError
from muai_batching.transport.book import Holder, TagSource
from muai_batching.transport.keys import StateKeys
from muai_batching.transport.ledger import Ledger
from muai_batching.transport.store import Claimed, ClaimStore, ListOrder

LISTS = ("first", "second")
FAULTS = ("none", "none", "reply lost", "command lost", "command late")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with own_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


class FaultyStore(ClaimStore):
    """A store whose next claim or settlement meets a mishap; late commands wait in `late`."""

    def __init__(self, client: Any) -> None:
        super().__init__(client, StateKeys("t"))
        self.fault = "none"
        self.late: list[Callable[[], Any]] = []

    def claim(self, consumer: str, order: ListOrder, first: int, room: int) -> Claimed:
        return self._meet_fault(lambda: super(FaultyStore, self).claim(consumer, order, first, room))

    def settle(self, consumer: str, items: Any) -> Any:
        return self._meet_fault(lambda: super(FaultyStore, self).settle(consumer, items))

    def _meet_fault(self, call: Callable[[], Any]) -> Any:
        fault, self.fault = self.fault, "none"
        if fault == "command late":
            self.late.append(call)
        if fault in ("command late", "command lost"):
            raise RedisConnectionError(fault)
        reply = call()
        if fault == "reply lost":
            raise RedisConnectionError(fault)
        return reply


class Consumer:
    """One process: a ledger, one channel's holder, and the payloads it was given."""

    def __init__(self, client: Any, tags: TagSource) -> None:
        self.store = FaultyStore(client)
        self.ledger = Ledger(self.store, tags)
        self.ledger.consumer = f"c{tags.draw(1)}"
        self.holder = self.ledger.open(lambda: None)
        self.given: dict[int, bytes] = {}

    def claim(self, room: int) -> None:
        claimed = self.ledger.claim(self.holder, ListOrder(LISTS, len(LISTS)), room)
        payloads = [payload for _, group in claimed.groups for payload in group]
        self.given.update(zip(range(claimed.first, claimed.first + len(payloads)), payloads, strict=True))

    @property
    def held(self) -> list[int]:
        return sorted(self.holder.tags)


class Claims(RuleBasedStateMachine):
    """Two consumers, two lists. `done` is what a consumer was told is done; `published` all there ever was."""

    server: OwnRedis

    @initialize()
    def begin(self) -> None:
        self.client = self.server.client
        self.client.flushdb()
        self.tags = TagSource()
        self.consumers = [Consumer(self.client, self.tags) for _ in range(2)]
        self.dead: list[str] = []
        self.published: list[bytes] = []
        self.done: set[bytes] = set()
        self.late: list[Callable[[], Any]] = []

    @rule(name=st.sampled_from(LISTS), count=st.integers(1, 5))
    def publish(self, name: str, count: int) -> None:
        fresh = [b"%s-%d" % (name.encode(), len(self.published) + i) for i in range(count)]
        self.published.extend(fresh)
        self.client.lpush(name, *fresh)

    @rule(who=st.integers(0, 1), room=st.integers(1, 6), fault=st.sampled_from(FAULTS))
    def claim(self, who: int, room: int, fault: str) -> None:
        consumer = self.consumers[who]
        consumer.store.fault = fault
        consumer.claim(room)

    @rule(who=st.integers(0, 1), pick=st.integers(0, 50), flush=st.booleans())
    def ack(self, who: int, pick: int, flush: bool) -> None:
        consumer = self.consumers[who]
        if consumer.held:
            tag = consumer.held[pick % len(consumer.held)]
            assert consumer.ledger.ack(consumer.holder, tag)
            self.done.add(consumer.given[tag])
        if flush:
            consumer.ledger.flush()

    @rule(who=st.integers(0, 1), count=st.integers(1, 4), fault=st.sampled_from(FAULTS))
    def settle(self, who: int, count: int, fault: str) -> None:
        consumer = self.consumers[who]
        tags = consumer.held[:count]
        if not tags:
            return
        consumer.store.fault = fault
        payloads = [consumer.given[tag] for tag in tags]
        try:
            consumer.ledger.settle(consumer.holder, tags, [("RPUSH", "settled", *payloads)])
        except LeaseLostError:
            return
        self.done.update(payloads)

    @rule(who=st.integers(0, 1), pick=st.integers(0, 50))
    def requeue(self, who: int, pick: int) -> None:
        consumer = self.consumers[who]
        if consumer.held:
            consumer.ledger.give_back(consumer.holder, [consumer.held[pick % len(consumer.held)]])

    @rule(who=st.integers(0, 1), pins=st.integers(0, 3))
    def reconnect(self, who: int, pins: int) -> None:
        """The channel goes, pinned work goes on, and is acknowledged through the old channel."""
        consumer = self.consumers[who]
        pinned = consumer.held[:pins]
        assert all(consumer.ledger.pin(tag) for tag in pinned)
        old: Holder = consumer.holder
        consumer.ledger.close(old)
        consumer.ledger.expect_loss()
        consumer.holder = consumer.ledger.open(lambda: None)
        assert consumer.held == []
        for tag in pinned:
            assert consumer.ledger.ack(old, tag)
            self.done.add(consumer.given[tag])

    @rule(who=st.integers(0, 1))
    def die(self, who: int) -> None:
        consumer = self.consumers[who]
        # An ack that died with its process only redelivers.
        self.done -= {consumer.given[tag] for tag in consumer.ledger.book.begin_flush(1000)[0]}
        self.dead.append(consumer.ledger.consumer)
        self.late.extend(consumer.store.late)
        self.consumers[who] = Consumer(self.client, self.tags)

    @rule(who=st.integers(0, 1))
    def be_taken_for_dead(self, who: int) -> None:
        """Stopped for longer than its lease, then going on."""
        consumer = self.consumers[who]
        beats = consumer.store.beats().get(consumer.ledger.consumer)
        if beats is not None:
            self.done -= {consumer.given[tag] for tag in consumer.ledger.book.begin_flush(1000)[0]}
            self.dead.append(consumer.ledger.consumer)

    @rule()
    def reclaim(self) -> None:
        store = ClaimStore(self.client, StateKeys("t"))
        beats = store.beats()
        for name in self.dead:
            if name in beats and store.condemn(name, beats[name]):
                store.reclaim(name)
        self.dead.clear()

    @rule()
    def late_commands_arrive(self) -> None:
        for call in [*self.late, *(late for c in self.consumers for late in c.store.late)]:
            with contextlib.suppress(TransportError):  # nobody waits for this reply any more
                call()
        self.late.clear()
        for consumer in self.consumers:
            consumer.store.late.clear()

    @rule(who=st.integers(0, 1), count=st.integers(1, 5), meanwhile_dead=st.booleans())
    def a_claim_arrives_late(self, who: int, count: int, meanwhile_dead: bool) -> None:
        """What the rules above do when they come in this order, which chance alone seldom brings."""
        self.claim(who, 3, "command late")
        if meanwhile_dead:
            self.die(who)
            self.reclaim()
        self.publish(LISTS[0], count)
        self.late_commands_arrive()

    @rule(who=st.integers(0, 1))
    def beat(self, who: int) -> None:
        consumer = self.consumers[who]
        if consumer.store.beats().get(consumer.ledger.consumer) is not None:
            consumer.ledger.beat()

    def in_redis(self) -> list[bytes]:
        found: list[bytes] = []
        for name in LISTS:
            found.extend(self.client.lrange(name, 0, -1))
        for key in self.client.keys("t:claims:*"):
            found.extend(_payload(value) for value in self.client.hvals(key))
        return found

    @invariant()
    def nothing_is_lost_and_nothing_is_in_two_places(self) -> None:
        found = self.in_redis()
        settled = self.client.lrange("settled", 0, -1)
        assert len(found) == len(set(found))
        assert len(settled) == len(set(settled))
        assert not set(found) & set(settled)
        assert set(self.published) <= set(found) | set(settled) | self.done

    @invariant()
    def what_a_living_consumer_holds_is_its_own(self) -> None:
        held: list[bytes] = []
        for consumer in self.consumers:
            booked = {int(tag) for tag in self.client.hkeys(f"t:claims:{consumer.ledger.consumer}")}
            held.extend(consumer.given[tag] for tag in consumer.held if tag in booked)
        assert len(held) == len(set(held))

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        self.late_commands_arrive()
        self.reclaim()
        for consumer in self.consumers:
            consumer.ledger.flush()
            consumer.ledger.recover_if_due()
            booked = {int(tag) for tag in self.client.hkeys(f"t:claims:{consumer.ledger.consumer}")}
            assert booked <= set(consumer.held), (
                "claims that nobody answers for would stay as long as the process lives"
            )
            consumer.ledger.end()
        settled = set(self.client.lrange("settled", 0, -1))
        left = [payload for name in LISTS for payload in self.client.lrange(name, 0, -1)]
        assert len(left) == len(set(left))
        assert set(self.published) - set(left) <= self.done | settled
        assert not self.client.keys("t:claims:*")
        assert not self.client.exists("t:beats")


def _payload(value: bytes) -> bytes:
    size, rest = value.split(b":", 1)
    return rest[int(size) :]


@pytest.mark.redis
def test_given_any_mishaps_then_nothing_is_lost_and_nothing_is_held_twice(server: OwnRedis) -> None:
    Claims.server = server
    run_state_machine_as_test(
        Claims,
        settings=settings(
            max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.redis
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 40),
    rooms=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    acked=st.sets(st.integers(1, 40)),
    dies=st.booleans(),
)
def test_given_claims_of_any_sizes_when_returned_then_the_old_order_is_kept(
    server: OwnRedis, count: int, rooms: list[int], acked: set[int], dies: bool
) -> None:
    client = server.client
    client.flushdb()
    numbers = [str(n).encode() for n in range(count)]
    if numbers:
        client.lpush("q", *numbers)
    ledger = Ledger(ClaimStore(client, StateKeys("t")), TagSource())
    holder = ledger.open(lambda: None)
    first_tags: dict[bytes, int] = {}
    for room in rooms:
        claimed = ledger.claim(holder, ListOrder(["q"], 1), room)
        for _, payloads in claimed.groups:
            first_tags.update(zip(payloads, range(claimed.first, claimed.first + len(payloads)), strict=True))
    assert list(first_tags) == numbers[: len(first_tags)]
    done = {payload for payload, tag in first_tags.items() if tag in acked}
    ledger.ack_many(holder, [first_tags[payload] for payload in done])
    if dies:
        assert ledger.store.condemn(ledger.consumer, 0)
        ledger.store.reclaim(ledger.consumer)
    else:
        ledger.close(holder)
    assert client.lrange("q", 0, -1)[::-1] == [number for number in numbers if number not in done]


@pytest.mark.parametrize("num_others", [0, 1, 400])
def test_given_a_consumer_that_was_given_up_when_one_settlement_is_refused_then_it_holds_nothing_more(
    server: OwnRedis, num_others: int
) -> None:
    client = server.client
    client.flushdb()
    client.lpush("q", *(str(number).encode() for number in range(1 + num_others)))
    ledger = Ledger(ClaimStore(client, StateKeys("t")), TagSource())
    holder = ledger.open(lambda: None)
    claimed = ledger.claim(holder, ListOrder(["q"], 1), 1 + num_others)
    assert ledger.store.condemn(ledger.consumer, 0)
    ledger.store.reclaim(ledger.consumer)
    (outcome,) = ledger.settle_many(holder, [([claimed.first], [("SET", "done", "1")])])
    assert isinstance(outcome, LeaseLostError)
    assert not holder.tags, "the rest would be tried one by one, each in vain"
    assert client.llen("q") == 1 + num_others
    again = ledger.claim(holder, ListOrder(["q"], 1), 1)
    ledger.settle(holder, [again.first], [("SET", "done", "1")])
    assert client.get("done") == b"1"
