"""`muai tuning`: what the automatic tuner does, and did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_workers.tuning.records import Knowledge, TunerState, TuningEvent
    from muai_workers.tuning.store import TuningStore

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
STYLES = {"kept": "green", "rolled_back": "red", "paused": "yellow", "advised": "cyan"}


@click.group()
def tuning() -> None:
    """Look at the automatic tuner: what it does now, and what it decided."""


@contextmanager
def _opened(invocation: Invocation) -> Iterator[TuningStore]:
    from muai_producers.connections import state_client
    from muai_producers.store import Store
    from muai_workers.tuning.store import TuningStore

    queue = invocation.settings.queue
    client = state_client(queue.state_url)
    try:
        yield TuningStore(Store(client, prefix=queue.key_prefix))
    finally:
        client.close()


@tuning.command()
@click.option("--count", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most decisions to print.")
@_json
@pass_invocation
def history(invocation: Invocation, count: int, as_json: bool) -> None:
    """List the tuner's decisions, newest first, each with its reason."""
    with _opened(invocation) as memory:
        events = memory.history(count)
    if as_json:
        import msgspec

        from muai_producers.cli.present import echo_json

        for event in events:
            echo_json(msgspec.to_builtins(event))
    elif events:
        _print_history(events)
    else:
        click.echo("nothing was ever tuned; optimization.tuner.enabled switches it on")


def _print_history(events: Sequence[TuningEvent]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("when", "what", "change", "why", box=None, pad_edge=False)
    for event in events:
        when = datetime.fromtimestamp(event.at, UTC).astimezone().strftime("%m-%d %H:%M:%S")
        style = STYLES.get(event.outcome, "")
        what = event.outcome.replace("_", " ")
        table.add_row(when, f"[{style}]{what}[/{style}]" if style else what, changes_of(event), event.rationale)
    Console().print(table)


def changes_of(event: TuningEvent) -> str:
    """What an event changed, or is about."""
    names = {**event.old, **event.new}
    if not names:
        return event.parameter
    configured = "as configured"
    return ", ".join(f"{name} {event.old.get(name, configured)} → {event.new.get(name, configured)}" for name in names)


@tuning.command()
@_json
@pass_invocation
def status(invocation: Invocation, as_json: bool) -> None:
    """Say whether the tuner is on, what it holds and has on trial, and what it has learnt."""
    from muai_producers.connections import state_client
    from muai_producers.runtime_config.versions import ConfigVersions
    from muai_producers.store import Store
    from muai_workers.tuning.looking import in_effect

    settings = invocation.settings
    client = state_client(settings.queue.state_url)
    try:
        store = Store(client, prefix=settings.queue.key_prefix)
        is_on = in_effect(settings, ConfigVersions(store).current()).optimization.tuner.enabled
    finally:
        client.close()
    with _opened(invocation) as memory:
        state, _ = memory.state()
        learnt = memory.all_knowledge()
    if as_json:
        import msgspec

        from muai_producers.cli.present import echo_json

        echo_json({"enabled": is_on, "state": msgspec.to_builtins(state), "learnt": msgspec.to_builtins(learnt)})
        return
    for line in status_lines(is_on, state, learnt):
        click.echo(line)


def status_lines(is_on: bool, state: TunerState, learnt: dict[str, Knowledge]) -> Iterator[str]:
    """The state in words."""
    yield "the tuner is on" if is_on else "the tuner is off; optimization.tuner.enabled switches it on"
    if state.place is not None:
        yield f"it tunes for {state.place}"
    if state.trial is not None:
        changed = state.trial.old.changes_to(state.trial.new)
        told = ", ".join(f"{name} {state.trial.old.of(name)} → {value}" for name, value in changed.items())
        where = f" at {state.trial.canary} alone" if state.trial.canary else ""
        yield f"on trial{where}: {told}, because {state.trial.why}"
    elif is_on and state.values is not None:
        yield "nothing is on trial"
    if state.holding:
        yield f"it waits: {state.holding}"
    if state.advice:
        yield f"advice: {state.advice}"
    for place, known in learnt.items():
        model, engine, device, level = place.split("\t")
        best = known.best
        yield (
            f"learnt for {model} on {engine} ({device}) at about {2.0 ** int(level):g} requests/s: batches of "
            f"{best.batch_size}, timeout {best.batch_timeout_ms} ms, cache {best.cache_size_mb} MB "
            f"(worth per request {known.score:.3f})"
        )


@tuning.command()
@pass_invocation
def forget(invocation: Invocation) -> None:
    """Forget what was learnt, so that trials begin anew: after other hardware, or other versions of engines."""
    with _opened(invocation) as memory:
        num_known = len(memory.all_knowledge())
        memory.forget()
    click.echo(f"forgot what was learnt of {num_known} loads")
