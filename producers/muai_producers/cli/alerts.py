"""`muai alerts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_producers.alerts.records import AlertEntry

SEVERITY_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red"}


@click.command()
@click.option("--open", "only_open", is_flag=True, help="Only those that last.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with what became of each notice.")
@pass_invocation
def alerts(invocation: Invocation, only_open: bool, limit: int, as_json: bool) -> None:
    """List alerts, newest first."""
    from muai_producers.alerts.store import AlertStore

    with invocation.client() as client:
        entries = AlertStore(client.store).history(limit, only_open=only_open)
    if as_json:
        import msgspec

        from muai_producers.cli.present import echo_json

        for entry in entries:
            echo_json(msgspec.to_builtins(entry))
        return
    if not entries:
        click.echo("no alert is open" if only_open else "no alert has been raised")
        return
    _print_table(entries)


def _print_table(entries: list[AlertEntry]) -> None:
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    table = Table("since", "lasts", "alert", "sent to", box=None, pad_edge=False)
    for entry in entries:
        alert = entry.alert
        since = datetime.fromtimestamp(alert.timestamp, UTC).astimezone().strftime("%m-%d %H:%M:%S")
        lasts = "still" if entry.is_open else f"{(alert.resolved_at or alert.timestamp) - alert.timestamp:.0f} s"
        style = SEVERITY_STYLES[alert.severity]
        table.add_row(
            since, lasts, f"[{style}]{alert.severity}[/{style}] {alert.alert_type}: {alert.message}", _sent(entry)
        )
    Console().print(table)


def _sent(entry: AlertEntry) -> str:
    """Where an alert's beginning has gone, and where it has not."""
    beginnings = [state for state in entry.deliveries if state.kind == "firing"]
    marks = {"sent": "", "waiting": " (waiting)", "failed": " (failed)"}
    return ", ".join(f"{state.destination}{marks[state.status]}" for state in beginnings) or "-"
