"""A fleet in simulated time: Poisson arrivals, the collector's own rule of when a batch leaves, engines whose batch of
n takes a·n + b. It yields what the tuner looks at."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

import msgspec

from muai_batching.assembler import BatchPolicy, Room, should_send
from muai_producers.performance.bins import bin_of
from muai_producers.performance.series import Tally
from muai_workers.tuning.deciding import Step, advance
from muai_workers.tuning.measuring import stretch_of
from muai_workers.tuning.records import Bounds, Knowledge, Look, Rules, Stretch, TunerState, TuningEvent, Values

STRETCH_S = 10.0


@dataclass
class Fleet:
    """Collector and engine slots, and everything that waits."""

    per_request_ms: float = 4.0
    per_batch_ms: float = 60.0
    slots: int = 1
    adaptive: bool = True
    seed: int = 1
    noise: float = 0.05
    now_s: float = 0.0
    room: int = 1_000_000
    """Requests that the collector holds at most; the rest wait at the broker, and have not arrived for its figures."""
    broker: deque[float] = field(default_factory=deque)
    waiting: deque[float] = field(default_factory=deque)
    """When each request came that waits for its batch."""
    ready: deque[tuple[float, list[float]]] = field(default_factory=deque)
    """Batches that are formed and wait for a slot."""
    running: list[tuple[float, float, float, list[float]]] = field(default_factory=list)
    """End, start, when it was formed, and its requests."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.next_s = 0.0

    def run(self, seconds: float, rate: float, values: Values, target_ms: float) -> Stretch:
        """One stretch of time under a load, as the tuner sees it."""
        start_s = self.now_s
        return stretch_of(self.run_counted(seconds, rate, values), start_s, seconds, target_ms)

    def run_counted(self, seconds: float, rate: float, values: Values) -> Tally:
        """One stretch of time under a load, as it is counted."""
        tally, end_s = Tally(), self.now_s + seconds
        policy = BatchPolicy(
            max_batch_size=values.batch_size, batch_timeout_s=values.batch_timeout_ms / 1000, adaptive=self.adaptive
        )
        self.next_s = self.now_s + self.random.expovariate(rate)
        while True:
            due_s = self.waiting[0] + policy.batch_timeout_s if self.waiting else float("inf")
            ends_s = self.running[0][0] if self.running else float("inf")
            moment_s = min(self.next_s, ends_s, max(due_s, self.now_s) if not self.adaptive else float("inf"))
            if moment_s >= end_s:
                break
            self.now_s = moment_s
            if moment_s == self.next_s:
                self.broker.append(moment_s)
                self.next_s = moment_s + self.random.expovariate(rate)
            elif moment_s == ends_s:
                self._finish(heapq.heappop(self.running), tally)
            while self.broker and len(self.waiting) < self.room:
                self.waiting.append(self.broker.popleft())
                tally.counters["arrived"] += 1
            self._send(policy)
        self.now_s = end_s
        return tally

    @property
    def in_flight(self) -> int:
        """Requests that came and are not answered."""
        formed = sum(len(batch[-1]) for batch in (*self.ready, *self.running))
        return len(self.broker) + len(self.waiting) + formed

    def _send(self, policy: BatchPolicy) -> None:
        while self.waiting:
            outstanding = len(self.ready) + len(self.running)
            room = Room(max(0, self.slots - outstanding), max(0, 2 * self.slots - outstanding))
            if not should_send(len(self.waiting), self.now_s - self.waiting[0] + 1e-9, room, policy):
                break
            size = min(len(self.waiting), policy.max_batch_size)
            self.ready.append((self.now_s, [self.waiting.popleft() for _ in range(size)]))
            self._start()
        self._start()

    def _start(self) -> None:
        while self.ready and len(self.running) < self.slots:
            formed_s, requests = self.ready.popleft()
            took_ms = (self.per_request_ms * len(requests) + self.per_batch_ms) * self.random.gauss(1.0, self.noise)
            heapq.heappush(self.running, (self.now_s + max(0.1, took_ms) / 1000, self.now_s, formed_s, requests))

    def _finish(self, batch: tuple[float, float, float, list[float]], tally: Tally) -> None:
        end_s, start_s, formed_s, requests = batch
        n, took_us = len(requests), round(1e6 * (end_s - start_s))
        tally.sizes[n] += 1
        sums = {"fit_count": 1, "fit_n": n, "fit_nn": n * n, "fit_us": took_us, "fit_n_us": n * took_us}
        for name, amount in sums.items():
            tally.counters[name] += amount
        tally.counters["ok"] += n
        for came_s in requests:
            for stage, seconds in (
                ("batching", formed_s - came_s),
                ("dispatch", start_s - formed_s),
                ("inference", end_s - start_s),
                ("total", end_s - came_s),
            ):
                tally.durations[stage][bin_of(1000 * seconds)] += 1


def rules(
    target_ms: float = 500.0, *, sizes: tuple[int, int] = (1, 128), timeouts: tuple[int, int] = (1, 500)
) -> Rules:
    return Rules(
        bounds={"batch_size": Bounds(*sizes), "batch_timeout_ms": Bounds(*timeouts)},
        interval_s=60.0,
        window_s=300.0,
        target_ms=target_ms,
    )


CHANGES = ("raised", "lowered", "recalled", "rolled_back")


