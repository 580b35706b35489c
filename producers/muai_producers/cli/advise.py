"""`muai advise`: what would help an instance, on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from muai_producers.cli.config import read_changes, who
from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.advice.records import Analysis, ApplyRequest, ApplyResult, OptimizationPlan
    from muai_producers.store import Store

TYPES = ("vllm", "deepspeed", "onnx", "pytorch", "fake", "muai")
"""As `InstanceType` has them: a command that only prints its help imports nothing of the rest."""


@contextmanager
def _opened(invocation: Invocation) -> Iterator[tuple[Store, Settings]]:
    """The state store, and the settings with what was changed at run time."""
    from muai_config.errors import Source
    from muai_config.runtime import overlaid
    from muai_producers.connections import state_client
    from muai_producers.runtime_config.versions import ConfigVersions
    from muai_producers.store import Store

    settings = invocation.settings
    client = state_client(settings.queue.state_url)
    try:
        store = Store(client, prefix=settings.queue.key_prefix)
        version = ConfigVersions(store).current()
        yield store, overlaid(settings, version.overrides, Source("runtime", f"version {version.number}"))
    finally:
        client.close()


@click.command()
@click.argument("instance")
@click.option(
    "--type",
    "kind",
    type=click.Choice(TYPES),
    help="The engine; left out: whichever serves the model most, or vllm for a server.",
)
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option that a vLLM server was started with, as in max_num_seqs=64. May be repeated.",
)
@click.option("--apply", "is_applied", is_flag=True, help="Do what can be done while processes run.")
@click.option("--why", default="", help="The reason, for the history; with --apply.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@pass_invocation
def advise(
    invocation: Invocation,
    instance: str,
    kind: str | None,
    assignments: tuple[str, ...],
    is_applied: bool,
    why: str,
    as_json: bool,
) -> None:
    """Say what holds INSTANCE up and what would help: a model of this installation, or a vLLM server as HOST:PORT."""
    import msgspec

    from muai_producers.advice.engine import OptimizationEngine
    from muai_producers.advice.records import AnalysisRequest, ApplyRequest, OptimizationRequest
    from muai_producers.advice.vllm_metrics import ScrapeError

    with _opened(invocation) as (store, settings):
        kind = kind or ("muai" if instance in settings.models else "vllm")
        asked = {"instance_id": instance, "instance_type": kind, "current_config": read_changes(assignments)}
        engine = OptimizationEngine(lambda: settings, store)
        plan = engine.generate_plan(msgspec.convert(asked, OptimizationRequest))
        if as_json:
            click.echo(msgspec.json.encode(plan))
        else:
            try:
                _print_analysis(engine.analyze(msgspec.convert(asked, AnalysisRequest)))
            except ScrapeError as error:
                click.echo(f"nothing was measured: {error.message}")
            _print_plan(plan)
        if is_applied:
            _report(_applied(invocation, store, ApplyRequest(plan=plan, why=why)), to_stderr=as_json)


def _print_analysis(found: Analysis) -> None:
    click.echo(f"by {found.source}" if found.bottlenecks or found.figures else found.source)
    for bottleneck in found.bottlenecks:
        click.echo(f"{bottleneck.severity}: {bottleneck.kind}: {bottleneck.description}")
        for evidence in bottleneck.evidence:
            click.echo(f"    {evidence.meaning}")


def _print_plan(plan: OptimizationPlan) -> None:
    for name, one in zip(plan.priority_order, plan.optimizations, strict=True):
        click.echo(f"{name}: {one.title} ({one.expected_impact.value} impact; {one.implementation_effort})")
        for change in one.config_changes:
            click.echo(f"    {change.parameter}: {change.current_value} -> {change.recommended_value}; {change.reason}")
        click.echo(f"    brings {one.estimated_improvement}")
        for told, lines in (("risk", one.risks), ("needs", one.prerequisites)):
            for line in lines:
                click.echo(f"    {told}: {line}")
    click.echo(f"in all: {plan.estimated_total_improvement}")


def _applied(invocation: Invocation, store: Store, request: ApplyRequest) -> ApplyResult:
    from muai_producers.advice.applying import apply_plan
    from muai_producers.runtime_config.editing import ConfigEditor
    from muai_producers.runtime_config.versions import ConfigVersions

    versions = ConfigVersions(store)
    return apply_plan(request, ConfigEditor(invocation.settings, versions), versions, by=who())


def _report(done: ApplyResult, *, to_stderr: bool) -> None:
    for key, value in done.applied.items():
        click.echo(f"applied: {key} = {value}", err=to_stderr)
    for one in done.not_applied:
        click.echo(f"not applied: {one.parameter} = {one.recommended_value}: {one.reason}", err=to_stderr)
    if done.version != done.rollback_to:
        click.echo(f"version {done.version}; `muai config rollback {done.rollback_to}` takes it back", err=to_stderr)
