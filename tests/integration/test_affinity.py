"""Conversations over two real workers: where their turns go, in which order, and what a worker's end does to them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from itertools import groupby

import amqp
import msgspec
import pytest
from tests.chaos.brokers import RabbitNode, RedisServer
from tests.chaos.stack import Stack
from tests.transport_support import wait_until

from muai_batching.own_queues import own_queues_of
from muai_config.queues import OWN_EXCHANGE
from muai_producers.conversations import conversation_of
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.wire import InferenceRequest, InferenceResult

pytestmark = [pytest.mark.timeout(180), pytest.mark.xdist_group("affinity")]
MODELS = {"talk": {"task": "text-generation", "source": "hub:none", "engines": ["fake"]}}
KEEPS = msgspec.json.encode({"keeps_conversations": True, "latency_per_batch_ms": 20.0}).decode()
NUM_TURNS = 8


class Talk:
    """An installation whose two workers keep conversations."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.client, self.store = stack.client, stack.client.store

    def say(self, conversation: str, *texts: str) -> list[str]:
        """Submit turns in one call."""
        return self.client.submit_many(
            {"model": "talk", "inputs": text, "conversation_id": conversation} for text in texts
        )

    def answers(self, turns: Sequence[str]) -> list[InferenceResult]:
        return [self.client.result(turn, timeout_s=60) for turn in turns]

    def pin(self, conversation: str) -> str:
        """The own queue that a conversation is pinned to."""
        request = InferenceRequest(id="-", model="talk", inputs={}, conversation_id=conversation)
        key = self.store.keys.conversation_pin(conversation_of(request) or "")
        return (self.stack.state.client.get(key) or b"").decode()

    def workers(self) -> dict[str, WorkerRecord]:
        """Those that live, by their own queues."""
        return {worker.queue: worker for worker in Fleet(self.store).view(["fake"]).workers}

    def process_of(self, queue: str) -> str:
        """The name of the process that has an own queue."""
        return self.workers()[queue].name.split("@")[0]

    def runs_of(self, turns: Sequence[str]) -> list[str]:
        """Every run of these turns, in order."""
        return [turn for run in self.stack.runs() for turn in run if turn in turns]

    def await_run_of(self, turn: str) -> None:
        wait_until(lambda: self.runs_of([turn]), what="the turn to run")

    def close(self, queue: str) -> None:
        """End the sending to an own queue, and tell nobody."""
        if isinstance(self.stack.broker, RabbitNode):
            with self.stack.broker.connect() as connection:
                connection.channel().queue_unbind(queue, OWN_EXCHANGE, queue)
        else:
            assert own_queues_of(self.stack.settings).shut(queue, "fake") == 0

    def is_closed(self, queue: str) -> bool:
        """Whether an own queue is out of the books and gone from the broker."""
        if queue in Fleet(self.store).view([]).own_queues:
            return False
        if not isinstance(self.stack.broker, RabbitNode):
            return bool(self.stack.broker.client.type(queue) == b"string")  # type: ignore[attr-defined]
        with self.stack.broker.connect() as connection:
            try:
                connection.channel().queue_declare(queue, passive=True)
            except amqp.NotFound:
                return True
        return False


@pytest.fixture(
    scope="module",
    params=[pytest.param("redis", marks=pytest.mark.redis), pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)],
)
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    folder = tmp_path_factory.mktemp(request.param)
    node = request.getfixturevalue("rabbit_node") if request.param == "rabbitmq" else None
    state = RedisServer(folder / "redis")
    workers = {"worker-1": "engine", "worker-2": "engine"}
    stack = Stack(node or state, state, folder / "stack", workers=workers, models=MODELS, lease_ttl_s=2.0)
    for name in workers:
        stack.processes[name].environment["MUAI_TEST_FAKE_ENGINE"] = KEEPS
    try:
        stack.start()
        yield Talk(stack)
    finally:
        stack.stop()
        print(stack.logs())  # noqa: T201 - read where a test fails
        state.stop()


