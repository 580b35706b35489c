"""The specification's properties 45 to 49, of the pure core: what a change of load leads to, whatever the curve."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from muai_producers.monitoring import instruments
from muai_producers.monitoring.recorder import recorder
from muai_workers.tuning.auto_tuner import tell
from muai_workers.tuning.deciding import SETTLE_S, Step, advance, stand_down
from muai_workers.tuning.records import (
    PARAMETERS,
    Bounds,
    CacheLook,
    Knowledge,
    Look,
    Rules,
    Stretch,
    TunerState,
    TuningEvent,
    Values,
)

MANY = settings(max_examples=100, deadline=None)
NOW_S, LENGTH_S = 1_790_000_000.0, 10.0
RULES = Rules(
    bounds={
        "batch_size": Bounds(1, 128),
        "batch_timeout_ms": Bounds(1, 500),
        "cache_size_mb": Bounds(256, 8192),
    },
    target_ms=500.0,
)
levels = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
curves = st.tuples(st.floats(0.2, 4.0), st.floats(20.0, 80.0))


def stretches(
    rate: float,
    *,
    served: float,
    size: float,
    curve: tuple[float, float],
    wait_ms: float,
    batching_ms: float = 0.0,
    in_time: float,
    hits: float = 0.0,
    count: int = 6,
) -> tuple[Stretch, ...]:
    """So many alike, up to now."""
    arrived, ended = round(rate * LENGTH_S), round(served * LENGTH_S)
    batches = max(2, round(ended / size))
    took_us = [round(1000 * (curve[0] * n + curve[1])) for n in (1, max(2, round(size)))]
    sizes = (1, max(2, round(size)))
    return tuple(
        Stretch(
            start_s=NOW_S - LENGTH_S * (count - at),
            length_s=LENGTH_S,
            arrived=arrived,
            ended=ended,
            successes=ended,
            in_time=round(in_time * ended),
            worth=0.95 * in_time * ended,
            waited_ms=wait_ms * ended,
            batching_ms=batching_ms * ended,
            inference_ms=(curve[0] * size + curve[1]) * ended,
            cache_hits=round(hits * ended),
            batches=batches,
            batched=round(batches * size),
            fit=(
                2,
                sum(sizes),
                sum(n * n for n in sizes),
                sum(took_us),
                sum(n * t for n, t in zip(sizes, took_us, strict=True)),
            ),
        )
        for at in range(count)
    )


def look(values: Values, seen: tuple[Stretch, ...], **more: Any) -> Look:
    return Look(
        now_s=NOW_S,
        version=3,
        changed_by="ada",
        values=values,
        overridden={},
        stretches=seen,
        model="m",
        engine="onnx",
        device="cpu",
        **more,
    )


def decided(seen: Look, rules: Rules = RULES) -> Step:
    """What a tuner does that has held these values for long, and now finds this load."""
    state = TunerState(values=seen.values, version=seen.version, since_s=NOW_S - 600.0)
    return advance(state, seen, lambda _: None, rules)


def values(size: int = 8, timeout_ms: int = 50, cache_mb: int = 1024) -> Values:
    return Values(batch_size=size, batch_timeout_ms=timeout_ms, cache_size_mb=cache_mb)


@pytest.mark.property(45)
@MANY
@given(size=levels, curve=curves, more=st.floats(1.3, 20.0))
def test_given_a_load_beyond_what_full_batches_serve_then_the_batch_size_rises(
    size: int, curve: tuple[float, float], more: float
) -> None:
    """Property 45."""
    capacity = 1000 * size / (curve[0] * size + curve[1])
    seen = look(
        values(size),
        stretches(capacity * more, served=capacity, size=size, curve=curve, wait_ms=9000.0, in_time=0.0),
    )
    assume(capacity * LENGTH_S >= 5)
    step = decided(seen)
    assert step.values is not None
    assert size < step.values.batch_size <= 128
    assert step.values.with_value("batch_size", size) == seen.values, "one step, of one parameter"


@pytest.mark.property(45)
@MANY
@given(size=levels, curve=curves, share=st.floats(0.2, 0.9), spare=st.floats(2.0, 20.0))
def test_given_batches_that_take_too_long_and_engines_with_time_to_spare_then_the_batch_size_falls(
    size: int, curve: tuple[float, float], share: float, spare: float
) -> None:
    """Property 45."""
    assume(size > 1)
    took_ms = curve[0] * size + curve[1]
    # So little comes that batches half as large keep up with it, and so slow are they that they miss the target.
    rate = 1000 * size / took_ms / 2 / spare
    assume(rate * LENGTH_S >= 20)
    rules = msgspec.structs.replace(RULES, target_ms=took_ms * 1.2)
    seen = look(
        values(size), stretches(rate, served=rate, size=0.5 * size, curve=curve, wait_ms=1.0, in_time=1 - share)
    )
    seen = msgspec.structs.replace(
        seen,
        stretches=tuple(msgspec.structs.replace(one, inference_ms=took_ms * one.ended) for one in seen.stretches),
    )
    step = decided(seen, rules)
    assert step.values is not None
    assert step.values.batch_size < size


@pytest.mark.property(46)
@MANY
@given(timeout_ms=st.integers(2, 500), share=st.floats(0.05, 0.9), rate=st.floats(5.0, 50.0))
def test_given_requests_that_are_late_for_waiting_for_companions_then_the_timeout_falls(
    timeout_ms: int, share: float, rate: float
) -> None:
    """Property 46: arrivals have become rarer, so that batches leave at the timeout, half empty."""
    seen = look(
        values(64, timeout_ms),
        stretches(
            rate,
            served=rate,
            size=2.0,
            curve=(0.1, 0.5),
            wait_ms=0.8 * timeout_ms,
            batching_ms=0.8 * timeout_ms,
            in_time=1 - share,
        ),
        adaptive=False,
    )
    assert not seen.stretches[0].waited_ms > RULES.target_ms * seen.stretches[0].ended
    step = decided(seen)
    assert step.values is not None
    assert step.values.batch_timeout_ms < timeout_ms
    assert step.values.with_value("batch_timeout_ms", timeout_ms) == seen.values


@pytest.mark.property(46)
@MANY
@given(timeout_ms=st.integers(1, 50), more=st.floats(1.2, 4.0), curve=curves)
def test_given_more_arrivals_than_half_empty_batches_serve_then_the_timeout_rises(
    timeout_ms: int, more: float, curve: tuple[float, float]
) -> None:
    """Property 46: arrivals have become denser; batches that wait longer are fuller, and cost less for each request."""
    size = 2.0
    capacity = 1000 * size / (curve[0] * size + curve[1])
    seen = look(
        values(64, timeout_ms),
        stretches(capacity * more, served=capacity, size=size, curve=curve, wait_ms=9000.0, in_time=0.0),
        adaptive=False,
    )
    assume(1000 * 8 / (capacity * more) > 2 * timeout_ms)
    step = decided(seen)
    assert step.values is not None
    assert timeout_ms < step.values.batch_timeout_ms <= 500


@pytest.mark.property(46)
@given(timeout_ms=st.integers(1, 500), share=st.floats(0.05, 0.9))
def test_given_batches_that_never_wait_for_the_timeout_then_it_is_left_alone(timeout_ms: int, share: float) -> None:
    """Property 46: a setting that has no effect is not tried."""
    seen = look(
        values(64, timeout_ms),
        stretches(40.0, served=40.0, size=4.0, curve=(2.0, 20.0), wait_ms=90.0, batching_ms=80.0, in_time=1 - share),
        adaptive=True,
    )
    step = decided(seen)
    assert step.values is None or step.values.batch_timeout_ms == timeout_ms


@pytest.mark.property(47)
@MANY
@given(
    cache_mb=st.integers(128, 16384), hits=st.floats(0.0, 1.0), used=st.floats(0.0, 1.0), memory=st.floats(0.0, 100.0)
)
def test_given_any_use_of_the_cache_then_it_grows_where_that_helps_and_shrinks_where_memory_is_short(
    cache_mb: int, hits: float, used: float, memory: float
) -> None:
    """Property 47."""
    seen = look(
        values(cache_mb=cache_mb),
        stretches(20.0, served=20.0, size=4.0, curve=(2.0, 20.0), wait_ms=1.0, in_time=1.0, hits=hits),
        cache=CacheLook(used_share=used),
        memory_percent=memory,
    )
    step = decided(seen)
    after = cache_mb if step.values is None else step.values.cache_size_mb
    inside = RULES.bounds["cache_size_mb"].clamp(cache_mb)
    hit_rate = seen.stretches[0].cache_hits / seen.stretches[0].successes
    if inside != cache_mb:
        assert after == inside, "first of all into the bounds"
    elif memory >= 90.0 and used >= 0.25:
        assert after == max(256, cache_mb // 2)
    elif used >= 0.9 and hit_rate < 0.95 and memory < 80.0:
        assert after == min(8192, cache_mb * 2)
    else:
        assert after == cache_mb


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[float, float, float]]:
    """Looks one after the other: load, share in time, wait in milliseconds."""
    return draw(
        st.lists(st.tuples(st.floats(3.0, 300.0), st.floats(0.0, 1.0), st.floats(0.0, 3000.0)), min_size=1, max_size=8)
    )


@pytest.mark.property(48)
@MANY
@given(looks=histories(), size=levels, adaptive=st.booleans(), alert=st.booleans())
def test_given_any_history_then_every_change_is_told_with_its_reason_and_stays_within_the_bounds(
    looks: list[tuple[float, float, float]], size: int, adaptive: bool, alert: bool
) -> None:
    """Property 48: no value changes without an event that says from what, to what, and why."""
    known: dict[str, Knowledge] = {}
    state, held, version = TunerState(), values(size), 0
    for number, (rate, in_time, wait_ms) in enumerate(looks):
        now_s = NOW_S + 61.0 * number
        seen = [
            msgspec.structs.replace(one, start_s=one.start_s + 61.0 * number)
            for one in stretches(
                rate, served=rate, size=size, curve=(2.0, 30.0), wait_ms=wait_ms, batching_ms=wait_ms, in_time=in_time
            )
        ]
        incident = "alert memory is open: full" if alert and number == len(looks) - 1 else ""
        now = msgspec.structs.replace(
            look(held, tuple(seen), adaptive=adaptive, incident=incident),
            now_s=now_s,
            version=version,
            changed_by="tuner",
        )
        step = advance(state, now, lambda place, known=known: known.get(place.key), RULES)  # type: ignore[misc]
        known |= {place.key: learnt for place, learnt in step.learnt}
        told = held
        for event in step.events:
            assert event.rationale
            for name, value in event.new.items() if event.outcome != "kept" else ():
                assert told.of(name) == event.old[name], "events follow on each other"  # type: ignore[arg-type]
                told = told.with_value(name, value)  # type: ignore[arg-type]
        assert told == (step.values or held), "and lead to what is set"
        if step.values is not None:
            for name in PARAMETERS:
                assert RULES.bounds[name].least <= step.values.of(name) <= RULES.bounds[name].most
            assert step.why
            held, version = step.values, version + 1
        state = step.state
    if alert:
        assert state.trial is None, "nothing stays on trial while an alert is open"


@pytest.mark.property(48)
@settings(max_examples=50, deadline=None)
@given(
    events=st.lists(
        st.builds(
            TuningEvent,
            at=st.just(NOW_S),
            outcome=st.sampled_from(["raised", "lowered", "kept", "rolled_back", "recalled"]),
            parameter=st.sampled_from(PARAMETERS),
            old=st.just({"batch_size": 8}),
            new=st.just({"batch_size": 16}),
            rationale=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=5, max_size=40),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_given_any_decisions_then_each_is_in_the_log_with_its_reason_and_counted(events: list[TuningEvent]) -> None:
    """Property 48."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("muai_workers.tuning.auto_tuner")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    recorder.take()
    try:
        tell(events)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(lines) == len(events)
    for line, event in zip(lines, events, strict=True):
        assert event.rationale in line
        assert "batch_size 8 -> 16" in line
    counted = recorder.take().counters
    for event in events:
        same = sum((one.parameter, one.outcome) == (event.parameter, event.outcome) for one in events)
        assert counted[instruments.TUNING.name, (event.parameter, event.outcome)] == same


