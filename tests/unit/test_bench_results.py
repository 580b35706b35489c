"""The arithmetic and the report of the benchmark suite: a wrong median there would be believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.report import number, render
from benchmarks.results import Figure, Goal, Metric, Row, load, percentile, ratio_goal, ratios, save
from benchmarks.turns import interval


def figure(*rows: Row, goals: tuple[Goal, ...] = ()) -> Figure:
    machine = {
        "cpu": "Some CPU",
        "cores": "2",
        "memory": "8 GiB",
        "system": "Linux 6",
        "python": "3.11.7",
        "redis": "7.0.15",
        "muai": "abc1234",
        "load before": "0.10",
    }
    return Figure(
        name="queue",
        title="The queue",
        mode="full",
        measured_at="2026-01-02T03:04:05+00:00",
        wall_s=12.0,
        machine=machine,
        how="As it is done.",
        rows=rows,
        goals=goals,
    )


def row(name: str, *rates: float) -> Row:
    return Row(name=name, versions={"celery": "5.7.0"}, metrics={"in bulk": Metric("requests/s", rates)})


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (99, 10), (100, 10), (10, 1), (11, 2), (0, 1)])
def test_given_ten_values_when_a_percentile_is_asked_then_it_is_the_nearest_rank(percent: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_given_no_values_when_a_percentile_is_asked_then_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_given_pairs_when_the_machine_drifts_then_the_ratios_do_not() -> None:
    assert ratios([50.0, 25.0], [100.0, 50.0]) == (0.5, 0.5)


def test_given_a_missing_pair_when_ratios_are_taken_then_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


def test_given_medians_when_compared_then_the_goal_is_their_ratio() -> None:
    rows = {"ours": row("ours", 90.0, 100.0, 400.0), "peer": row("peer", 20.0, 10.0, 5.0)}

    assert [goal.value for goal in ratio_goal(rows, "in bulk", "ours", "peer", 10.0)] == [10.0]


def test_given_a_peer_left_out_when_compared_then_no_goal_is_claimed() -> None:
    rows = {"ours": row("ours", 90.0), "peer": Row(name="peer", skipped="could not be installed")}

    assert ratio_goal(rows, "in bulk", "ours", "peer", 10.0) == []


@pytest.mark.parametrize(("value", "at_most", "met"), [(9.9, False, False), (10.0, False, True), (10.1, True, False)])
def test_given_a_goal_when_judged_then_its_direction_counts(value: float, at_most: bool, met: bool) -> None:
    assert Goal(text="x", value=value, goal=10.0, at_most=at_most).met is met


def test_given_a_figure_when_kept_and_loaded_then_it_is_the_same(tmp_path: Path) -> None:
    kept = figure(row("ours", 1.0, 2.0), goals=(Goal(text="x", value=1.0, goal=2.0),))

    save(kept, tmp_path / "deep" / "folder")

    assert load("queue", tmp_path / "deep" / "folder") == kept
    assert load("model", tmp_path / "deep" / "folder") is None


def test_given_contestants_when_reported_then_spread_versions_and_machine_are_there() -> None:
    page = render([figure(row("MuAI", 20_000.0, 19_000.0, 21_000.0))])

    assert "| MuAI | 20,000 (19,000 to 21,000) |" in page
    assert "celery 5.7.0" in page
    assert "Some CPU, 2 cores, 8 GiB" in page
    assert "2026-01-02T03:04:05+00:00" in page


def test_given_a_peer_left_out_when_reported_then_the_reason_is_there_and_the_table_stays_whole() -> None:
    page = render([figure(row("MuAI", 1.0), Row(name="peer", skipped="pip | could not"))])

    table = [line for line in page.splitlines() if line.startswith("|")]
    assert "not measured: pip \\| could not" in table[-1]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_given_a_goal_that_was_missed_when_reported_then_the_page_says_so() -> None:
    page = render([figure(row("MuAI", 1.0), goals=(Goal(text="speed", value=1.0, goal=2.0),))])

    assert "speed: 1, aimed at at least 2: **missed**" in page


@pytest.mark.parametrize(
    ("value", "text"), [(23_456.7, "23,457"), (123.4, "123"), (51.25, "51.2"), (0.9731, "0.973"), (0.0, "0")]
)
def test_given_a_number_when_written_then_it_has_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_median_of_many_rounds_is_known_better_than_that_of_few() -> None:
    assert interval(tuple(float(value) for value in range(31))) == (10.0, 21.0)
    assert interval(tuple(float(value) for value in range(5))) == (0.0, 4.0)
    assert interval((7.0,)) == (7.0, 7.0)
