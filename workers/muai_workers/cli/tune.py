"""`muai tune`: the best settings for a model on this machine, measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_config.loading import Resolution
    from muai_workers.tuning.sweep import Candidate, Header, Measurements, Verdict
    from muai_workers.tuning.sweeping import Sweep

GENERATING = ("text-generation", "chat", "summarization")
DEFAULT_NEW_TOKENS = 32


def numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    """A list such as `4,8,16`.

    Raises:
        click.BadParameter: an entry is no number above 0.
    """
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise click.BadParameter(f"{text!r} is no list of numbers above 0, such as 4,8,16", param_hint=option)
    return found


def timeouts(text: str) -> list[str]:
    """A list such as `adaptive,5,20`.

    Raises:
        click.BadParameter: an entry is neither `adaptive` nor whole milliseconds.
    """
    from muai_workers.tuning.sweep import ADAPTIVE

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(part == ADAPTIVE or part.isdecimal() for part in found):
        raise click.BadParameter(f"{text!r} is no list such as adaptive,5,20", param_hint="--timeouts")
    return [part if part == ADAPTIVE else str(int(part)) for part in found]


@click.command()
@click.option("--model", required=True, help="The model, as the configuration names it.")
@click.option(
    "--target-p95-ms", required=True, type=click.FloatRange(min=0, min_open=True), help="For 95 % of answers."
)
@click.option("--engine", help="The engine; by default the model's first that can run here.")
@click.option("--sizes", help="Batch sizes, such as 4,8,16,32,64; of vLLM max_num_seqs.")
@click.option("--timeouts", "timeouts_ms", help="Batch timeouts in ms, such as adaptive,5,20,50.")
@click.option("--tokens", help="Of vLLM, in place of timeouts: max_num_batched_tokens, such as 2048,8192.")
@click.option("--loads", help="Arrivals as shares of saturation, such as 0.5,0.7,0.85,0.95.")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=10.0, show_default=True, help="Of each run.")
@click.option(
    "--inputs", type=click.File("r", encoding="utf-8"), help="Requests, one a line, as for `muai submit --file`."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=DEFAULT_NEW_TOKENS, show_default=True, help="Of each answer."
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="The folder; by default tune-MODEL.")
@click.option("--fresh", is_flag=True, help="Measure anew what the folder already has.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw the picture; it needs matplotlib.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of arrivals and of the choice of requests.")
@pass_invocation
def tune(invocation: Invocation, /, **options: Any) -> None:
    """Measure batch sizes and timeouts on this machine, and write the best as a configuration.

    Starts an installation of its own, and puts open-loop load on it: requests at random moments, whether or not earlier
    ones are answered. The best settings are those that answer most requests within the target per second while 95 % of
    all answers meet it. Leave the machine alone meanwhile. An interrupted sweep goes on where it was when the same
    command is given again.
    """
    from muai_workers.tuning.sweep import SweepError

    try:
        _tune(invocation, **options)
    except SweepError as error:
        raise click.ClickException(str(error)) from None


def _tune(invocation: Invocation, **options: Any) -> None:
    from muai_config.loading import resolve_file
    from muai_workers.tuning.sweep import LOADS, Measurements, verdicts
    from muai_workers.tuning.sweep_report import check_picture
    from muai_workers.tuning.sweep_stack import swept_document
    from muai_workers.tuning.sweeping import Sweep

    if options["plot"]:
        check_picture()
    model = options["model"]
    resolution = resolve_file(None, invocation.env)
    engine = _engine(resolution, model, options["engine"])
    wanted = _candidates(engine, options)
    folder: Path = options["output"] or Path(f"tune-{model.replace('/', '-')}")
    document = swept_document(resolution, model, engine)
    requests = _requests(resolution, model, options)
    header = _header(document, requests, engine, options)
    path = folder / "measurements.jsonl"
    if options["fresh"]:
        path.unlink(missing_ok=True)
    kept = Measurements(path, header)
    sweep = Sweep(
        document=document,
        engine=engine,
        requests=requests,
        candidates=wanted,
        loads=numbers(options["loads"], float, "--loads") if options["loads"] else list(LOADS),
        target_p95_ms=options["target_p95_ms"],
        seconds=options["seconds"],
        seed=options["seed"],
        home=folder.absolute() / "stack",
        on_step=lambda *_: None,
    )
    _run(sweep, kept)
    names = {one.name for one in wanted}
    measured = [one for one in kept.done if one.candidate in names]
    found = verdicts(measured, options["target_p95_ms"])
    _report(folder, header, kept, wanted, found, draw=options["plot"])


def _engine(resolution: Resolution, model: str, asked: str | None) -> str:
    from muai_workers.engines.registry import availability_report

    settings = resolution.settings
    if model not in settings.models:
        known = ", ".join(sorted(settings.models)) or "none"
        raise click.UsageError(f"the configuration has no model {model!r}; it has: {known}")
    chain = settings.models[model].engines or settings.optimization.engine_preference
    report = availability_report(settings)
    reasons = {name: report[name].reason for name in (asked,) if asked and name in report}
    able = [
        name for name in ([asked] if asked else chain) if name == "fake" or (name in report and report[name].available)
    ]
    if not able:
        reasons |= {name: report[name].reason for name in ([asked] if asked else chain) if name in report}
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise click.UsageError(f"no engine of {model} can run here ({told or asked}); `muai engines` says which can")
    return able[0]


def _candidates(engine: str, options: Mapping[str, Any]) -> list[Candidate]:
    from muai_workers.tuning.sweep import SIZES, TIMEOUTS, VLLM_SIZES, VLLM_TOKENS, candidates

    is_vllm = engine == "vllm"
    wrong = (
        "--timeouts" if is_vllm and options["timeouts_ms"] else "--tokens" if options["tokens"] and not is_vllm else ""
    )
    if wrong:
        raise click.UsageError(f"{wrong} says nothing to {engine}: vLLM has --tokens, the others have --timeouts")
    sizes = numbers(options["sizes"], int, "--sizes") if options["sizes"] else (VLLM_SIZES if is_vllm else SIZES)
    if is_vllm:
        tokens = numbers(options["tokens"], int, "--tokens") if options["tokens"] else VLLM_TOKENS
        return candidates(engine, sizes, [str(one) for one in tokens])
    return candidates(engine, sizes, timeouts(options["timeouts_ms"]) if options["timeouts_ms"] else TIMEOUTS)


def _requests(resolution: Resolution, model: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is asked: the file's requests, or sentences and prompts that come with this program."""
    from muai_producers.cli.inputs import read_requests
    from muai_workers.demo.corpus import PROMPTS, load_sentences

    task = resolution.settings.models[model].task
    generates = task in GENERATING
    fixed: dict[str, Any] = {"model": model}
    if generates:
        fixed["parameters"] = {"max_tokens": options["max_tokens"]}
    if options["inputs"] is not None:
        as_json = str(options["inputs"].name).endswith(".jsonl")
        found = list(read_requests(options["inputs"], as_json=as_json, options=fixed))
        if not found:
            raise click.UsageError(f"--inputs: {options['inputs'].name} holds no requests")
        return found
    texts = list(PROMPTS) if task == "text-generation" else [sentence.text for sentence in load_sentences()]
    if task == "chat":
        return [fixed | {"inputs": {"messages": [{"role": "user", "content": text}]}} for text in texts]
    return [fixed | {"inputs": text} for text in texts]