@pytest.mark.property(49)
@MANY
@given(
    theirs=st.dictionaries(st.sampled_from(PARAMETERS), st.integers(1, 4096)),
    tuned=st.dictionaries(st.sampled_from(PARAMETERS), st.integers(1, 4096)),
    later=st.dictionaries(st.sampled_from(PARAMETERS), st.integers(5000, 6000)),
)
def test_given_any_past_when_tuning_is_switched_off_then_what_it_set_goes_back_and_nothing_else(
    theirs: dict[Any, int], tuned: dict[Any, int], later: dict[Any, int]
) -> None:
    """Property 49. `theirs` was set by people before, `tuned` by the tuner, `later` by people again."""
    static = values(8, 50, 1024)
    overrides = {**theirs, **tuned, **later}
    mine = static
    for name, value in {**theirs, **tuned}.items():
        mine = mine.with_value(name, value)
    now = mine
    for name, value in later.items():
        now = now.with_value(name, value)
    state = TunerState(values=mine, originals={name: theirs.get(name) for name in tuned})
    step = stand_down(state, look(now, ()))
    for name, was in step.restore.items():
        overrides.pop(name)
        if was is not None:
            overrides[name] = was
    assert overrides == {**theirs, **later}
    assert step.state == TunerState()
    assert stand_down(step.state, look(now, ())).restore == {}


