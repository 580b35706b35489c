"""Steps that are tried on one of two collectors first, in simulated time with given seeds."""

from __future__ import annotations

import pytest
from tests.tuning_simulation import Fleet, ShardedSimulation, in_time_share, rules

from muai_workers.tuning.records import Values

TARGET_MS = 500.0
HIGH = 100.0
INTERVALS = 24


def values(size: int = 4) -> Values:
    return Values(batch_size=size, batch_timeout_ms=50, cache_size_mb=1024)


def simulation(start: Values, seed: int = 1, **more: object) -> ShardedSimulation:
    return ShardedSimulation(Fleet(seed=seed), rules(TARGET_MS), start, **more)  # type: ignore[arg-type]


def outcomes(subject: ShardedSimulation) -> list[str]:
    return [event.outcome for events in subject.run.events for event in events]


@pytest.mark.parametrize(("start", "seed"), [(4, 1), (1, 2), (8, 3)])
def test_given_two_collectors_then_a_step_is_everybodys_only_after_it_has_helped_at_one(start: int, seed: int) -> None:
    subject = simulation(values(start), seed)
    run = subject.go(INTERVALS, HIGH)
    assert "spread" in outcomes(subject)
    for (_, others), (there_before, others_before) in zip(subject.applied[1:], subject.applied, strict=False):
        assert others in (others_before, there_before), "the others got what nobody had tried"
    best = max(
        in_time_share(Fleet(seed=7), HIGH, values(size), TARGET_MS, seconds=100.0) for size in (4, 8, 16, 32, 64)
    )
    assert min(run.in_time[-5:]) >= 0.95 * best, (run.in_time, run.values)
    assert run.changes(last=5) <= 1, run.events


def until_on_trial(subject: ShardedSimulation) -> None:
    for _ in range(INTERVALS):
        subject.go(1, HIGH)
        if subject.alone_at:
            return
    raise AssertionError("nothing was tried")


def test_given_a_step_that_hurts_the_canary_then_the_others_never_had_it_and_it_is_taken_back_within_two() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.alone = values(1)  # planted: with these its engines serve less
    subject.go(2, HIGH)
    assert "rolled_back" in outcomes(subject)
    assert subject.alone != values(1)
    assert {others.batch_size for _, others in subject.applied} == {4}


def test_given_a_canary_that_has_gone_then_its_trial_is_taken_back_unjudged() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.canary = "c2 (collector)"
    subject.go(1, HIGH)
    assert outcomes(subject)[0] == "rolled_back"
    assert "is gone" in subject.run.events[0][0].rationale
    assert not subject.alone_at


def test_given_somebody_elses_version_during_a_trial_then_it_ends_and_says_who() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.set(subject.values, "ada")
    subject.go(1, HIGH)
    assert outcomes(subject)[0] == "rolled_back"
    assert "ada" in subject.run.events[0][0].rationale


def test_given_a_tuner_that_died_before_it_set_what_it_meant_to_try_then_it_begins_anew() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.alone, subject.alone_at, subject.version = None, "", subject.state.version
    subject.go(1, HIGH)
    assert "rolled_back" not in outcomes(subject)
    subject.go(1, HIGH)
    assert subject.alone_at, "it is tried again"


def test_given_a_tuner_that_died_before_it_ended_a_trial_then_the_end_is_made_good() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.state = type(subject.state)(values=subject.values, version=subject.version, place=subject.state.place)
    step = subject.step()
    assert (step.values, step.canary) == (subject.values, "")
    assert not subject.alone_at


def test_given_an_incident_during_a_trial_then_the_canary_has_what_the_others_have_at_once() -> None:
    subject = simulation(values(4))
    until_on_trial(subject)
    subject.incident = "alert latency is open: slow"
    subject.step()
    assert not subject.alone_at
