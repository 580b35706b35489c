"""The specification's batching properties 5, 6, 7 and 9, on the assembler's own clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.requests import waiting

from muai_batching.assembler import Assembler, BatchKey, BatchPolicy, Formed, Room, should_send, worthwhile_lookahead

KEY = BatchKey("m", "embedding", ("onnx", "pytorch"))
OTHER = BatchKey("other", "embedding", ("onnx", "pytorch"))
NO_LIMIT = Room(0, 0)
FREE = Room(1, 2)
MANY = settings(max_examples=200, deadline=None)


def form_all(assembler: Assembler, now_s: float, room: Room) -> list[Formed]:
    batches = []
    while (formed := assembler.form(now_s, lambda _: room)) is not None:
        batches.append(formed)
    return batches


def ids(batches: list[Formed]) -> list[str]:
    return [item.request.id for batch in batches for item in batch.items]


# Property 5: Compatible requests are batched together
@pytest.mark.property(5)
@MANY
@given(
    arrivals=st.lists(st.tuples(st.sampled_from([KEY, OTHER]), st.floats(0, 0.049)), min_size=1, max_size=80),
    limit=st.integers(1, 40),
)
def test_given_arrivals_within_the_timeout_when_it_ends_then_each_key_has_as_few_batches_as_its_size_allows(
    arrivals: list[tuple[BatchKey, float]], limit: int
) -> None:
    assembler = Assembler(BatchPolicy(max_batch_size=limit, adaptive=False))
    for number, (key, at_s) in enumerate(arrivals):
        assembler.add(key, waiting(str(number), arrived_s=at_s))
    batches = form_all(assembler, 0.2, NO_LIMIT)
    for key in (KEY, OTHER):
        count = sum(1 for other, _ in arrivals if other == key)
        assert sum(1 for batch in batches if batch.key == key) == -(-count // limit)
    assert sorted(ids(batches), key=int) == [str(number) for number in range(len(arrivals))]


# Property 6: Batch processing is triggered by size or timeout
@pytest.mark.property(6)
@MANY
@given(
    count=st.integers(1, 64),
    wait_s=st.floats(0, 0.2),
    limit=st.integers(1, 64),
    minimum=st.integers(1, 64),
)
def test_given_fixed_batching_then_a_batch_leaves_if_and_only_if_it_is_full_or_has_waited_long_enough(
    count: int, wait_s: float, limit: int, minimum: int
) -> None:
    policy = BatchPolicy(max_batch_size=limit, min_batch_size=min(minimum, limit), adaptive=False)
    assert should_send(count, wait_s, NO_LIMIT, policy) == (count >= limit or wait_s >= policy.batch_timeout_s)


# Property 6: … and adaptive batching waits at most the timeout while a slot is free, not at all without a minimum
@pytest.mark.property(6)
@MANY
@given(count=st.integers(1, 64), wait_s=st.floats(0, 0.2), minimum=st.integers(1, 32))
def test_given_an_idle_slot_then_nobody_waits_beyond_the_minimum_or_the_timeout(
    count: int, wait_s: float, minimum: int
) -> None:
    policy = BatchPolicy(min_batch_size=minimum)
    expected = count >= minimum or wait_s >= policy.batch_timeout_s
    assert should_send(count, wait_s, FREE, policy) == expected


@dataclass
class SimulatedEngine:
    """One slot; a batch of n takes b + a·n seconds."""

    per_batch_s: float
    per_request_s: float
    busy_until_s: float = 0.0
    sizes: list[int] = field(default_factory=list)

    def room(self, now_s: float) -> Room:
        return Room(0, 0) if now_s < self.busy_until_s else Room(1, 1)

    def run(self, batch: Formed, now_s: float) -> None:
        self.busy_until_s = now_s + self.per_batch_s + self.per_request_s * len(batch.items)
        self.sizes.append(len(batch.items))


def mean_size_at(requests_per_s: int, duration_s: float = 2.0) -> float:
    engine = SimulatedEngine(per_batch_s=0.020, per_request_s=0.001)
    assembler = Assembler(BatchPolicy())
    arrivals = [number / requests_per_s for number in range(int(requests_per_s * duration_s))]
    now_s, number = 0.0, 0
    while number < len(arrivals) or assembler.num_requests:
        while number < len(arrivals) and arrivals[number] <= now_s:
            assembler.add(KEY, waiting(str(number), arrived_s=arrivals[number]))
            number += 1
        room = engine.room(now_s)
        formed = assembler.form(now_s, lambda _, room=room: room)
        if formed is not None:
            engine.run(formed, now_s)
        now_s += 0.001
    return sum(engine.sizes) / len(engine.sizes)


# Property 7: Batch size adapts to system load
@pytest.mark.property(7)
@settings(max_examples=100, deadline=None)
@given(low=st.integers(5, 30), factor=st.integers(10, 30))
def test_given_more_load_then_batches_grow_by_themselves_up_to_the_limit(low: int, factor: int) -> None:
    quiet, busy = mean_size_at(low), mean_size_at(low * factor)
    assert quiet < 2.0
    assert busy > quiet
    assert busy <= 32


# Property 9: Batching can be disabled
@pytest.mark.property(9)
@MANY
@given(count=st.integers(1, 50), room=st.sampled_from([NO_LIMIT, FREE]))
def test_given_batching_disabled_then_every_request_leaves_alone_and_at_once(count: int, room: Room) -> None:
    assembler = Assembler(BatchPolicy(enabled=False))
    for number in range(count):
        assembler.add(KEY, waiting(str(number)))
    batches = form_all(assembler, 0.0, room)
    assert [len(batch.items) for batch in batches] == [1] * count


item = st.tuples(st.integers(1, 500), st.sampled_from(["a", "b", "c"]), st.integers(0, 9), st.floats(0, 1))


@MANY
@given(items=st.lists(item, min_size=1, max_size=150), limit=st.integers(1, 32), max_tokens=st.integers(500, 4000))
def test_given_any_mix_then_no_cap_is_exceeded_and_nothing_is_lost_or_sent_twice(
    items: list[tuple[int, str, int, float]], limit: int, max_tokens: int
) -> None:
    policy = BatchPolicy(max_batch_size=limit, max_batch_tokens=max_tokens, adaptive=False, lookahead=64)
    assembler = Assembler(policy)
    for number, (tokens, tenant, priority, at_s) in enumerate(items):
        assembler.add(KEY, waiting(str(number), tokens=tokens, tenant=tenant, priority=priority, arrived_s=at_s))
    batches = form_all(assembler, 2.0, NO_LIMIT)
    assert sorted(ids(batches), key=int) == [str(number) for number in range(len(items))]
    assert all(len(batch.items) <= limit for batch in batches)
    assert all(batch.padded_tokens <= max_tokens for batch in batches)
    assert (assembler.num_requests, assembler.num_bytes) == (0, 0)


@MANY
@given(items=st.lists(item, min_size=40, max_size=150))
def test_given_a_backlog_then_the_request_next_in_order_is_in_every_batch(
    items: list[tuple[int, str, int, float]],
) -> None:
    assembler = Assembler(BatchPolicy(max_batch_size=8, adaptive=False, lookahead=32))
    for number, (tokens, tenant, priority, at_s) in enumerate(items):
        assembler.add(KEY, waiting(str(number), tokens=tokens, tenant=tenant, priority=priority, arrived_s=at_s))
    queue = assembler._queues[KEY]
    while assembler.num_requests:
        first = queue.peek(1)[0]
        formed = assembler.form(2.0, lambda _: NO_LIMIT)
        assert formed is not None
        assert first in formed.items


@pytest.mark.parametrize(("count", "limit"), [(1000, 16), (4000, 16), (4000, 32)])
def test_given_a_backlog_that_takes_longer_than_max_wait_then_batches_stay_alike_and_nobody_is_passed_over_for_long(
    count: int, limit: int
) -> None:
    second_per_token, rng = 1 / 9000, random.Random(count)
    policy = BatchPolicy(max_batch_size=limit, max_wait_s=5.0)
    assembler = Assembler(policy)
    for number in range(count):
        assembler.add(KEY, waiting(str(number), tokens=rng.randint(7, 75)))
    lookahead = worthwhile_lookahead(limit * 41 * second_per_token, policy)
    now_s, padded, real, longest_s = 0.0, 0, 0, 0.0
    while (formed := assembler.form(now_s, lambda _: Room(1, 2, lookahead=lookahead))) is not None:
        passed_over = [now_s - item.passed_over_s for item in formed.items if item.passed_over_s is not None]
        longest_s = max([longest_s, *passed_over])
        padded, real = padded + formed.padded_tokens, real + sum(item.tokens for item in formed.items)
        now_s += formed.padded_tokens * second_per_token
    assert padded / real < 1.06
    assert longest_s < policy.max_wait_s * 1.2
    assert count < 4000 or now_s > 3 * policy.max_wait_s
