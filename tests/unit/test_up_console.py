"""What the supervisor shows, and what it tells its watchdog."""

import io

import pytest
from rich.console import Console

from muai_workers.up.console import PlainConsole, Row, readable_duration, render_table, summary_line
from muai_workers.up.observing import Observation
from muai_workers.up.watchdog import apply


def test_Given_rows_Then_the_table_shows_each_with_what_is_queued_below() -> None:
    rows = [Row("onnx", 42, "ready", 75.0, 2), Row("pytorch", None, "starts in 3 s", None, 1)]
    seen = Observation(1.0, 7, 12, frozenset(), {"inference": 5})
    out = io.StringIO()
    Console(file=out, width=100).print(render_table(rows, seen))
    shown = out.getvalue()
    for expected in ("onnx", "42", "ready", "1:15", "starts in 3 s", "inference 5", "in flight: 7", "answered: 12"):
        assert expected in shown


def test_Given_nothing_seen_yet_Then_it_says_so() -> None:
    assert "nothing seen" in summary_line(None)


def test_Given_a_store_that_does_not_count_answers_Then_none_are_claimed() -> None:
    assert summary_line(Observation(1.0, 0, None, frozenset())) == "queues: empty   in flight: 0"


@pytest.mark.parametrize(("seconds", "text"), [(7.9, "7 s"), (65, "1:05"), (3600 * 2 + 9, "2:00:09")])
def test_Given_a_duration_Then_it_can_be_read(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text


def test_Given_a_line_When_plain_Then_its_process_stands_before_it() -> None:
    stream = io.StringIO()
    PlainConsole(stream).line("onnx", "ready")
    assert stream.getvalue() == "onnx         | ready\n"


def test_Given_the_supervisors_notes_Then_the_watchdog_knows_whom_to_end_and_whom_last() -> None:
    workers: set[int] = set()
    brokers: set[int] = set()
    for line in ("+ 10 last\n", "+ 11\n", "+ 12\n", "- 11\n"):
        apply(line, workers, brokers)
    assert (workers, brokers) == ({12}, {10})
