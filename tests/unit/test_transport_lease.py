"""A wrong verdict here runs long work twice, or leaves a dead consumer's messages where nobody gets them."""

from __future__ import annotations

from muai_batching.transport import LeaseObserver
from muai_batching.transport.lease import consumer_name, declared_ttl_s


def test_given_a_beating_consumer_when_watched_for_long_then_it_is_never_overdue() -> None:
    observer = LeaseObserver(8.0)
    assert all(observer.observe({"a": n}, n * 2.0) == [] for n in range(1000))


def test_given_a_silent_consumer_when_the_lease_has_passed_then_it_is_overdue_with_its_last_count() -> None:
    observer = LeaseObserver(8.0)
    verdicts = [observer.observe({"a": 7}, now_s) for now_s in (0.0, 2.0, 4.0, 6.0, 7.9, 8.1)]
    assert verdicts == [[], [], [], [], [], [("a", 7)]]


def test_given_an_observer_that_slept_when_it_wakes_then_nobody_is_overdue_for_that() -> None:
    observer = LeaseObserver(8.0)
    observer.observe({"a": 7}, 0.0)
    assert observer.observe({"a": 7}, 3600.0) == []
    assert observer.observe({"a": 8}, 3602.0) == []


def test_given_a_consumer_that_was_given_up_when_seen_then_its_claims_are_taken_at_once() -> None:
    assert LeaseObserver(8.0).observe({"a": -1, "b": 3}, 0.0) == [("a", -1)]


def test_given_a_consumer_that_went_and_came_back_when_seen_again_then_its_silence_starts_anew() -> None:
    observer = LeaseObserver(8.0)
    for now_s in (0.0, 4.0):
        observer.observe({"a": 1}, now_s)
    observer.observe({}, 6.0)
    assert observer.observe({"a": 1}, 8.0) == []


def test_given_a_consumer_with_a_longer_lease_than_the_observers_when_silent_then_its_own_lease_counts() -> None:
    patient, hasty = consumer_name("host", 1, "abc", 8.0), consumer_name("host", 2, "def", 0.25)
    assert (declared_ttl_s(patient), declared_ttl_s(hasty), declared_ttl_s("x:1:2")) == (8.0, 0.25, 0.0)
    observer = LeaseObserver(1.0)
    overdue_at: dict[str, float] = {}
    for tick in range(40):
        for consumer, _ in observer.observe({patient: 0, hasty: 0}, tick * 0.25):
            overdue_at.setdefault(consumer, tick * 0.25)
    assert overdue_at == {hasty: 1.0, patient: 8.0}
