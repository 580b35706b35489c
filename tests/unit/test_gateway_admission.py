"""One client's refusal is nobody else's, and a full queue is not asked again for everybody."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.requests import a_request

from muai_producers.errors import BrokerError, IdempotencyConflictError, MuaiError, QueueFullError
from muai_producers.gateway.admission import admit_each
from muai_producers.wire import InferenceRequest


class Queue:
    """Admits all of a call or none, like the real one; models named 'bad' conflict, 'odd' raise what is no error of
    ours."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.accepted: list[str] = []
        self.calls = 0
        self.down = False

    def submit(self, requests: Sequence[InferenceRequest]) -> list[str]:
        self.calls += 1
        if self.down:
            raise BrokerError("Redis did not take the request", {"accepted": []})
        if any(request.model == "odd" for request in requests):
            raise OverflowError("too large")
        if any(request.model == "bad" for request in requests):
            raise IdempotencyConflictError("used before")
        fresh = [request for request in requests if request.idempotency_key != "known"]
        if len(self.accepted) + len(fresh) > self.room:
            details = {"limit": "queue_capacity", "allowed": self.room, "in_flight": len(self.accepted)}
            raise QueueFullError("full", {**details, "retry_after_s": 1.0, "accepted": []})
        self.accepted += [request.id for request in fresh]
        return ["first" if request.idempotency_key == "known" else request.id for request in requests]


def requests_of(models: Sequence[str]) -> list[InferenceRequest]:
    return [a_request(f"r{n}", model=model) for n, model in enumerate(models)]


@given(st.lists(st.sampled_from(["good", "good", "good", "bad", "odd"]), max_size=40), st.integers(0, 40))
def test_each_request_gets_its_own_outcome_in_order_and_all_room_is_used(models: list[str], room: int) -> None:
    queue = Queue(room)
    requests = requests_of(models)
    outcomes = admit_each(queue.submit, requests)
    assert len(outcomes) == len(requests)
    accepted = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert accepted == queue.accepted
    assert len(accepted) == min(room, models.count("good"))
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, str):
            assert outcome == request.id
        elif request.model == "good":
            assert isinstance(outcome, QueueFullError)
        else:
            # what is wrong with a request may be hidden by a full queue, never the other way round
            assert isinstance(outcome, MuaiError)


def test_given_one_bad_request_of_256_then_it_is_found_by_halving() -> None:
    queue = Queue()
    outcomes = admit_each(queue.submit, requests_of(["bad" if n == 100 else "good" for n in range(256)]))
    assert [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, str)] == [100]
    assert isinstance(outcomes[100], IdempotencyConflictError)
    assert queue.calls <= 1 + 2 * math.log2(256)


def test_given_no_room_at_all_then_one_call_refuses_all_but_what_is_known() -> None:
    queue = Queue(room=0)
    requests = requests_of(["good"] * 100)
    requests[7] = a_request("r7", idempotency_key="known")
    outcomes = admit_each(queue.submit, requests)
    assert outcomes[7] == "first"
    refusals = [outcome for outcome in outcomes if isinstance(outcome, QueueFullError)]
    assert len(refusals) == 99
    assert "accepted" not in refusals[0].details
    assert queue.calls == 2


def test_given_the_broker_is_gone_then_it_is_asked_once() -> None:
    queue = Queue()
    queue.down = True
    outcomes = admit_each(queue.submit, requests_of(["good"] * 50))
    assert all(isinstance(outcome, BrokerError) and not outcome.details for outcome in outcomes)
    assert queue.calls == 1


def test_given_an_unforeseen_error_then_its_text_stays_inside(caplog: pytest.LogCaptureFixture) -> None:
    (outcome,) = admit_each(Queue().submit, requests_of(["odd"]))
    assert isinstance(outcome, MuaiError)
    assert outcome.code == "internal_error"
    assert "too large" not in outcome.message
    assert "too large" in caplog.text
