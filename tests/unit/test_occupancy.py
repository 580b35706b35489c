"""What may be sent to engines now: at once where a slot is idle, ahead only when a long batch nears its end."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_batching.assembler import NO_ROOM, Room
from muai_batching.occupancy import HELD_FROM_S, HELD_SHARE, Occupancy
from muai_producers.fleet import BatchDone, FleetView, WorkerRecord

LONG_S = 10.0


def occupancy(slots: int = 1) -> Occupancy:
    made = Occupancy()
    made.on_fleet(FleetView(workers=(WorkerRecord(name="w", engine="onnx", slots=slots),)))
    return made


def test_nothing_is_sent_ahead_of_a_long_batch_before_half_of_it_is_over() -> None:
    busy = occupancy()
    busy.sending("onnx", LONG_S, 100.0)
    from_s = 100.0 + HELD_SHARE * LONG_S
    assert busy.room("onnx", 100.0) is NO_ROOM
    assert busy.room("onnx", from_s - 0.01) is NO_ROOM
    assert busy.next_room_s(100.0) == from_s
    assert busy.room("onnx", from_s) == Room(0, 1)
    assert busy.next_room_s(from_s) is None


def test_what_has_begun_holds_the_next_as_what_was_sent_does() -> None:
    busy = occupancy()
    busy.sending("onnx", LONG_S, 0.0)
    busy.sending("onnx", LONG_S, 6.0)
    assert busy.room("onnx", 6.0) is NO_ROOM
    busy.on_batch_done(BatchDone("onnx", 1, LONG_S, 4, "m"), 10.0)
    assert busy.room("onnx", 10.0) is NO_ROOM
    assert busy.room("onnx", 15.0) == Room(0, 1)


@pytest.mark.parametrize("expected_s", [0.0, HELD_FROM_S / 2])
def test_batches_that_are_short_or_of_unknown_length_have_one_behind_them_at_once(expected_s: float) -> None:
    busy = occupancy()
    busy.sending("onnx", expected_s, 0.0)
    assert busy.room("onnx", 0.0) == Room(0, 1)
    assert busy.next_room_s(0.0) is None


def test_many_slots_become_free_more_often_than_one() -> None:
    busy = occupancy(slots=4)
    for _ in range(4):
        busy.sending("onnx", LONG_S, 0.0)
    assert busy.room("onnx", HELD_SHARE * LONG_S / 4) == Room(0, 4)


def test_a_batch_that_was_not_sent_after_all_leaves_its_slot_idle() -> None:
    busy = occupancy()
    busy.sending("onnx", LONG_S, 0.0)
    busy.not_sent("onnx")
    assert busy.room("onnx", 0.0) == Room(1, 2)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.floats(0, 30)), max_size=40),
    slots=st.integers(1, 4),
)
def test_an_idle_slot_is_offered_whatever_went_before(steps: list[tuple[bool, float]], slots: int) -> None:
    busy, now_s, running = occupancy(slots), 0.0, 0
    for begins, seconds in steps:
        if begins and running < 2 * slots:
            busy.sending("onnx", seconds, now_s)
            running += 1
        elif running:
            running -= 1
            busy.on_batch_done(BatchDone("onnx", running, seconds, 1, "m"), now_s)
        room = busy.room("onnx", now_s)
        assert room.idle == max(0, slots - running)
        assert room.ahead <= 2 * slots - running
        now_s += seconds / 7


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_no_slot_waits_for_its_next_batch_as_long_as_batches_are_of_about_the_same_length(slots: int) -> None:
    rng, busy, now_s = random.Random(slots), occupancy(slots), 0.0
    running: list[tuple[float, float]] = []
    waiting = starved = 0
    for _ in range(500):
        while (room := busy.room("onnx", now_s)).ahead > 0:
            busy.sending("onnx", LONG_S, now_s)
            if room.idle > 0:
                starved += now_s > 0.0
                heapq.heappush(running, (now_s + rng.uniform(0.7, 1.3) * LONG_S, now_s))
            else:
                waiting += 1
        held_until_s = busy.next_room_s(now_s)
        if held_until_s is not None and held_until_s < running[0][0]:
            now_s = held_until_s
            continue
        now_s, began_s = heapq.heappop(running)
        if waiting:
            waiting -= 1
            heapq.heappush(running, (now_s + rng.uniform(0.7, 1.3) * LONG_S, now_s))
        busy.on_batch_done(BatchDone("onnx", len(running) + waiting, now_s - began_s, 1, "m"), now_s)
    assert starved == 0
