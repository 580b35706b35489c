"""`muai demo`."""

import sys

import click


@click.command()
def demo() -> None:
    """Show all of it on this machine: 400 sentences, a search, generations, an engine that fails."""
    from rich.console import Console

    from muai_workers.demo.play import play

    sys.exit(play(Console()))
