"""Buckets of time: whatever has been added up, a window is told once, and roll-ups leave nothing out."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muai_producers.performance.bins import LONGEST_MS, SHORTEST_MS, bin_of, mean_ms, middle_ms, quantiles
from muai_producers.performance.buckets import FINEST, LATE_S, levels, spans, to_make
from muai_producers.performance.report import series_figures
from muai_producers.performance.series import Series, Tally, read_member

NOW_S = 1_790_000_003.0
WEEK_S = 604_800
ALL = levels(WEEK_S)
MANY = settings(max_examples=300, deadline=None)


@MANY
@given(
    window_s=st.floats(1, WEEK_S),
    lags=st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 100)),
)
def test_given_any_window_and_any_lag_of_the_roll_up_then_each_moment_is_told_at_most_once(
    window_s: float, lags: tuple[int, int, int]
) -> None:
    made = {
        level.size_s: int(NOW_S // level.size_s - lag) * level.size_s for level, lag in zip(ALL[1:], lags, strict=True)
    }
    found = spans(NOW_S - window_s, NOW_S, made, ALL)
    for earlier, later in itertools.pairwise(found):
        assert earlier.end_s <= later.start_s
        assert earlier.size_s >= later.size_s
    assert all((span.end_s - span.start_s) % span.size_s == 0 and span.start_s % span.size_s == 0 for span in found)
    assert found[-1].end_s > NOW_S
    assert found[0].start_s <= NOW_S - window_s or found[0].size_s == FINEST.size_s
    if max(lags) == 0:
        assert found[0].start_s <= NOW_S - window_s


@pytest.mark.parametrize("retention_s", [3600, 86_400, WEEK_S, 31_536_000])
def test_given_any_retention_then_each_level_is_kept_until_the_next_has_it(retention_s: int) -> None:
    for below, level in zip(levels(retention_s), levels(retention_s)[1:], strict=False):
        assert level.size_s % below.size_s == 0
        assert below.keep_s >= 2 * level.size_s
    assert levels(retention_s)[-1].keep_s >= retention_s


@MANY
@given(pauses_s=st.lists(st.floats(1, 3000), min_size=1, max_size=20))
def test_given_roll_ups_at_any_pauses_then_every_finished_bucket_is_made(pauses_s: list[float]) -> None:
    made: dict[int, int] = {}
    covered: dict[int, set[int]] = {level.size_s: set() for level in ALL}
    first_s = now_s = NOW_S
    for pause_s in pauses_s:
        now_s += pause_s
        for below, level in itertools.pairwise(ALL):
            starts = to_make(level, below, made, now_s)
            if starts:
                covered[level.size_s].update(starts)
                made[level.size_s] = starts[-1] + level.size_s
                assert starts[-1] + level.size_s <= now_s - LATE_S + level.size_s
    minute = ALL[1]
    wanted = range(
        math.ceil(first_s / minute.size_s) * minute.size_s,
        int((now_s - LATE_S) // minute.size_s) * minute.size_s,
        minute.size_s,
    )
    assert set(wanted) <= covered[minute.size_s]


def test_given_a_million_samples_then_percentiles_are_within_the_stated_error_of_the_exact_ones() -> None:
    chance = random.Random(33)
    samples = [chance.lognormvariate(3.0, 1.2) for _ in range(900_000)]
    samples += [chance.uniform(2000, 60_000) for _ in range(100_000)]  # a second hump, far off, as timeouts make
    # Four processes, whose bins are added.
    parts = [Tally() for _ in range(4)]
    for number, sample_ms in enumerate(samples):
        parts[number % 4].durations["total"][bin_of(sample_ms)] += 1
    total = Tally()
    for part in parts:
        total.add(part)
    samples.sort()
    ranks = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
    for rank, told_ms in zip(ranks, quantiles(total.durations["total"], ranks) or (), strict=True):
        exact_ms = samples[int(rank * (len(samples) - 1))]
        assert abs(told_ms - exact_ms) <= 0.0100001 * exact_ms, rank
    assert abs(mean_ms(total.durations["total"]) - sum(samples) / len(samples)) <= 0.01 * sum(samples) / len(samples)


@MANY
@given(latency_ms=st.floats(SHORTEST_MS, LONGEST_MS))
def test_given_any_latency_then_its_bin_stands_for_it_within_one_percent(latency_ms: float) -> None:
    assert abs(middle_ms(bin_of(latency_ms)) - latency_ms) <= 0.0100001 * latency_ms


def test_given_latencies_out_of_range_then_they_fall_into_the_outermost_bins() -> None:
    assert bin_of(0.0) == bin_of(-5.0) == bin_of(SHORTEST_MS)
    assert bin_of(1e12) == bin_of(LONGEST_MS)
    assert bin_of(LONGEST_MS) - bin_of(SHORTEST_MS) < 1300, "what one series can hold is bounded"


def test_given_a_tally_then_its_fields_bring_it_back() -> None:
    tally = Tally()
    tally.durations["total"][12] = 3
    tally.durations["my:step"][-4] = 1
    tally.counters["error:out_of_memory"] = 2
    tally.sizes[16] = 5
    tally.percents["gpu0.memory"][93] = 1
    again = Tally()
    again.add_fields({name.encode(): str(count).encode() for name, count in tally.fields()})
    assert dict(again.fields()) == dict(tally.fields())
    again.add_fields({b"zz:of:another:version": b"1"})
    assert dict(again.fields()) == dict(tally.fields())


def test_given_a_members_name_then_it_is_read_back_or_passed_over() -> None:
    series = Series("m", "", "embedding")
    assert read_member(series.member) == series
    assert read_member("x\tof another version") is None


def test_given_errors_of_several_kinds_then_only_the_fleets_own_count_as_faults() -> None:
    tally = Tally()
    tally.counters.update(
        {"ok": 6, "error:invalid_request": 2, "error:engines_exhausted": 3, "error:deadline_exceeded": 1}
    )
    tally.counters["error:cancelled"] = 4
    figures = series_figures(Series("m", "onnx", "chat"), tally, 10.0)
    assert (figures.requests, figures.faults) == (12, 4)
    assert figures.error_rate == 0.4
    assert figures.throughput_rps == 1.2
    assert figures.errors["cancelled"] == 4


def test_given_batches_of_a_straight_engine_then_its_line_is_fitted() -> None:
    tally = Tally()
    for size in (1, 4, 16, 32):
        took_us = 2000 * size + 5000
        for name, more in (("fit_count", 1), ("fit_n", size), ("fit_nn", size * size)):
            tally.counters[name] += more
        tally.counters["fit_us"] += took_us
        tally.counters["fit_n_us"] += size * took_us
        tally.sizes[size] += 1
    batching = series_figures(Series("m", "onnx", "chat"), tally, 10.0).batching
    assert batching is not None
    assert (batching.per_request_ms, batching.per_batch_ms) == (2.0, 5.0)
    assert (batching.batches, batching.max_size, batching.padding_waste) == (4, 32, None)
