"""Where failures of monitoring end: swallowed, counted, logged once in a while, shown."""

import logging

import pytest

from muai_producers.monitoring.guard import LOG_EVERY_S, REMEMBERED_S, Standings, guarded


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_given_a_block_that_fails_then_it_is_left_counted_and_degraded_for_a_while() -> None:
    clock = Clock()
    standings = Standings(clock)
    with guarded("metrics", standings):
        raise RuntimeError("no room")
    assert standings.failures() == {"metrics": 1}
    assert standings.degraded() == {"metrics": "RuntimeError: no room"}
    clock.now_s += REMEMBERED_S
    assert standings.degraded() == {}
    assert standings.failures() == {"metrics": 1}


def test_given_a_function_that_fails_when_guarded_then_it_returns_none() -> None:
    standings = Standings()

    @guarded("traces", standings)
    def export(fails: bool) -> int:
        if fails:
            raise OSError("gone")
        return 7

    assert export(False) == 7
    assert export(True) is None
    assert standings.failures() == {"traces": 1}


def test_given_what_ends_a_process_then_it_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), guarded("metrics", Standings()):
        raise KeyboardInterrupt


def test_given_many_failures_then_few_are_logged_and_the_rest_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    standings = Standings(clock)
    caplog.set_level(logging.WARNING)
    for _ in range(50):
        standings.fail("alerts", RuntimeError("again"))
    assert len(caplog.records) == 1
    clock.now_s += LOG_EVERY_S
    standings.fail("alerts", RuntimeError("again"))
    assert "49 more" in caplog.records[-1].getMessage()


def test_given_a_part_that_reports_when_cleared_then_it_is_whole_again() -> None:
    standings = Standings()
    standings.report("metrics", "port 9090 is taken")
    assert standings.degraded() == {"metrics": "port 9090 is taken"}
    standings.clear("metrics")
    assert standings.degraded() == {}
