"""`muai collector`."""

import click

from muai_producers.cli.invocation import Invocation, pass_invocation


@click.command()
@click.option("--name", help="Its name in Flower and in logs; made from the process id by default.")
@pass_invocation
def collector(invocation: Invocation, name: str | None) -> None:
    """Run a batch collector: requests in, batches out to the engines' queues."""
    settings = invocation.settings  # before anything heavy: what is wrong with it is told at once
    from muai_batching.app import run_collector

    run_collector(settings, name, log_level=invocation.log_level)
