"""Lines of batches keep out of the way of others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from muai_producers.wire import InferenceResult
from muai_workers.control.slack import HASTE, LEAST_BURST, LEAST_SHARE, QUIET_S, Slack


def result(batch_id: str, size: int, inference_ms: float) -> InferenceResult:
    metadata = {"batch_id": batch_id, "inference_ms": inference_ms, "model": "m"}
    return InferenceResult(
        outputs={}, engine_used="fake", latency_ms=1.0, batch_size=size, cache_hit=False, metadata=metadata
    )


def test_given_nobody_else_then_lines_may_fill_the_queue() -> None:
    slack = Slack(0.2, 64)
    assert slack.room(0, 0.0) == 64
    slack.saw(100, 0.0)  # how many there were before says nothing of now
    assert slack.room(40, 0.0) == 64


def test_given_others_then_one_short_burst_at_a_time_and_a_pause_after_it() -> None:
    slack = Slack(0.2, 64)
    slack.owes("urgent", 1000, 10.0)
    slack.saw(0, 0.0)
    slack.saw(1, 10.0)
    assert slack.room(0, 10.0) == LEAST_BURST
    assert slack.room(1, 10.0) == 0, "the last burst is still under way"
    slack.ended([result("a", 4, 100.0), result("a", 4, 90.0), result("b", 1, 50.0)], 11.0)
    assert slack.room(0, 11.5) == 0
    assert slack.room(0, 11.61) > 0, "0.15 s of work at a fifth of the time: 0.6 s for the others"
    assert slack.room(0, 10.0 + QUIET_S + 0.1) == 64


def test_given_windows_then_lines_take_of_the_time_what_those_want_within_bounds() -> None:
    slack = Slack(0.2, 64)
    slack.owes("a", 1_000_000, 10.0)
    assert slack.share == LEAST_SHARE, "how long a line takes is not known yet"
    slack.ended([result("1", 4, 100.0), result("2", 4, 100.0)], 0.0)  # 25 ms a line
    assert slack.share == 0.2
    slack.owes("a", 100, 50.0)
    slack.owes("b", 40, 20.0)
    assert abs(slack.share - HASTE * (2 + 2) * 0.025) < 1e-9
    slack.forget_but(["b", "c"])
    assert abs(slack.share - HASTE * 2 * 0.025) < 1e-9
    slack.owes("b", 40, -5.0)
    assert slack.share == 0.2, "its window has ended"
    slack.owes("b", 40, 86_400.0)
    assert slack.share == LEAST_SHARE
    assert Slack(0.01, 64).share == 0.01, "an operator may want less still"


def test_given_the_others_count_falls_then_that_is_nobody_coming() -> None:
    slack = Slack(0.2, 64)
    slack.saw(100, 0.0)
    slack.saw(40, 1.0)
    assert slack.is_quiet(1.0)
    slack.saw(41, 2.0)
    assert not slack.is_quiet(2.0)


@given(
    per_batch_ms=st.floats(0, 100), per_request_ms=st.floats(0.1, 50), sizes=st.lists(st.integers(1, 64), min_size=5)
)
def test_given_an_engines_speed_then_a_burst_takes_it_little_longer_than_one_request(
    per_batch_ms: float, per_request_ms: float, sizes: list[int]
) -> None:
    slack = Slack(0.5, 64)
    for number, size in enumerate([1, 32, *sizes]):
        slack.ended([result(str(number), size, per_batch_ms + per_request_ms * size)], 0.0)
    slack.saw(0, 1e6)
    slack.saw(1, 1e6)
    burst = slack.room(0, 1e6)
    one_ms, burst_ms = per_batch_ms + per_request_ms, per_batch_ms + per_request_ms * burst
    assert 1 <= burst <= 64
    assert burst <= LEAST_BURST or burst_ms <= 1.51 * one_ms
