"""`muai top`: what the fleet does, in a terminal."""

from __future__ import annotations

import time

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

SHORTEST_EVERY_S = 0.5


@click.command()
@click.option(
    "--window", type=click.FloatRange(10, 31_536_000), default=60, show_default=True, help="Seconds to tell of."
)
@click.option(
    "--every",
    type=click.FloatRange(SHORTEST_EVERY_S, 3600),
    default=2,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print it once, instead of showing it live.")
@click.option("--json", "as_json", is_flag=True, help="Print the performance report once, as JSON.")
@pass_invocation
def top(invocation: Invocation, window: float, every: float, once: bool, as_json: bool) -> None:
    """Show what the fleet does: models, queues, hosts, alerts; live, until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from muai_producers.cli.top_view import TopView, render

    view = TopView(invocation.settings, window)
    console = Console()
    try:
        if as_json:
            import msgspec

            click.echo(msgspec.json.encode(view.monitor.report(window)))
            return
        if once or not console.is_terminal:
            console.print(render(view.look(), console.width))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(render(view.look(), console.width), refresh=True)
                time.sleep(every)
    finally:
        view.close()
