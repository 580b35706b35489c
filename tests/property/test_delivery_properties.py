"""Delivery through the collector, whatever happens: nothing lost, nothing sent twice, no cap exceeded, nothing late,
and the turns of a conversation one after the other (invariant 9).

The collector is the real one; the broker, the state store and the clocks are plain values that the test moves.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.requests import a_request

from muai_batching.collector import Collector
from muai_batching.dispatch import Handle, Passing, Sent
from muai_config import build_settings
from muai_producers.conversations import Asked, Told, conversation_of
from muai_producers.fleet import BatchDone, FleetView, WorkerRecord
from muai_producers.messages import request_message
from muai_producers.store import Answer
from muai_producers.token_estimates import BYTES_PER_TOKEN, text_tokens
from muai_producers.wire import Batch, InferenceRequest

MAX_BATCH_SIZE = 4
MAX_BATCH_TOKENS = 64
BUFFER = 24
SETTINGS = build_settings(
    {
        "optimization": {
            "batcher": {
                "max_batch_size": MAX_BATCH_SIZE,
                "max_batch_tokens": MAX_BATCH_TOKENS,
                "buffer_requests": BUFFER,
            }
        },
        "models": {
            "a": {"task": "embedding", "source": "hub:none", "engines": ["onnx", "pytorch"]},
            "b": {"task": "text-classification", "source": "hub:none", "engines": ["pytorch"]},
        },
    },
    {},
)


class Message:
    """What the collector reads of a kombu message."""

    def __init__(self, tag: int, request: InferenceRequest) -> None:
        _, self.headers, self.body = request_message(request)
        self.channel, self.delivery_tag, self.content_type = None, tag, "application/json"


class World:
    """A broker with claims, and a state store: the collector's dispatcher and store in one.

    A request is on `queue`, or claimed, or settled; settling a claim that was lost is refused, as Redis refuses it.
    """

    def __init__(self) -> None:
        self.queue: deque[InferenceRequest] = deque()
        self.claims: dict[int, InferenceRequest] = {}
        self.batches: list[Batch] = []
        self.outstanding: dict[str, list[Batch]] = {"onnx": [], "pytorch": []}
        self.answers: list[str] = []
        self.sent: Counter[str] = Counter()
        self.wall_s, self.monotonic_s = 1_000_000.0, 0.0
        self.down = False
        self.last_tag = 0
        self.client, self.keys = None, _Keys()
        self.alive: set[str] = set()
        """Own queues of the workers that the collector was last shown."""
        self.turns: dict[str, dict[str, float]] = {}
        self.pins: dict[str, str] = {}
        self.running: dict[str, str] = {}
        """The turn of each conversation that was sent and has not ended."""
        self.ended: set[str] = set()

    # the dispatcher's part

    def send(self, batches: Sequence[tuple[Batch, Sequence[Handle]]]) -> list[Sent]:
        self._check_up()
        return [self._send(batch, [handle.tag for handle in handles]) for batch, handles in batches]

    def _send(self, batch: Batch, tags: list[int]) -> Sent:
        lost = frozenset(tag for tag in tags if tag not in self.claims)
        if lost:
            return Sent(lost=lost)
        settled = {self.claims.pop(tag).id for tag in tags}
        assert settled == {request.id for request in batch.requests}, "a message is settled without its request"
        for request in batch.requests:
            self.sent[request.id] += 1
            assert request.deadline is None or request.deadline > self.wall_s, "sent after its deadline"
            conversation = conversation_of(request)
            if conversation is not None:
                assert conversation not in self.running, "sent before the turn ahead of it has ended"
                self.running[conversation] = request.id
                self.pins[conversation] = f"own-{batch.engine}"
        assert batch.queue in ("", *self.alive), "sent to a worker that is gone"
        self.batches.append(batch)
        self.outstanding[batch.engine].append(batch)
        return Sent(outstanding=len(self.outstanding[batch.engine]))

    def drop(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self.claims.pop(handle.tag, None)

    def is_held(self, handle: Handle) -> bool:
        return handle.tag in self.claims

    def pass_on(self, items: Sequence[Passing]) -> list[Passing]:
        raise AssertionError("the only collector serves every shard")

    def end(self, batch: Batch) -> None:
        """Every request of it has its result."""
        for request in batch.requests:
            self.ended.add(request.id)
            self.running.pop(conversation_of(request) or "", None)

    # the store's part

    def take_turns(self, asked: Sequence[Asked]) -> list[Told]:
        """As the script: the first that has not ended may go, and stays the first."""
        self._check_up()
        return [self._take_turn(one) for one in asked]

    def _take_turn(self, asked: Asked) -> Told:
        turns = self.turns.setdefault(asked.conversation, {})
        for turn, place in asked.new:
            turns.setdefault(turn, place)
        while (first := min(turns, key=lambda turn: turns[turn], default="")) in self.ended and first != asked.turn:
            del turns[first]
        if first != asked.turn:
            return Told(first)
        turns[first] = 0.0
        return Told(first, self.pins.get(asked.conversation, ""))

    def answer(self, answers: Sequence[Answer]) -> list[bool]:
        self._check_up()
        self.answers += [answer.request_id for answer in answers]
        self.ended.update(self.answers)
        return [True] * len(answers)

    def mark(self, state: str, request_ids: Sequence[str], info: dict[str, Any] | None = None) -> list[bool]:
        self._check_up()
        return [True] * len(request_ids)

    def _check_up(self) -> None:
        if self.down:
            raise RedisConnectionError("gone")


class _Keys:
    dead = "dead"


class Delivery(RuleBasedStateMachine):
    """Arrivals, claims, fleets, clocks and failures in any order."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.accepted: dict[str, InferenceRequest] = {}
        self.slots = {"onnx": 0, "pytorch": 0}
        self.collector = self._new_collector()

    def _new_collector(self) -> Collector:
        world = self.world
        collector = Collector(
            SETTINGS,
            world,  # type: ignore[arg-type]
            world,
            monotonic_s=lambda: world.monotonic_s,
            wall_s=lambda: world.wall_s,
            turns=world,
        )
        self._show_fleet(collector)
        return collector

    def _show_fleet(self, collector: Collector) -> None:
        workers = tuple(
            WorkerRecord(name=engine, engine=engine, slots=slots, queue=f"own-{engine}")
            for engine, slots in self.slots.items()
            if slots
        )
        self.world.alive = {worker.queue for worker in workers}
        outstanding = {engine: len(batches) for engine, batches in self.world.outstanding.items()}
        own = Counter(batch.queue for batches in self.world.outstanding.values() for batch in batches if batch.queue)
        collector.on_fleet(FleetView(workers=workers, outstanding=outstanding, own_outstanding=own))

    @rule(
        model=st.sampled_from(["a", "b"]),
        tokens=st.integers(1, MAX_BATCH_TOKENS + 8),
        tenant=st.sampled_from(["x", "y", "z"]),
        priority=st.integers(0, 9),
        deadline_s=st.none() | st.floats(0.01, 20.0),
        copies=st.integers(1, 6),
        conversation=st.none() | st.sampled_from(["c", "d"]),
    )
    def arrive(
        self,
        model: str,
        tokens: int,
        tenant: str,
        priority: int,
        deadline_s: float | None,
        copies: int,
        conversation: str | None,
    ) -> None:
        for _ in range(copies):
            request_id = f"r{len(self.accepted)}"
            deadline = None if deadline_s is None else self.world.wall_s + deadline_s
            text = "x" * (BYTES_PER_TOKEN * (tokens - 1) + 1)
            fields = {"model": model, "tenant": tenant, "priority": priority, "deadline": deadline}
            request = a_request(request_id, text=text, conversation_id=conversation, **fields)
            request = msgspec.structs.replace(request, submitted_at=self.world.wall_s + len(self.accepted) / 1000)
            self.accepted[request_id] = request
            self.world.queue.append(request)

    @rule(count=st.integers(1, BUFFER))
    def deliver(self, count: int) -> None:
        """The broker hands out what the prefetch limit has room for."""
        for _ in range(min(count, BUFFER - len(self.world.claims), len(self.world.queue))):
            self.world.last_tag += 1
            request = self.world.queue.popleft()
            self.world.claims[self.world.last_tag] = request
            self.collector.on_message(Message(self.world.last_tag, request))
        self.collector.tick()

    @rule(seconds=st.floats(0.001, 8.0))
    def wait(self, seconds: float) -> None:
        self.world.monotonic_s += seconds
        self.world.wall_s += seconds
        self.collector.sweep()
        self.collector.tick()

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.world.wall_s += seconds
        self.collector.sweep()
        self.collector.tick()

    @rule(engine=st.sampled_from(["onnx", "pytorch"]), slots=st.integers(0, 3))
    def fleet_changes(self, engine: str, slots: int) -> None:
        self.slots[engine] = slots
        self._show_fleet(self.collector)
        self.collector.tick()

    @rule(engine=st.sampled_from(["onnx", "pytorch"]), took_s=st.sampled_from([0.01, 1.0, 20.0]))
    def batch_ends(self, engine: str, took_s: float) -> None:
        running = self.world.outstanding[engine]
        if running:
            batch = running.pop(0)
            self.world.end(batch)
            self.collector.on_batch_done(BatchDone(engine, len(running), took_s, len(batch.requests), batch.model))
        self.collector.tick()

    @rule(down=st.booleans())
    def broker_comes_and_goes(self, down: bool) -> None:
        self.world.down = down
        self.collector.tick()

    @precondition(lambda self: self.world.claims)
    @rule(data=st.data())
    def claims_are_lost(self, data: st.DataObject) -> None:
        """Others take this collector for dead and have some of its messages back, of which it does not know."""
        lost = data.draw(st.lists(st.sampled_from(sorted(self.world.claims)), unique=True, max_size=8))
        for tag in sorted(lost, reverse=True):
            self.world.queue.appendleft(self.world.claims.pop(tag))

    @rule()
    def connection_is_lost(self) -> None:
        """All that is held goes back, and the collector is told."""
        self.world.queue.extendleft(reversed(self.world.claims.values()))
        self.world.claims.clear()
        self.collector.forget_all()

    @rule()
    def collector_is_killed(self) -> None:
        """All that is held goes back, and a new collector starts with nothing."""
        self.world.queue.extendleft(reversed(self.world.claims.values()))
        self.world.claims.clear()
        self.collector = self._new_collector()

    @invariant()
    def nothing_is_lost(self) -> None:
        held = [request.id for request in self.world.queue] + [request.id for request in self.world.claims.values()]
        assert len(held) == len(set(held))
        assert set(self.accepted) == set(held) | set(self.world.sent) | set(self.world.answers)

    @invariant()
    def nothing_is_sent_twice(self) -> None:
        assert all(count == 1 for count in self.world.sent.values())

    @invariant()
    def nothing_is_both_sent_and_kept(self) -> None:
        assert not self.world.sent.keys() & {request.id for request in self.world.queue}

    @invariant()
    def no_cap_is_exceeded(self) -> None:
        for batch in self.world.batches:
            assert 0 < len(batch.requests) <= MAX_BATCH_SIZE
            longest = max(text_tokens(request.inputs["text"]) for request in batch.requests)
            assert longest * len(batch.requests) <= MAX_BATCH_TOKENS
        self.world.batches.clear()

    def teardown(self) -> None:
        """Once the broker is up, engines are idle and time passes, everything accepted is sent or answered."""
        if not hasattr(self, "world"):
            return
        self.world.down = False
        self.slots = {"onnx": 2, "pytorch": 2}
        for _ in range(4 + 4 * len(self.accepted)):
            for batches in self.world.outstanding.values():
                for batch in batches:
                    self.world.end(batch)
                batches.clear()
            self._show_fleet(self.collector)
            self.wait(1.0)
            self.deliver(BUFFER)
            if not self.world.queue and not self.world.claims:
                break
        self.nothing_is_lost()
        self.nothing_is_sent_twice()
        assert not self.world.queue
        assert not self.world.claims
        assert self.collector.assembler.num_requests == 0
        assert self.collector.assembler.num_bytes == 0


Delivery.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDelivery = Delivery.TestCase