@pytest.fixture(autouse=True)
def whole(talk: Talk) -> None:
    """Both workers live, and no queue of a dead one is left."""
    talk.stack.wait_whole()
    wait_until(lambda: len(talk.workers()) == 2, what="both workers")


def test_given_chats_of_eight_turns_when_each_waits_for_its_answers_then_each_stays_at_one_worker_and_finds_its_cache(
    talk: Talk,
) -> None:
    results: dict[str, list[InferenceResult]] = {"one": [], "two": [], "three": []}
    for number in range(NUM_TURNS):
        for name, had in results.items():
            had += talk.answers(talk.say(name, f"turn {number}"))
    for had in results.values():
        assert len({result.metadata["worker"] for result in had}) == 1
        assert [result.cache_hit for result in had] == [False] + [True] * (NUM_TURNS - 1)


def test_given_turns_that_are_submitted_together_then_each_runs_after_the_one_before_and_at_the_same_worker(
    talk: Talk,
) -> None:
    turns = talk.say("eager", *(f"turn {number}" for number in range(NUM_TURNS)))
    results = talk.answers(turns)
    assert talk.runs_of(turns) == turns
    assert [result.batch_size for result in results] == [1] * NUM_TURNS
    assert len({result.metadata["worker"] for result in results}) == 1
    assert [result.cache_hit for result in results] == [False] + [True] * (NUM_TURNS - 1)


def test_given_a_conversation_when_its_worker_is_killed_then_it_goes_on_elsewhere_in_order_and_nothing_is_lost(
    talk: Talk,
) -> None:
    turns = talk.say("orphan", "one", "two", "SLEEP:1.5 three", "four", "five")
    talk.await_run_of(turns[2])
    before = talk.pin("orphan")
    victim = talk.process_of(before)
    talk.stack.processes[victim].signal(signal.SIGKILL)
    results = talk.answers(turns)
    assert len(results) == len(turns)
    # The third may run twice, for it was running; nothing runs before the one ahead of it has ended.
    assert [turn for turn, _ in groupby(talk.runs_of(turns))] == turns
    assert talk.pin("orphan") != before
    assert results[-1].cache_hit
    wait_until(lambda: talk.is_closed(before), 30.0, "the dead worker's queue to be closed")


def test_given_turns_in_a_worker_s_own_queue_when_it_is_told_to_end_then_they_are_given_back_and_the_queue_is_gone(
    talk: Talk,
) -> None:
    talk.answers(talk.say("left", "hello"))
    queue = talk.pin("left")
    names = [f"companion {number}" for number in range(8)]
    talk.answers([turn for name in names for turn in talk.say(name, "hello")])
    with_it = [name for name in names if talk.pin(name) == queue]
    busy = talk.say("left", "SLEEP:1.5")
    talk.await_run_of(busy[0])
    waiting = [turn for name in with_it for turn in talk.say(name, "SLEEP:0.1 more")]
    process = talk.stack.processes[talk.process_of(queue)]
    process.signal(signal.SIGTERM)
    talk.answers([*busy, *waiting])
    assert sorted(talk.runs_of(waiting)) == sorted(waiting)
    wait_until(lambda: talk.is_closed(queue), 30.0, "the queue to be closed")
    process.wait_ready()


def test_given_a_queue_that_was_closed_under_a_live_worker_then_its_turns_go_elsewhere_and_the_worker_goes_on(
    talk: Talk,
) -> None:
    talk.answers(talk.say("refused", "hello"))
    queue, worker = talk.pin("refused"), talk.workers()[talk.pin("refused")].name
    talk.close(queue)
    # By whichever worker, and through the engine's queue.
    results = talk.answers([turn for number in range(12) for turn in talk.say("refused", f"turn {number}")])
    others = talk.answers([turn for number in range(12) for turn in talk.say(f"new {number}", "SLEEP:0.1")])
    assert len(results) == 12
    assert worker in {result.metadata["worker"] for result in (*results, *others)}
