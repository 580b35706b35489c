"""`muai workflow`: list the workflows, run one."""

from __future__ import annotations

import json
from typing import Any

import click
import msgspec

from muai_producers.cli.invocation import Invocation, pass_invocation


@click.group()
def workflow() -> None:
    """Run workflows: chat, answers from documents and from search."""


@workflow.command("list")
def list_workflows() -> None:
    """Show the workflows and what each takes."""
    from rich.console import Console
    from rich.table import Table

    from muai_producers.workflows.orchestrator import AUTO, WORKFLOWS

    table = Table("workflow", "what for", "parameters")
    for kind in WORKFLOWS:
        fields = msgspec.structs.fields(kind.parameters)
        shown = [field.name if field.required else f"[{field.name}]" for field in fields]
        table.add_row(kind.name, kind.description, ", ".join(shown).replace("[", r"\["))
    table.add_row(AUTO, "Whichever of these fits the question.", "question")
    Console().print(table)


@workflow.command()
@click.argument("name")
@click.argument("parameters", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Longest that the run may take, seconds.")
@click.option("--tenant", default="default", show_default=True)
@click.option("--no-wait", is_flag=True, help="Print the id, and leave the result to `muai result ID`.")
@pass_invocation
def run(
    invocation: Invocation, name: str, parameters: tuple[str, ...], timeout: float | None, tenant: str, no_wait: bool
) -> None:
    """Run workflow NAME. A VALUE that is JSON is read as such; all else is text.

    \b
    muai workflow run ingest documents='[{"title": "Hours", "text": "We open at nine."}]'
    muai workflow run rag question="When do you open?"
    """
    from celery import Celery

    from muai_config import celery_settings
    from muai_producers.client import InferenceClient
    from muai_producers.workflows.runs import WorkflowRuns

    settings = invocation.settings
    app = Celery("muai.cli", set_as_current=False)
    app.conf.update(celery_settings(settings, "producer"))
    with InferenceClient(settings) as client:
        runs = WorkflowRuns(settings, client, app)
        run_id = runs.submit(name, _read(parameters), tenant=tenant, timeout_s=timeout)
        if no_wait:
            click.echo(run_id)
            return
        result = client.result(run_id, timeout_s=None)
    click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))


def _read(parameters: tuple[str, ...]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals or not key:
            raise click.UsageError(f"{parameter!r} is not of the form KEY=VALUE")
        try:
            read[key] = json.loads(value)
        except ValueError:
            read[key] = value
    return read
