"""The specification's properties 34 to 39, of the pure core: what is found, what is told of it, and where to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muai_config.monitoring import AnomalySettings
from muai_producers.alerts.records import Alert, AlertState, DeliveryState, Finding
from muai_producers.performance.bins import bin_of, quantiles
from muai_producers.performance.report import SeriesFigures, series_figures
from muai_producers.performance.series import Series, Tally
from muai_workers.monitoring.alert_states import REFRESH_S, AlertRules, advance
from muai_workers.monitoring.delivering import MAX_ATTEMPTS, after_attempt, backoff_s, deliveries_of
from muai_workers.monitoring.detector import (
    MIN_BASELINE_MINUTES,
    Demand,
    GpuLook,
    Look,
    Minute,
    QueueLook,
    baseline,
    findings,
    over_latency,
    throughput_finding,
)

MANY = settings(max_examples=200, deadline=None)
NOW_S = 1_790_000_000.0
WINDOW_S = 60.0
latencies = st.lists(st.floats(0.1, 100_000), min_size=1, max_size=60)


def figures(latencies_ms: list[float], *, ok: int | None = None, **errors: int) -> SeriesFigures:
    tally = Tally()
    for latency_ms in latencies_ms:
        tally.durations["total"][bin_of(latency_ms)] += 1
    tally.counters["ok"] = len(latencies_ms) if ok is None else ok
    for code, count in errors.items():
        tally.counters[f"error:{code}"] = count
    return series_figures(Series("m", "*", "*"), tally, WINDOW_S)


def found(look: Look, kind: str, **changes: Any) -> list[Finding]:
    return [finding for finding in findings(look, AnomalySettings(**changes)) if finding.type == kind]


@pytest.mark.property(34)
@MANY
@given(values=latencies, threshold_ms=st.floats(1, 50_000), min_requests=st.integers(1, 20))
def test_given_any_latencies_then_a_latency_alert_exactly_when_the_95th_percentile_is_above_the_threshold(
    values: list[float], threshold_ms: float, min_requests: int
) -> None:
    look = Look(WINDOW_S, models=[figures(values)])
    got = found(look, "latency", latency_threshold_ms=threshold_ms, min_requests=min_requests)
    [p95_ms] = (
        quantiles({bin_of(value): sum(bin_of(v) == bin_of(value) for v in values) for value in values}, (0.95,)) or []
    )
    assert bool(got) == (round(p95_ms, 4) > threshold_ms and len(values) >= min_requests)
    assert all(finding.subject == "m" and finding.severity in ("error", "critical") for finding in got)


@pytest.mark.property(34)
@MANY
@given(latency_ms=st.floats(0, 100_000), threshold_ms=st.floats(1, 50_000))
def test_given_any_operation_above_the_threshold_then_an_alert(latency_ms: float, threshold_ms: float) -> None:
    got = over_latency("embed", latency_ms, AnomalySettings(latency_threshold_ms=threshold_ms))
    assert (got is not None) == (latency_ms > threshold_ms)


@pytest.mark.property(35)
@MANY
@given(
    ok=st.integers(0, 500),
    failed=st.integers(0, 500),
    wrong=st.integers(0, 500),
    threshold=st.floats(0, 1),
    min_requests=st.integers(1, 50),
)
def test_given_any_outcomes_then_an_error_alert_exactly_when_the_fleets_own_errors_are_above_the_threshold(
    ok: int, failed: int, wrong: int, threshold: float, min_requests: int
) -> None:
    model = figures([], ok=ok, engines_exhausted=failed, invalid_request=wrong, cancelled=wrong)
    got = found(Look(WINDOW_S, models=[model]), "error_rate", error_rate_threshold=threshold, min_requests=min_requests)
    judged = ok + failed
    expected = judged >= min_requests and judged > 0 and round(failed / judged, 6) > threshold
    assert bool(got) == expected, "wrong and cancelled requests are no fault of the fleet"


@pytest.mark.property(36)
@MANY
@given(percents=st.dictionaries(st.sampled_from(["a", "b", "a gpu0"]), st.floats(0, 100)), threshold=st.floats(0, 100))
def test_given_any_memory_use_then_an_alert_for_each_host_and_gpu_above_the_threshold(
    percents: dict[str, float], threshold: float
) -> None:
    got = found(Look(WINDOW_S, memory_percent=percents), "memory", memory_threshold_percent=threshold)
    assert {finding.subject for finding in got} == {name for name, percent in percents.items() if percent > threshold}


def test_given_a_gpu_whose_engine_reserves_its_memory_then_only_more_than_that_is_news() -> None:
    def subjects(percent: float) -> list[str]:
        look = Look(WINDOW_S, memory_percent={"a gpu0": percent, "a": percent}, reserved_percent={"a": 90.0})
        return [finding.subject for finding in found(look, "memory")]

    assert subjects(96.0) == ["a"], "the host itself reserves nothing"
    assert subjects(98.0) == ["a", "a gpu0"]


@pytest.mark.property(37)
@MANY
@given(
    answered=st.integers(0, 1000),
    waiting=st.integers(0, 1000),
    age_s=st.floats(0, 600),
    threshold_rps=st.floats(0.01, 20),
)
def test_given_any_load_then_a_throughput_alert_when_less_is_answered_than_wanted_though_it_was_asked_for(
    answered: int, waiting: int, age_s: float, threshold_rps: float
) -> None:
    rules = AnomalySettings(throughput_threshold_rps=threshold_rps)
    rps = answered / WINDOW_S
    got = throughput_finding(rps, Demand(waiting, age_s if waiting else 0.0), WINDOW_S, rules)
    if rps >= threshold_rps or waiting == 0:
        assert got is None, "enough was answered, or nobody waits for anything"
    elif (answered + waiting) / WINDOW_S >= threshold_rps * 1.000001 or age_s >= WINDOW_S:
        assert got is not None
    assert throughput_finding(0.0, Demand(), WINDOW_S, rules) is None, "nobody asked for anything"


@pytest.mark.property(38)
@MANY
@given(
    places=st.lists(st.sampled_from(["log", "webhook", "alertmanager"]), unique=True, max_size=3),
    ended=st.booleans(),
    outcomes=st.lists(st.booleans(), max_size=MAX_ATTEMPTS + 3),
)
def test_given_any_alert_then_it_goes_to_every_destination_until_it_is_taken_or_given_up(
    places: list[Any], ended: bool, outcomes: list[bool]
) -> None:
    alert = Alert(
        id="a", alert_type="latency", subject="m", severity="error", message="slow", timestamp=NOW_S,
        resolved_at=NOW_S + 9 if ended else None,
    )  # fmt: skip
    deliveries = deliveries_of([alert], places)
    assert sorted(delivery.state.destination for delivery in deliveries) == sorted({"log", *places})
    assert len({delivery.id for delivery in deliveries}) == len(deliveries)
    state, due_s, now_s = DeliveryState(destination="webhook", kind="firing"), 0.0, NOW_S
    for attempt, is_taken in enumerate(outcomes, 1):
        state, next_s = after_attempt(state, None if is_taken else "answered 500", now_s)
        assert state.attempts == attempt
        if is_taken or attempt == MAX_ATTEMPTS:
            assert (state.status, next_s) == ("sent" if is_taken else "failed", None)
            break
        assert state.status == "waiting"
        assert next_s == now_s + backoff_s(attempt) > due_s
        due_s = now_s = next_s


moments = st.lists(st.tuples(st.floats(0.1, 200), st.booleans()), min_size=1, max_size=80)


@pytest.mark.property(39)
@MANY
@given(looks=moments, limit_s=st.sampled_from([0.0, 60.0, 300.0]), resolve_s=st.sampled_from([0.0, 30.0, 120.0]))
def test_given_any_course_of_events_then_one_alert_in_a_window_each_end_once_and_after_its_beginning(
    looks: list[tuple[float, bool]], limit_s: float, resolve_s: float
) -> None:
    rules, now_s = AlertRules(limit_s, resolve_s), NOW_S
    states: dict[str, AlertState] = {}
    told: list[tuple[float, Alert]] = []
    history: dict[str, list[Alert]] = {}
    for pause_s, is_wrong in looks:
        now_s += pause_s
        step = advance(states, [a_finding()] if is_wrong else [], now_s, rules)
        states = step.states
        told += [(now_s, alert) for alert in step.notices]
        for alert in step.changed:
            history.setdefault(alert.id, []).append(alert)
        assert len(states) <= 1
    begun = [(moment_s, alert) for moment_s, alert in told if alert.resolved_at is None]
    for (one_s, _), (other_s, _) in itertools.pairwise(begun):
        assert other_s - one_s >= limit_s, "a storm"
    ids = [alert.id for _, alert in begun]
    assert len(set(ids)) == len(ids), "one alert told twice"
    for _, alert in told:
        if alert.resolved_at is not None:
            assert alert.id in ids, "the end of what nobody was told"
    for alert_id, entries in history.items():
        assert [entry.resolved_at is None for entry in entries] in ([True], [True, False]), alert_id
    if any(is_wrong for _, is_wrong in looks):
        assert begun, "nothing at all was told"


@pytest.mark.property(39)
@MANY
@given(subjects=st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), limit_s=st.floats(1, 600))
def test_given_a_rapid_sequence_of_like_alerts_then_one_of_each_subject_is_told(
    subjects: list[str], limit_s: float
) -> None:
    states: dict[str, AlertState] = {}
    told: list[str] = []
    for number, subject in enumerate(subjects):
        step = advance(states, [a_finding(subject)], NOW_S + number * limit_s / 100, AlertRules(limit_s, 0.0))
        states = step.states
        told += [alert.subject for alert in step.notices if alert.resolved_at is None]
    assert sorted(told) == sorted(set(subjects))


def a_finding(subject: str = "m", for_s: float = 0.0) -> Finding:
    return Finding(type="latency", subject=subject, severity="error", message=f"{subject} is slow", for_s=for_s)


def test_given_a_finding_that_must_last_then_a_short_one_is_no_alert() -> None:
    rules, states = AlertRules(300.0, 0.0), dict[str, AlertState]()
    for at_s, is_wrong in ((0, True), (10, False), (20, True), (30, True)):
        step = advance(states, [a_finding(for_s=15.0)] if is_wrong else [], NOW_S + at_s, rules)
        states = step.states
        assert step.notices == []
    step = advance(states, [a_finding(for_s=15.0)], NOW_S + 36, rules)
    assert [alert.timestamp for alert in step.notices] == [NOW_S + 20]


def test_given_an_alert_that_lasts_then_alertmanager_is_told_now_and_then() -> None:
    rules, states, refreshed = AlertRules(300.0, 0.0), dict[str, AlertState](), 0
    for at_s in range(0, 600, 10):
        step = advance(states, [a_finding()], NOW_S + at_s, rules)
        states = step.states
        refreshed += len(step.refreshed)
        assert len(step.notices) == (at_s == 0)
    assert refreshed == 600 // REFRESH_S - 1


def test_given_an_alert_that_comes_again_within_the_limit_then_it_is_told_when_the_limit_is_over() -> None:
    rules, states, told = AlertRules(300.0, 0.0), dict[str, AlertState](), []
    for at_s, is_wrong in ((0, True), (10, False), (20, True), (290, True), (310, True), (400, False)):
        step = advance(states, [a_finding()] if is_wrong else [], NOW_S + at_s, rules)
        states = step.states
        told += [(at_s, alert.kind) for alert in step.notices]
    assert told == [(0, "firing"), (10, "resolved"), (310, "firing"), (400, "resolved")]


# -- relative anomalies, queues and devices --------------------------------------------------------------------------


@MANY
@given(
    usual=st.lists(st.floats(90, 110), min_size=MIN_BASELINE_MINUTES, max_size=60),
    wild=st.lists(st.floats(1000, 100_000), max_size=4),
)
def test_given_a_few_wild_minutes_then_the_baseline_stays_where_the_model_usually_is(
    usual: list[float], wild: list[float]
) -> None:
    line = baseline([*usual, *wild])
    assert line is not None
    assert 89 <= line.median <= 111
    assert line.sigma <= 1.4826 * 21


@pytest.mark.parametrize(
    ("p95_ms", "expected"), [(100.0, False), (120.0, False), (149.0, False), (200.0, True), (900.0, True)]
)
def test_given_a_model_with_a_steady_past_then_only_far_slower_is_an_anomaly(p95_ms: float, expected: bool) -> None:
    past = {"m": [Minute(100.0 + minute % 3, 5.0) for minute in range(30)]}
    look = Look(WINDOW_S, models=[figures([p95_ms] * 20)], past=past)
    got = found(look, "latency_anomaly")
    assert bool(got) == expected
    assert found(look, "latency_anomaly", baseline_deviations=0.0) == []
    assert found(Look(WINDOW_S, models=look.models, past={"m": past["m"][:9]}), "latency_anomaly") == []


@pytest.mark.parametrize(("answered", "waiting", "expected"), [(10, 50, True), (10, 0, False), (280, 50, False)])
def test_given_a_model_that_answers_far_less_than_usual_then_an_anomaly_when_requests_wait(
    answered: int, waiting: int, expected: bool
) -> None:
    past = {"m": [Minute(None, 5.0 + minute % 2 * 0.1) for minute in range(30)]}
    model = figures([100.0] * answered)
    look = Look(WINDOW_S, models=[model], past=past, demand_by_model={"m": waiting})
    assert bool(found(look, "throughput_anomaly")) == expected


def test_given_queues_then_old_requests_and_absent_workers_are_told() -> None:
    queues = [
        QueueLook("inference", 5, 1, 61.0),
        QueueLook("inference.high", 5, 1, 59.0),
        QueueLook("engine.onnx", 3, 0),
        QueueLook("engine.pytorch", 0, 0),
    ]
    assert [finding.subject for finding in found(Look(WINDOW_S, queues=queues), "queue_age")] == ["inference"]
    [missing] = found(Look(WINDOW_S, queues=queues), "missing_workers")
    assert (missing.subject, missing.severity) == ("engine.onnx", "critical")
    assert missing.for_s > 0, "a worker that is being restarted is not missing"


def test_given_gpus_then_those_that_failed_are_told() -> None:
    gpus = [GpuLook("0 of a", "ok", ""), GpuLook("1 of a", "failed", "Xid 79"), GpuLook("2 of a", "degraded", "hot")]
    [finding] = found(Look(WINDOW_S, gpus=gpus), "gpu_failure")
    assert "Xid 79" in finding.message
    assert finding.severity == "critical"


def test_given_a_quiet_fleet_then_nothing_is_wrong() -> None:
    assert findings(Look(WINDOW_S, total=figures([])), AnomalySettings()) == []
