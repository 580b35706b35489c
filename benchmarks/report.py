"""The kept figures as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import Figure, Goal, Metric, Row

HEAD = (
    "Measured by `make bench`: every contestant of a table in turn, in one run, on one machine. A cell is the median "
    "of the repeats, with the least and the greatest of them behind it. The numbers are in `*.json` beside this page."
)


def render(figures: Sequence[Figure]) -> str:
    """The whole page."""
    parts = [
        "# Benchmarks",
        "",
        HEAD,
        "",
        "![Every figure](benchmarks.png)",
        "",
    ]
    for figure in figures:
        parts += _figure(figure)
    return "\n".join(parts).rstrip() + "\n"


def _figure(figure: Figure) -> list[str]:
    lines = [f"## {figure.title}", "", figure.how, "", *_table(figure.rows), ""]
    lines += [_goal(goal) for goal in figure.goals]
    lines += [""] if figure.goals else []
    return [*lines, _where(figure), ""]


def _table(rows: Sequence[Row]) -> list[str]:
    units = {name: one.unit for row in rows for name, one in row.metrics.items()}
    heads = [f"{name}, {unit}" if unit else name for name, unit in units.items()]
    lines = [_line(["contestant", *heads, "settings", "versions"])]
    lines.append("| --- |" + " ---: |" * len(heads) + " --- | --- |")
    for row in rows:
        cells = [_cell(row.metrics.get(name)) for name in units]
        settings = f"not measured: {row.skipped}" if row.skipped else row.settings
        versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
        lines.append(_line([row.name, *cells, settings, versions]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    text = number(metric.median)
    return text if len(metric.values) == 1 else f"{text} ({number(metric.low)} to {number(metric.high)})"


def number(value: float) -> str:
    """Three digits or so: 23,400; 51.3; 0.973."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _goal(goal: Goal) -> str:
    word = "at most" if goal.at_most else "at least"
    verdict = "met" if goal.met else "**missed**"
    return f"- {goal.text}: {number(goal.value)}, aimed at {word} {number(goal.goal)}: {verdict}"


def _where(figure: Figure) -> str:
    machine = figure.machine
    return (
        f"{figure.mode.capitalize()} run of {figure.measured_at}, {figure.wall_s:.0f} s: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory']}, {machine['system']}, Python {machine['python']}, "
        f"Redis {machine['redis']}, MuAI {machine['muai']}; load before {machine['load before']}."
    )
