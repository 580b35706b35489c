"""The kept figures as one picture; runs in an environment of its own: `python plot.py RESULTS_FOLDER PICTURE`.

It reads the JSON as it lies there, so that it needs matplotlib and nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, PEER, REFERENCE = "#1f6f5c", "#b7c0bd", "#d9a441"
BARS = (
    ("queue", "in bulk", "Queue, no-op model, in bulk\nrequests/s", "{:,.0f}"),
    ("queue", "idle p50", "Queue, idle, p50 (bar) and p99 (tick)\nms, less is better", "{:.1f}"),
    ("model", "throughput", "MiniLM\nsentences/s", "{:.0f}"),
    ("http", "throughput", "HTTP, no-op model, 64 connections\nrequests/s", "{:,.0f}"),
    ("open-loop", "goodput", "Goodput at 80 % of saturation\nrequests/s within the objective", "{:.0f}"),
)
TAIL_OF = {"idle p50": "idle p99"}


def main(folder: Path, picture: Path) -> None:
    figures = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    drawn = [bar for bar in BARS if _rows(figures, bar[0], bar[1])]
    if not drawn and "memory" not in figures:
        return
    panels = len(drawn) + ("memory" in figures)
    columns = 2
    lines = -(-panels // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 3.6 * lines), squeeze=False, layout="constrained")
    spots = iter(axes.flat)
    for name, metric, title, form in drawn:
        _bars(next(spots), _rows(figures, name, metric), metric, title, form)
    if "memory" in figures:
        _memory(next(spots), figures["memory"]["series"])
    for spot in spots:
        spot.axis("off")
    figure.savefig(picture, dpi=110)


def _rows(figures: dict[str, Any], name: str, metric: str) -> list[dict[str, Any]]:
    rows = [row for row in figures.get(name, {"rows": []})["rows"] if metric in row["metrics"]]
    # Trials have one value; the picture shows what was measured in pairs.
    return [row for row in rows if name != "open-loop" or "p95" in row["metrics"]]


def _bars(axis: Any, rows: list[dict[str, Any]], metric: str, title: str, form: str) -> None:
    labels = [_label(row) for row in rows]
    values = [row["metrics"][metric]["values"] for row in rows]
    middles = [median(one) for one in values]
    spread = [
        [mid - min(one) for mid, one in zip(middles, values, strict=True)],
        [max(one) - mid for mid, one in zip(middles, values, strict=True)],
    ]
    places = range(len(rows))
    axis.barh(
        places, middles, color=[_colour(row["name"]) for row in rows], xerr=spread, error_kw={"lw": 1, "ecolor": "#444"}
    )
    reach = max(max(one) for one in values)
    for place, row, middle, one in zip(places, rows, middles, values, strict=True):
        text, right = form.format(middle), max(one)
        tail = row["metrics"].get(TAIL_OF.get(metric, ""))
        if tail:
            tail_middle = median(tail["values"])
            axis.plot([tail_middle, tail_middle], [place - 0.35, place + 0.35], color="#8c2d19", lw=2)
            text, right = f"{text} / {form.format(tail_middle)}", max(right, tail_middle)
            reach = max(reach, tail_middle)
        axis.annotate(text, (right, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(places, labels, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, reach * 1.22)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _label(row: dict[str, Any]) -> str:
    kind = row["settings"].split(",")[0]
    return f"{row['name']}\n{kind}" if kind in ("poisson", "gamma") else row["name"]


def _colour(name: str) -> str:
    if name == "MuAI" or name.endswith("adaptive"):
        return OURS
    return REFERENCE if name.endswith("direct") else PEER


def _memory(axis: Any, series: dict[str, list[float]]) -> None:
    axis.plot(series["queued"], series["collector MiB"], color=OURS, lw=2)
    axis.set_ylim(0, max(series["collector MiB"]) * 1.3)
    axis.set_title("Collector's memory over requests queued\nMiB", loc="left", fontsize=10)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
