"""Invariant 9: turns of one conversation go, in order, to the worker holding its cache while it lives and has room."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.requests import a_request

from muai_batching.affinity import Bereaved, Owner, owner_of, way_of
from muai_batching.assembler import BatchKey
from muai_batching.fair_queue import Waiting
from muai_batching.turns import HeldTurns
from muai_producers.conversations import Asked, conversation_of
from muai_producers.fleet import FleetView, WorkerRecord

CHAIN = ("vllm", "pytorch")
QUEUES = st.sampled_from(["", "q1", "q2", "q3", "gone"])
WORKERS = st.lists(
    st.builds(
        WorkerRecord,
        name=st.uuids().map(str),
        engine=st.sampled_from(["vllm", "pytorch", "onnx"]),
        slots=st.integers(0, 4),
        queue=st.sampled_from(["", "q1", "q2", "q3"]),
    ),
    max_size=4,
    unique_by=lambda worker: worker.queue or worker.name,
)
COOLING = st.dictionaries(st.tuples(st.sampled_from(CHAIN), st.just("m")), st.just("it failed"), max_size=2)
IDLE = st.integers(-5, 5)
LOADS = st.floats(0.1, 20.0)


@given(queue=QUEUES, workers=WORKERS, cooling=COOLING, unfinished=st.integers(0, 50), idle=IDLE, load=LOADS)
def test_invariant_9_given_any_fleet_then_no_turn_goes_to_a_worker_that_is_dead_or_may_not_serve_it(
    queue: str,
    workers: list[WorkerRecord],
    cooling: Mapping[tuple[str, str], str],
    unfinished: int,
    idle: int,
    load: float,
) -> None:
    owner = owner_of(queue, "m", CHAIN, FleetView(workers=tuple(workers), cooling=cooling), unfinished)
    alive = [worker for worker in workers if queue and worker.queue == queue]
    serves = [
        worker for worker in alive if worker.engine in CHAIN and worker.slots and (worker.engine, "m") not in cooling
    ]
    way = way_of(owner, idle, load)
    assert (way == "gone") == (not serves)
    if way == "pinned":
        assert owner is not None
        assert owner.engine == serves[0].engine


@given(slots=st.integers(1, 16), unfinished=st.integers(0, 60), idle=IDLE, load=LOADS)
def test_invariant_9_given_a_live_owner_then_it_gets_the_turn_below_the_load_and_others_only_above(
    slots: int, unfinished: int, idle: int, load: float
) -> None:
    owner = Owner("vllm", slots, unfinished)
    has_room = unfinished < load * slots
    way = way_of(owner, idle, load)
    assert way == ("pinned" if has_room else "spill" if idle > 0 else "wait")
    assert way_of(owner, idle, load, may_wait=False) == ("pinned" if has_room else "spill")
    assert (owner.room(load) > 0) == has_room


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)


@given(first=st.tuples(NAMES, NAMES, NAMES), second=st.tuples(NAMES, NAMES, NAMES))
def test_invariant_9_given_any_names_then_no_two_tenants_conversations_or_models_share_a_pin(
    first: tuple[str, str, str], second: tuple[str, str, str]
) -> None:
    def name(of: tuple[str, str, str]) -> str | None:
        tenant, conversation, model = of
        return conversation_of(a_request(tenant=tenant, conversation_id=conversation, model=model))

    assert (name(first) == name(second)) == (first == second)
    assert conversation_of(a_request(tenant=first[0], model=first[2])) is None


@given(
    looks=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.frozensets(st.sampled_from(["q1", "q2", "q3"]))), min_size=1, max_size=20
    )
)
def test_invariant_9_given_any_looks_then_a_queue_is_closed_when_its_worker_was_missing_in_all_of_the_grace_time(
    looks: list[tuple[float, frozenset[str]]],
) -> None:
    bereaved, now_s = Bereaved(4.0), 100.0
    queues = dict.fromkeys(("q1", "q2", "q3"), "pytorch")
    first_missing: dict[str, float] = {}
    for pause_s, alive in looks:
        now_s += pause_s
        for queue in queues:
            if queue in alive:
                first_missing.pop(queue, None)
            else:
                first_missing.setdefault(queue, now_s)
        workers = [WorkerRecord(name=queue, engine="pytorch", slots=1, queue=queue) for queue in alive]
        closed = bereaved.observe(queues, workers, now_s)
        assert closed == [queue for queue in queues if queue in first_missing and now_s - first_missing[queue] >= 4.0]


class TurnsOfOneConversation(RuleBasedStateMachine):
    """Two collectors and the state store, in a model of it: whatever comes, dies or ends, no two turns run at once, and
    among the turns that the store knows none goes before an earlier one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectors = [HeldTurns(), HeldTurns()]
        self.store: dict[str, float] = {}
        """As the script's sorted set: turns that have not ended, each with its place."""
        self.running: dict[str, int] = {}
        self.where: dict[str, tuple[int, float]] = {}
        self.number = 0
        self.begun: set[str] = set()
        self.ended: set[str] = set()

    @rule(collector=st.integers(0, 1), apart=st.sampled_from([0.0, 1.0]))
    def arrive(self, collector: int, apart: float) -> None:
        self.number += 1
        submitted_at = 1000.0 + (self.number if apart else 0.0)
        turn = f"t{self.number}"
        self.where[turn] = (collector, submitted_at)
        self._hold(turn)

    def _hold(self, turn: str) -> None:
        collector, submitted_at = self.where[turn]
        request = a_request(turn, conversation_id="c")
        item = Waiting(type(request)(id=turn, model="m", inputs={}, submitted_at=submitted_at), 1, 0.0, queued=True)
        self.collectors[collector].add("c", BatchKey("m", "chat", CHAIN), item)

    @rule(collector=st.integers(0, 1))
    def ask(self, collector: int) -> None:
        held = self.collectors[collector]
        for asked in held.questions(10):
            self._let_go(held, collector, asked)

    def _let_go(self, held: HeldTurns, collector: int, asked: Asked) -> None:
        for turn, place in asked.new:
            self.store.setdefault(turn, place)
        for turn in [turn for turn in self.store if turn in self.ended and turn != asked.turn]:
            del self.store[turn]
        first = min(self.store, key=lambda turn: (self.store[turn], turn), default="")
        if first == asked.turn:
            self.store[first] = 0.0
        gone = held.answered(asked, first)
        if gone is not None:
            turn = gone.item.request.id
            if turn not in self.begun:
                earliest = min(self.where[one][1] for one in self.store)
                assert self.where[turn][1] == earliest, "an earlier turn was known, and had not ended"
            self.begun.add(turn)
            gone.item.queued = False
            self.running[turn] = collector

    @precondition(lambda self: self.running)
    @rule()
    def end(self) -> None:
        turn = next(iter(self.running))
        del self.running[turn]
        self.ended.add(turn)
        self.store.pop(turn, None)
        for held in self.collectors:
            held.wake("c")

    @rule(collector=st.integers(0, 1))
    def die(self, collector: int) -> None:
        """Its messages come again at the other one, those of turns that it had let go and not sent yet among them."""
        other = 1 - collector
        self.collectors[collector].clear()
        for turn, (at, submitted_at) in list(self.where.items()):
            if at == collector and turn not in self.ended:
                self.running.pop(turn, None)
                self.where[turn] = (other, submitted_at)
                self._hold(turn)

    @invariant()
    def one_at_a_time(self) -> None:
        assert len(self.running) <= 1

    def teardown(self) -> None:
        """Nothing is held for ever."""
        for _ in range(4 * (self.number + 1)):
            for collector, held in enumerate(self.collectors):
                held.wake_all()
                for asked in held.questions(10):
                    self._let_go(held, collector, asked)
            if self.running:
                self.end()
        assert self.ended == set(self.where)


TestInvariant9TurnsOfOneConversation = TurnsOfOneConversation.TestCase
TestInvariant9TurnsOfOneConversation.settings = settings(max_examples=60, stateful_step_count=30)
