"""What is left of a sweep: the best settings as a configuration file, the measurements beside it, and a picture."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from muai_workers.tuning.sweep import Candidate, Header, Measurement, Saturation, SweepError, Verdict, nested

CONFIGURATION, JSON, CSV, PICTURE = "tuned.yaml", "measurements.json", "measurements.csv", "goodput.png"


def check_picture() -> None:
    """Raises:
    SweepError: a picture cannot be drawn here; better said before measuring than after.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SweepError(
            "the picture needs matplotlib, which is not installed: pip install 'muai[tune]', or --no-plot to do without"
        )


def write_configuration(folder: Path, header: Header, best: Verdict, settings: dict[str, Any]) -> Path:
    """The best settings, to be merged into a configuration."""
    meets = "answered within the target" if best.meets_target else "95 % did NOT meet the target under any load"
    lines = [
        f"# Measured by muai tune: {header.model} on {header.engine}, target {header.target_p95_ms:g} ms for 95 %.",
        f"# {best.candidate}: {best.goodput_rps:g} requests/s in time, 95 % within {best.p95_ms:g} ms ({meets}),",
        f"# at {best.load:.0%} of saturation. The measurements are in {CSV} and {JSON}.",
    ]
    path = folder / CONFIGURATION
    path.write_text("\n".join(lines) + "\n" + yaml.safe_dump(nested(settings), sort_keys=True), encoding="utf-8")
    return path


def write_measurements(
    folder: Path,
    header: Header,
    saturation: Saturation,
    measured: Sequence[Measurement],
    verdicts: Sequence[Verdict],
) -> None:
    """As JSON, with what belongs to it, and as CSV."""
    rows = [msgspec.to_builtins(one) | {"goodput_rps": round(one.goodput_rps, 3)} for one in measured]
    document = {
        "sweep": msgspec.to_builtins(header),
        "saturation_rps": saturation.rate_rps,
        "measurements": rows,
        "verdicts": msgspec.to_builtins(verdicts),
    }
    (folder / JSON).write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / CSV).write_text(text.getvalue(), encoding="utf-8")


def draw(folder: Path, header: Header, candidates: Sequence[Candidate], verdicts: Sequence[Verdict]) -> Path:
    """Goodput by row and column: hatched where the target was not met, framed where it is best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(one.row for one in candidates))
    columns = list(dict.fromkeys(one.column for one in candidates))
    by_name = {one.candidate: one for one in verdicts}
    grid = [[float("nan")] * len(columns) for _ in rows]
    figure, axis = pyplot.subplots(figsize=(2.2 + 1.5 * len(columns), 1.6 + 0.65 * len(rows)), layout="constrained")
    for candidate in candidates:
        verdict = by_name.get(candidate.name)
        if verdict is None:
            continue
        y, x = rows.index(candidate.row), columns.index(candidate.column)
        grid[y][x] = verdict.goodput_rps
        axis.text(x, y, f"{verdict.goodput_rps:.0f}/s\n{verdict.p95_ms:.0f} ms", ha="center", va="center", fontsize=9)
        if not verdict.meets_target:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="//", edgecolor="#00000040", lw=0))
        if verdict is verdicts[0]:
            axis.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="#8c2d19", lw=3))
    image = axis.imshow(grid, cmap="YlGn", aspect="auto", vmin=0)
    figure.colorbar(image, ax=axis, label="requests/s in time")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylabel("batch size")
    axis.set_title(
        f"{header.model} on {header.engine}: goodput and 95th percentile\ntarget {header.target_p95_ms:g} ms; "
        "hatched: not met",
        fontsize=10,
    )
    path = folder / PICTURE
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