@dataclass
class Run:
    """What a simulation of the tuner gave, interval by interval."""

    in_time: list[float] = field(default_factory=list)
    """Share of what came that was answered in time: goodput over the load."""
    values: list[Values] = field(default_factory=list)
    """That held in the interval."""
    events: list[list[TuningEvent]] = field(default_factory=list)
    """Decided at its end."""

    def changes(self, last: int) -> int:
        """In how many of the last intervals anything was changed."""
        return sum(any(event.outcome in CHANGES for event in events) for events in self.events[-last:])


@dataclass
class Simulation:
    """The tuner over a simulated fleet: as its shell runs it, without the shell."""

    fleet: Fleet
    rules: Rules
    values: Values
    stretch_s: float = STRETCH_S
    state: TunerState = field(default_factory=TunerState)
    knowledge: dict[str, Knowledge] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    version: int = 0
    changed_by: str = ""
    run: Run = field(default_factory=Run)
    incident: str = ""

    def go(self, count: int, rate: float) -> Run:
        """Let so many intervals pass; returns what they gave."""
        self.run = Run()
        for _ in range(count):
            got = [
                self.fleet.run(self.stretch_s, rate, self.values, self.rules.target_ms)
                for _ in range(round(self.rules.interval_s / self.stretch_s))
            ]
            self.stretches = [*self.stretches, *got][-90:]
            self.run.in_time.append(sum(one.in_time for one in got) / sum(one.arrived for one in got))
            self.run.values.append(self.values)
            self.run.events.append(list(self.step().events))
        return self.run

    def look(self) -> Look:
        return Look(
            now_s=self.fleet.now_s,
            version=self.version,
            changed_by=self.changed_by,
            values=self.values,
            overridden={},
            stretches=tuple(self.stretches),
            model="m",
            engine="fake",
            device="simulated",
            slots=self.fleet.slots,
            adaptive=self.fleet.adaptive,
            incident=self.incident,
            in_flight=self.fleet.in_flight,
        )

    def decide(self) -> Step:
        """What the tuner would do now; the state is kept, and nothing is set."""
        step = advance(self.state, self.look(), lambda place: self.knowledge.get(place.key), self.rules)
        # As it is kept and read again.
        self.state = msgspec.json.decode(msgspec.json.encode(step.state), type=TunerState)
        self.knowledge |= {place.key: learnt for place, learnt in step.learnt}
        return step

    def step(self) -> Step:
        """Let the tuner decide, and do as it says."""
        step = self.decide()
        if step.values is not None:
            self.set(step.values, "tuner")
        return step

    def set(self, values: Values, by: str) -> None:
        """A new version of the runtime configuration."""
        self.values, self.version, self.changed_by = values, self.version + 1, by


@dataclass
class ShardedSimulation(Simulation):
    """Two collectors, each with a load and engines of its own; `fleet` is what the canary batches."""

    other: Fleet = field(default_factory=lambda: Fleet(seed=99))
    other_rate: float = 20.0
    canary: str = "c1 (collector)"
    """As the tuner sees it; another one after it has gone."""
    alone: Values | None = None
    """What `c1` has for itself."""
    alone_at: str = ""
    canary_stretches: list[Stretch] = field(default_factory=list)
    applied: list[tuple[Values, Values]] = field(default_factory=list)
    """What either collector worked by, interval by interval."""

    def go(self, count: int, rate: float) -> Run:
        self.run = Run()
        for _ in range(count):
            there = self.alone or self.values
            self.applied.append((there, self.values))
            in_time = arrived = 0
            for _ in range(round(self.rules.interval_s / STRETCH_S)):
                start_s, target_ms = self.fleet.now_s, self.rules.target_ms
                tally = self.fleet.run_counted(STRETCH_S, rate, there)
                self.canary_stretches.append(stretch_of(tally, start_s, STRETCH_S, target_ms))
                tally.add(self.other.run_counted(STRETCH_S, self.other_rate, self.values))
                self.stretches.append(stretch_of(tally, start_s, STRETCH_S, target_ms))
                in_time, arrived = in_time + self.stretches[-1].in_time, arrived + self.stretches[-1].arrived
            self.run.in_time.append(in_time / arrived)
            self.run.values.append(self.values)
            self.run.events.append(list(self.step().events))
        return self.run

    def look(self) -> Look:
        return msgspec.structs.replace(
            super().look(),
            canary=self.canary,
            canary_stretches=tuple(self.canary_stretches[-90:]),
            stretches=tuple(self.stretches[-90:]),
            alone=self.alone_at,
            slots=self.fleet.slots + self.other.slots,
            in_flight=self.fleet.in_flight + self.other.in_flight,
        )

    def step(self) -> Step:
        step = self.decide()
        if step.values is not None and step.canary:
            self.alone, self.alone_at = step.values, step.canary
            self.version, self.changed_by = self.version + 1, "tuner"
        elif step.values is not None:
            self.set(step.values, "tuner")
        return step

    def set(self, values: Values, by: str) -> None:
        super().set(values, by)
        self.alone, self.alone_at = None, ""


def in_time_share(fleet: Fleet, rate: float, values: Values, target_ms: float, seconds: float = 200.0) -> float:
    """Share of requests answered in time by a fleet that starts empty."""
    got = [fleet.run(STRETCH_S, rate, values, target_ms) for _ in range(round(seconds / STRETCH_S))]
    return sum(one.in_time for one in got) / sum(one.arrived for one in got)
