"""A fleet in simulated time: Poisson arrivals, the collector's own rule of when a batch leaves, engines whose batch of
n takes a·n + b. It yields what the tuner looks at."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from muai_batching.assembler import BatchPolicy, Room, should_send
from muai_producers.performance.bins import bin_of
from muai_producers.performance.series import Tally
from muai_workers.tuning.deciding import Step, advance
from muai_workers.tuning.measuring import stretch_of
from muai_workers.tuning.records import Bounds, Knowledge, Look, Place, Rules, Stretch, TunerState, TuningEvent, Values

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
        """One stretch of time under a load."""
        tally, start_s, end_s = Tally(), self.now_s, self.now_s + seconds
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
                self.waiting.append(moment_s)
                tally.counters["arrived"] += 1
                self.next_s = moment_s + self.random.expovariate(rate)
            elif moment_s == ends_s:
                self._finish(heapq.heappop(self.running), tally)
            self._send(policy)
        self.now_s = end_s
        return stretch_of(tally, start_s, seconds, target_ms)

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


@dataclass
class Run:
    """What a simulation of the tuner gave, interval by interval."""

    goodput: list[float] = field(default_factory=list)
    """Requests answered in time per second."""
    values: list[Values] = field(default_factory=list)
    """That held in the interval."""
    events: list[list[TuningEvent]] = field(default_factory=list)
    """Decided at its end."""


@dataclass
class Simulation:
    """The tuner over a simulated fleet: as its shell runs it, without the shell."""

    fleet: Fleet
    rules: Rules
    values: Values
    state: TunerState = field(default_factory=TunerState)
    knowledge: dict[str, Knowledge] = field(default_factory=dict)
    stretches: list[Stretch] = field(default_factory=list)
    version: int = 0
    run: Run = field(default_factory=Run)
    alter: Callable[[Look], Look] = lambda look: look

    def intervals(self, count: int, rate: float) -> Iterator[Step]:
        """Let so many intervals pass; yields the step after each."""
        for _ in range(count):
            got = [
                self.fleet.run(STRETCH_S, rate, self.values, self.rules.target_ms)
                for _ in range(round(self.rules.interval_s / STRETCH_S))
            ]
            self.stretches = [*self.stretches, *got][-90:]
            self.run.goodput.append(sum(one.in_time for one in got) / self.rules.interval_s)
            self.run.values.append(self.values)
            yield self.step()

    def go(self, count: int, rate: float) -> None:
        """Let so many intervals pass."""
        for _ in self.intervals(count, rate):
            pass

    def look(self) -> Look:
        look = Look(
            now_s=self.fleet.now_s,
            version=self.version,
            changed_by="tuner" if self.version else "",
            values=self.values,
            overridden={},
            stretches=tuple(self.stretches),
            model="m",
            engine="fake",
            device="simulated",
            slots=self.fleet.slots,
            adaptive=self.fleet.adaptive,
        )
        return self.alter(look)

    def recall(self, place: Place) -> Knowledge | None:
        return self.knowledge.get(place.key)

    def step(self) -> Step:
        step = advance(self.state, self.look(), self.recall, self.rules)
        # As it is kept and read again.
        self.state = msgspec.json.decode(msgspec.json.encode(step.state), type=TunerState)
        for place, learnt in step.learnt:
            self.knowledge[place.key] = learnt
        if step.values is not None:
            self.values, self.version = step.values, self.version + 1
        self.run.events.append(list(step.events))
        return step


def goodput_of(fleet: Fleet, rate: float, values: Values, target_ms: float, seconds: float = 300.0) -> float:
    """Requests answered in time per second by a fleet that starts empty."""
    got = [fleet.run(STRETCH_S, rate, values, target_ms) for _ in range(round(seconds / STRETCH_S))]
    return sum(one.in_time for one in got) / seconds