def _header(
    document: Mapping[str, Any], requests: Sequence[Mapping[str, Any]], engine: str, options: Mapping[str, Any]
) -> Header:
    import os
    import platform

    from muai_workers.tuning.sweep import Header
    from muai_workers.tuning.sweep_stack import digest

    return Header(
        model=options["model"],
        engine=engine,
        target_p95_ms=options["target_p95_ms"],
        seconds=options["seconds"],
        seed=options["seed"],
        machine=f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
        inputs=digest(requests),
        configuration=digest(document),
    )


def _run(sweep: Sweep, kept: Measurements) -> None:
    """Measure, with a bar that says how far it is."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if kept.done:
        console.print(f"{len(kept.done)} measurements are there already", highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        # The total falls where a candidate cannot bear a load: the higher ones are not tried.
        bar = progress.add_task("starting", total=len(kept.done) + sweep.most_left(kept), completed=len(kept.done))

        def step(text: str, left: int) -> None:
            progress.update(bar, description=text, completed=len(kept.done), total=len(kept.done) + left)

        try:
            replace(sweep, on_step=step).run(kept)
        except KeyboardInterrupt:
            progress.stop()
            click.echo(f"interrupted; {len(kept.done)} measurements are kept, and the same command goes on", err=True)
            sys.exit(130)
        progress.update(bar, description="done", completed=len(kept.done), total=len(kept.done))


def _report(
    folder: Path,
    header: Header,
    kept: Measurements,
    wanted: Sequence[Candidate],
    found: Sequence[Verdict],
    *,
    draw: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from muai_workers.tuning import sweep_report

    assert kept.saturation is not None
    settings = {one.name: one.settings for one in wanted}
    names = set(settings)
    measured = [one for one in kept.done if one.candidate in names]
    sweep_report.write_measurements(folder, header, kept.saturation, measured, found)
    path = sweep_report.write_configuration(folder, header, found[0], settings[found[0].candidate])
    if draw:
        sweep_report.draw(folder, header, wanted, found)
    table = Table("settings", "in time/s", "p95 ms", "at load", "target", box=None, pad_edge=False)
    for one in found:
        met = "met" if one.meets_target else "not met"
        table.add_row(one.candidate, f"{one.goodput_rps:.1f}", f"{one.p95_ms:.0f}", f"{one.load:.0%}", met)
    Console().print(table)
    click.echo(f"saturation: {kept.saturation.rate_rps:.1f} requests/s")
    click.echo(f"best: {found[0].candidate}; written to {path}")
    if not found[0].meets_target:
        raise click.ClickException(
            f"no settings answered 95 % within {header.target_p95_ms:g} ms: try lower --loads, or a longer target"
        )
