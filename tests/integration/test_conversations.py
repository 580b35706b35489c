"""Conversations with a real Redis: whose turn it is, where it is sent, and how a worker's queue is closed."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ResponseError
from tests.integration.test_collector import Bench
from tests.requests import a_request
from tests.transport_support import OwnRedis, wait_until

from muai_batching.own_queues import Janitor, own_queues_of
from muai_batching.transport.keys import StateKeys
from muai_batching.transport.store import ClaimStore, ListOrder
from muai_config import Settings, build_settings
from muai_producers.conversations import Asked, Conversations, Told, conversation_of
from muai_producers.errors import InferenceFailedError
from muai_producers.fleet import Fleet, FleetView, OwnBatchDone, TurnsEnded, WorkerRecord, read_notice
from muai_producers.monitoring.instruments import CONVERSATION_TURNS
from muai_producers.monitoring.recorder import recorder
from muai_producers.store import Pins, Store, failure_answer
from muai_producers.wire import Batch
from muai_workers.announcing import Announcer

pytestmark = pytest.mark.redis
MODELS = {"llm": {"task": "text-generation", "source": "hub:none", "engines": ["pytorch"]}}
OWN = ("engine.pytorch.own.one", "engine.pytorch.own.two")


class Chats(Bench):
    """A collector with two workers that keep conversations."""

    def both(self, *queues: str, slots: int = 1, **view: Any) -> None:
        """A picture of the fleet with the workers of those own queues."""
        workers = tuple(WorkerRecord(name=queue, engine="pytorch", slots=slots, queue=queue) for queue in queues)
        self.collector.on_fleet(FleetView(workers=workers, **view))

    def say(self, request_id: str, conversation: str | None = "c", tenant: str = "default", **fields: Any) -> None:
        self.receive(request_id, model="llm", conversation_id=conversation, tenant=tenant, **fields)

    def pinned(self, queue: str, conversation: str = "c", tenant: str = "default") -> None:
        """A worker says that it keeps a conversation."""
        request = a_request(model="llm", conversation_id=conversation, tenant=tenant)
        self.store.start_batch("b", [], {}, Pins(queue, [conversation_of(request) or ""], 60.0))

    def ended(self, request_id: str) -> None:
        self.store.answer([failure_answer(request_id, InferenceFailedError("no"))])

    def sent(self) -> list[tuple[str, str]]:
        """Each request that was sent, with the own queue that it went to."""
        self.collector.tick()
        return [(request.id, batch.queue) for batch in self.broker.sent for request in batch.requests]


@pytest.fixture
def chats(store: Store) -> Chats:
    chats = Chats(store, build_settings({"models": MODELS}, {}))
    chats.both(*OWN)
    return chats


def test_given_turns_at_once_then_each_waits_for_the_end_of_the_one_before_and_is_no_part_of_any_batch(
    chats: Chats,
) -> None:
    chats.both(*OWN, slots=8)
    for number in range(3):
        chats.say(f"t{number}")
    chats.say("other", None)
    assert sorted(chats.sent()) == [("other", ""), ("t0", "")]
    assert chats.collector.assembler.num_requests == 2
    chats.ended("t0")
    assert len(chats.sent()) == 2
    chats.collector.on_notice(TurnsEnded((conversation_of(a_request(model="llm", conversation_id="c")) or "",)))
    assert chats.sent()[2:] == [("t1", "")]
    chats.ended("t1")
    chats.collector.sweep()
    assert chats.sent()[3:] == [("t2", "")]


def test_given_a_pin_then_the_turn_goes_to_that_worker_and_no_other_tenant_s_or_conversation_s_does(
    chats: Chats,
) -> None:
    chats.pinned(OWN[1])
    chats.say("mine")
    chats.say("another", "d")
    chats.say("a stranger's", "c", "shop")
    assert dict(chats.sent()) == {"mine": OWN[1], "another": "", "a stranger's": ""}


def test_given_two_pinned_workers_then_each_gets_a_batch_of_its_own_conversations(chats: Chats) -> None:
    for number in range(4):
        chats.pinned(OWN[number % 2], f"c{number}")
        chats.say(f"t{number}", f"c{number}")
    chats.sent()
    found = sorted((batch.queue, sorted(request.id for request in batch.requests)) for batch in chats.broker.sent)
    assert found == [(OWN[0], ["t0", "t2"]), (OWN[1], ["t1", "t3"])]


def test_given_a_worker_over_the_load_then_its_turns_spill_to_an_idle_one_and_wait_where_none_is(chats: Chats) -> None:
    chats.pinned(OWN[0])
    chats.both(*OWN, outstanding={"pytorch": 2}, own_outstanding={OWN[0]: 2})
    chats.say("t")
    assert chats.sent() == []
    chats.both(*OWN, outstanding={"pytorch": 1}, own_outstanding={OWN[0]: 2})
    assert chats.sent() == [("t", "")]


def test_given_a_turn_that_waits_for_its_worker_when_that_has_room_again_then_it_goes_there(chats: Chats) -> None:
    chats.pinned(OWN[0])
    chats.both(*OWN, outstanding={"pytorch": 4}, own_outstanding={OWN[0]: 2})
    chats.say("t")
    assert chats.sent() == []
    chats.collector.on_notice(OwnBatchDone(OWN[0], 1))
    assert chats.sent() == [("t", OWN[0])]


def test_given_a_pin_on_a_worker_that_is_gone_then_the_turn_goes_to_any_other_also_when_it_goes_while_it_waits(
    chats: Chats,
) -> None:
    chats.pinned("engine.pytorch.own.dead")
    chats.say("t")
    assert chats.sent() == [("t", "")]
    chats.pinned(OWN[0], "d")
    chats.both(*OWN, outstanding={"pytorch": 4}, own_outstanding={OWN[0]: 2})
    chats.say("u", "d")
    assert len(chats.sent()) == 1
    chats.both(OWN[1], own_outstanding={OWN[0]: 2})
    assert chats.sent()[1:] == [("u", "")]


def test_given_affinity_switched_off_then_nothing_is_held_and_nothing_pinned(store: Store) -> None:
    off = build_settings({"models": MODELS, "optimization": {"affinity": {"enabled": False}}}, {})
    chats = Chats(store, off)
    chats.both(*OWN)
    chats.pinned(OWN[0])
    chats.say("t0")
    chats.say("t1")
    assert sorted(chats.sent()) == [("t0", ""), ("t1", "")]


def test_given_requests_without_a_conversation_then_the_state_store_is_asked_nothing_more(
    chats: Chats, clean_redis: OwnRedis
) -> None:
    chats.both(*OWN, slots=8)
    chats.say("warm", None)
    chats.sent()

    def commands() -> int:
        return int(clean_redis.client.info("stats")["total_commands_processed"])

    before, own = commands(), 1  # the question itself is a command
    chats.say("plain", None)
    assert len(chats.sent()) == 2
    assert commands() - before == own
    chats.say("turn")
    assert len(chats.sent()) == 3
    assert commands() - before > 2 * own


def test_given_turns_at_two_collectors_then_the_one_that_was_let_go_is_first_until_it_has_ended(
    store: Store,
) -> None:
    turns = Conversations(store)
    assert turns.take_turns([Asked("c", "late", (("late", 2.0),))]) == [Told("late")]
    assert turns.take_turns([Asked("c", "early", (("early", 1.0), ("last", 3.0)))]) == [Told("late")]
    store.answer([failure_answer("late", InferenceFailedError("no"))])
    assert turns.take_turns([Asked("c", "last")]) == [Told("early")]
    assert turns.take_turns([Asked("c", "early"), Asked("d", "x", (("x", 1.0),))]) == [Told("early"), Told("x")]


def test_given_the_end_of_a_batch_then_its_turns_are_over_and_who_holds_the_next_back_is_told(store: Store) -> None:
    turns, listener = Conversations(store), store.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[attr-defined]
    listener.subscribe(store.keys.fleet_channel)
    turns.take_turns([Asked("c", "t0", (("t0", 1.0), ("t1", 2.0))), Asked("d", "u0", (("u0", 1.0),))])
    batch = Batch(id="b", engine="pytorch", model="llm", task="text-generation", requests=[], chain=(), queue=OWN[0])
    store.finish_batch(batch, now_s=1.0, took_s=0.1, size=2, moved=[("onnx", "b2")], ended=[("c", "t0"), ("d", "u0")])
    notices = []
    while len(notices) < 3:
        message = listener.get_message(timeout=5.0)
        notices += [read_notice(message["data"].decode())] if message else []
    assert notices[:2] == [OwnBatchDone(OWN[0], 0), TurnsEnded(("c",))]
    assert store.client.zcard(store.keys.outstanding("onnx")) == 1  # type: ignore[attr-defined]
    assert turns.take_turns([Asked("c", "t1")]) == [Told("t1")]
    listener.close()


def test_given_a_closed_queue_then_pushes_are_refused_and_what_waited_or_is_given_back_goes_to_its_engine_in_order(
    clean_redis: OwnRedis, muai_settings: Settings
) -> None:
    client, claims = clean_redis.client, ClaimStore(clean_redis.client, StateKeys("t"))
    queues = own_queues_of(muai_settings)
    client.lpush(OWN[0], "claimed", "a", "b")
    client.lpush("engine.pytorch", "later")
    claims.register("dead")
    assert claims.claim("dead", ListOrder([OWN[0]], 1), 1, 1).count == 1
    assert queues.shut(OWN[0], "pytorch") == 2
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        client.lpush(OWN[0], "late")
    assert claims.claim("dead", ListOrder([OWN[0]], 1), 2, 1).count == 0
    claims.resign("dead")
    assert claims.reclaim("dead") == 1
    # The right end is consumed first.
    assert client.lrange("engine.pytorch", 0, -1) == [b"later", b"b", b"a", b"claimed"]
    queues.open(OWN[0])
    assert client.lpush(OWN[0], "again") == 1
    queues.close()


def test_given_a_worker_that_is_missed_then_the_janitor_closes_its_queue_after_the_grace_time_and_no_other(
    clean_redis: OwnRedis, muai_settings: Settings, store: Store
) -> None:
    fleet, client = Fleet(store), clean_redis.client
    records = [WorkerRecord(name=queue, engine="pytorch", slots=1, queue=queue) for queue in OWN]
    assert [fleet.announce(record) for record in records] == [False, False]
    assert fleet.announce(records[1])
    client.lpush(OWN[0], "waits")
    fleet.withdraw(OWN[0])
    janitor = Janitor(own_queues_of(muai_settings), fleet, grace_s=4.0)
    for now_s, closed in [(0.0, False), (3.9, False), (4.0, True), (5.0, True)]:
        janitor.look(fleet.view([]), now_s)
        assert (client.type(OWN[0]) == b"string") == closed
    assert client.lrange("engine.pytorch", 0, -1) == [b"waits"]
    assert fleet.view([]).own_queues == {OWN[1]: "pytorch"}
    assert not fleet.announce(records[0]), "it learns that its queue was closed"
    janitor.close()


def test_given_turns_that_went_each_way_then_they_are_counted(chats: Chats) -> None:
    for conversation, queue in [("a", OWN[0]), ("b", OWN[1]), ("gone", "engine.pytorch.own.dead")]:
        chats.pinned(queue, conversation)
    chats.both(*OWN, slots=8, own_outstanding={OWN[1]: 12})
    recorder.take()
    for conversation in ("a", "b", "gone", "fresh"):
        chats.say(conversation, conversation)
    assert len(chats.sent()) == 4
    counted = recorder.take().counters
    ways = ("pinned", "spilled", "repinned", "new")
    assert [counted.get((CONVERSATION_TURNS.name, ("llm", way))) for way in ways] == [1.0, 1.0, 1.0, 1.0]


def test_given_a_worker_whose_queue_was_closed_while_it_was_silent_then_its_next_sign_of_life_opens_it(
    clean_redis: OwnRedis, muai_settings: Settings, store: Store
) -> None:
    client, queues, fleet = clean_redis.client, own_queues_of(muai_settings), Fleet(store)
    record = WorkerRecord(name="w", engine="pytorch", slots=1, queue=OWN[0])
    announcer = Announcer(fleet, lambda: record, own_queues_of(muai_settings))
    announcer.start()
    wait_until(lambda: fleet.view([]).own_queues, what="the announcement")
    assert queues.shut(OWN[0], "pytorch") == 0
    fleet.forget_own_queue(OWN[0])
    assert client.type(OWN[0]) == b"string"
    wait_until(lambda: client.type(OWN[0]) == b"none", what="the queue to be opened again")
    client.lpush(OWN[0], "waits")
    announcer.stop()
    assert client.lrange("engine.pytorch", 0, -1) == [b"waits"]
    assert fleet.view([]).own_queues == {}
    queues.close()
