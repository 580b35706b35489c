"""What `muai top` lays out: everything that matters fits into 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from muai_producers.alerts.records import Alert
from muai_producers.cli.top_view import TopLook, render, spark
from muai_producers.fleet import CollectorRecord, FleetView, WorkerRecord
from muai_producers.performance.bins import bin_of
from muai_producers.performance.report import ResourceTrends, report_of, resource_trend
from muai_producers.performance.series import Host, Series, Tally
from muai_producers.queue_depths import QueueDepth

NOW_S = 1_790_000_000.0


def tally(latency_ms: float, *, ok: int = 100, failed: int = 0) -> Tally:
    made = Tally()
    for operation in ("queue", "inference", "total"):
        made.durations[operation][bin_of(latency_ms)] += ok
    made.counters.update({"ok": ok, "error:engines_exhausted": failed})
    made.sizes[8] += 12
    return made


def arrivals() -> Tally:
    made = Tally()
    made.counters["arrived"] = 50
    return made


def look(**changes: Any) -> TopLook:
    name = "a-model-with-a-name-that-is-much-longer-than-any-column"
    memory = Tally()
    memory.percents["memory"][93] += 1
    trend = resource_trend(Host("gpu-1.example.com"), "memory", [(0, memory), (10, memory)])
    assert trend is not None
    tallies = {
        Series(name, "deepspeed", "text-generation"): tally(123_456.0, failed=3),
        Series(name, "", "text-generation"): arrivals(),
        Series("noop", "fake", "embedding"): tally(0.4),
        Series("parked", "", "embedding"): arrivals(),
    }
    report = report_of(tallies, ResourceTrends(window_s=60, step_s=10, trends=[trend]), NOW_S - 60, NOW_S)
    fleet = FleetView(
        workers=(WorkerRecord(name="w", engine="deepspeed", slots=2),),
        collectors=(CollectorRecord(name="c"),),
        outstanding={"deepspeed": 3, "onnx": 2},
    )
    alert = Alert(
        id="a", alert_type="latency", subject="noop", severity="critical", message="noop: slow", timestamp=NOW_S - 90
    )
    values: dict[str, Any] = {
        "taken_s": NOW_S,
        "report": report,
        "fleet": fleet,
        "in_flight": 1234,
        "queues": {"inference": QueueDepth(17, NOW_S - 3), "engine.onnx": QueueDepth(2)},
        "alerts": [alert],
        "overdue": [],
    }
    return TopLook(**{**values, **changes})


def shown(one: TopLook, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(one, width))
    file: Any = console.file
    return str(file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_given_a_busy_fleet_then_every_figure_is_shown_within_the_width(width: int) -> None:
    lines = shown(look(), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for told in ("1,234 in flight", "2.9%", "0.4ms", "2m", "parked", "deepspeed 1: 3/4", "onnx 0: 2/0", "93 %"):
        assert told in text, told
    for told in ("inference 17 (3s)", "engine.onnx 2", "critical noop: slow  90s", "gpu-1.example.com"):
        assert told in text, told
    header, *rows = lines[2:6]
    assert header.split()[:2] == ["model", "engine"]
    assert sum(row.startswith("a-model") for row in rows) == 1, "what has only arrived is no line of its own"


def test_given_nothing_at_all_then_it_says_so() -> None:
    empty = report_of({}, ResourceTrends(window_s=60, step_s=10, trends=[]), NOW_S - 60, NOW_S)
    text = "\n".join(shown(look(report=empty, fleet=FleetView(), queues={}, alerts=[], in_flight=0), 80))
    assert "no requests" in text
    assert "nothing waits" in text
    assert "no alerts" in text


def test_given_percents_then_a_bar_for_each() -> None:
    assert spark([0.0, 50.0, 100.0]) == "▁▅█"