def test_given_a_trial_that_began_just_now_then_it_is_not_judged_by_what_was_before() -> None:
    seen = look(values(), stretches(20.0, served=20.0, size=4.0, curve=(2.0, 20.0), wait_ms=400.0, in_time=0.2))
    first = decided(seen)
    assert first.state.trial is not None
    # What ended since then was formed before: it had waited for an engine for more than a minute.
    late = [
        msgspec.structs.replace(one, start_s=one.start_s + 60.0, dispatch_ms=60_001.0 * one.ended)
        for one in seen.stretches
    ]
    soon = msgspec.structs.replace(
        seen,
        now_s=NOW_S + 60.0 + SETTLE_S,
        values=first.values,
        version=4,
        changed_by="tuner",
        stretches=(*seen.stretches, *late),
    )
    second = advance(first.state, soon, lambda _: None, RULES)
    assert second.values is None
    assert second.state.trial == first.state.trial


def test_given_knowledge_then_it_is_bounded_like_everything_else() -> None:
    seen = look(values(), stretches(20.0, served=20.0, size=4.0, curve=(2.0, 20.0), wait_ms=4.0, in_time=1.0))
    state = TunerState(values=seen.values, version=3, since_s=NOW_S - 600.0)
    known = Knowledge(best=values(4096, 60_000, 1), score=1.0, at_s=0.0)
    step = advance(state, seen, lambda _: known, RULES)
    assert step.values == values(128, 500, 256)
