"""`python -m benchmarks.run`: measure, keep, and write the report."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environments import python_of
from benchmarks.figures import FIGURES
from benchmarks.machine import ROOT, describe
from benchmarks.plan import FULL, QUICK, Plan
from benchmarks.processes import BenchmarkError, private_redis
from benchmarks.report import render
from benchmarks.results import Figure, load, save
from benchmarks.session import Session

FULL_FOLDER = ROOT / "docs" / "benchmarks"
QUICK_FOLDER = ROOT / "build" / "benchmarks"
PICTURE = "benchmarks.png"


@click.command()
@click.option("--quick", is_flag=True, help="A look in three minutes, kept in build/benchmarks.")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURES)), help="This figure alone; may be repeated.")
@click.option("--resume", is_flag=True, help="Keep the figures that this commit already has.")
@click.option("--report-only", is_flag=True, help="Measure nothing: write the report from what is kept.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The folder for report and numbers.")
def main(quick: bool, only: Sequence[str], resume: bool, report_only: bool, out: Path | None) -> None:
    """Measure MuAI and its peers on this machine, one after the other."""
    # Told to stop, it must still stop what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan = QUICK if quick else FULL
    folder = (out or (QUICK_FOLDER if quick else FULL_FOLDER)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    names = [] if report_only else [name for name in FIGURES if not only or name in only]
    failed = _measure_all(names, plan, folder, resume, console)
    write_report(folder, console)
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}")


def _measure_all(names: Sequence[str], plan: Plan, folder: Path, resume: bool, console: Console) -> list[str]:
    """Measure and keep each figure; the names of those that failed."""
    failed = []
    for name in names:
        kept = load(name, folder)
        if resume and kept and kept.mode == plan.mode and kept.machine["muai"] == describe()["muai"]:
            console.print(f"{name}: kept from {kept.measured_at}")
            continue
        try:
            save(measure(name, plan, console), folder)
        except BenchmarkError as error:
            console.print(f"[red]{name}: {error}", markup=True)
            failed.append(name)
    return failed


def measure(name: str, plan: Plan, console: Console) -> Figure:
    """Measure one figure, in a Redis and a folder of its own.

    Raises:
        BenchmarkError: ours could not be measured; a peer that cannot be is left out instead, with the reason.
    """
    measurement = FIGURES[name]
    machine, measured_at, started_s = describe(), datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    columns = (TextColumn("{task.fields[figure]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, TextColumn("{task.description}"), console=console))
        task = progress.add_task("starting", total=measurement.steps(plan), figure=name)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muai-bench-")))
        session = Session(
            plan=plan,
            redis_url=stack.enter_context(private_redis(folder)),
            folder=folder,
            on_step=lambda text: progress.update(task, advance=1, description=text),
            on_skip=lambda who, why: progress.console.print(f"{who} left out: {why}", style="yellow", markup=False),
        )
        measured = measurement.measure(session)
        progress.update(task, completed=measurement.steps(plan), description="done")
    return Figure(
        name=name,
        title=measurement.title,
        mode=plan.mode,
        measured_at=measured_at,
        wall_s=round(time.monotonic() - started_s, 1),
        machine=machine,
        how=measurement.how,
        rows=tuple(measured.rows),
        goals=tuple(measured.goals),
        series=measured.series,
    )


def write_report(folder: Path, console: Console) -> None:
    """Page and picture from the figures that are kept in `folder`."""
    kept = [figure for name in FIGURES if (figure := load(name, folder)) is not None]
    (folder / "README.md").write_text(render(kept))
    script = Path(__file__).parent / "plot.py"
    try:
        argv = [str(python_of("plot")), str(script), str(folder), str(folder / PICTURE)]
        subprocess.run(argv, check=True, capture_output=True, text=True)
    except BenchmarkError as error:
        console.print(f"no picture: {error}", style="yellow", markup=False)
    except subprocess.CalledProcessError as error:
        console.print(f"no picture: {error.stderr}", style="yellow", markup=False)
    for figure in kept:
        for goal in figure.goals:
            console.print(f"{'met   ' if goal.met else 'missed'} {goal.text}: {goal.value:.4g} (aim {goal.goal:g})")
    console.print(f"report: {folder / 'README.md'}")


if __name__ == "__main__":
    main()
