"""`muai dead`: look at the dead letters, replay them, purge them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_producers.client import InferenceClient
    from muai_producers.dead_letters import DeadLetter, DeadLetters

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")


@click.group()
def dead() -> None:
    """Look at requests that no engine could serve; replay or purge them."""


@contextmanager
def _letters(invocation: Invocation) -> Iterator[tuple[InferenceClient, DeadLetters]]:
    from muai_producers.dead_letters import DeadLetters

    with invocation.client() as client:
        yield client, DeadLetters(client.store)


@dead.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Most entries to print.")
@_json_option
@pass_invocation
def list_(invocation: Invocation, limit: int, as_json: bool) -> None:
    """List the dead letters, newest first."""
    from muai_producers.cli.present import echo_json

    with _letters(invocation) as (_, letters):
        shown = list(letters.newest(limit))
        total = len(letters)
    if as_json:
        for letter in shown:
            echo_json(plain_letter(letter))
    elif shown:
        _print_table(shown)
        if total > len(shown):
            click.echo(f"{total - len(shown)} older ones are not shown (--limit)")
    else:
        click.echo("no dead letters")


def _print_table(letters: Sequence[DeadLetter]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("entry", "request", "model", "died", "why")
    for letter in letters:
        table.add_row(
            letter.entry_id, letter.request_id, letter.model, _when(letter.died_at), f"{letter.code}: {letter.message}"
        )
    Console().print(table)


def _when(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def plain_letter(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter in JSON's types."""
    import msgspec

    return {
        "entry_id": letter.entry_id,
        "request_id": letter.request_id,
        "model": letter.model,
        "code": letter.code,
        "message": letter.message,
        "attempts": letter.attempts,
        "died_at": letter.died_at,
        "request": msgspec.to_builtins(letter.request) if letter.request else None,
        "raw": letter.raw.decode("utf-8", "backslashreplace") or None,
    }


@dead.command()
@click.argument("entry")
@pass_invocation
def show(invocation: Invocation, entry: str) -> None:
    """Print everything that is kept of one dead letter (its entry's id or its request's)."""
    with _letters(invocation) as (_, letters):
        for letter in _found(letters, [entry]):
            click.echo(json.dumps(plain_letter(letter), indent=2, ensure_ascii=False))


@dead.command()
@click.argument("entries", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Replay every dead letter.")
@pass_invocation
def replay(invocation: Invocation, entries: tuple[str, ...], everything: bool) -> None:
    """Submit requests again under new ids; an entry goes once its request is accepted."""
    from muai_producers.dead_letters import replayed

    _refuse_unclear(entries, everything)
    unreadable = 0
    with _letters(invocation) as (client, letters):
        chosen = list(letters.newest()) if everything else _found(letters, entries)
        for letter in reversed(chosen):  # in the order in which they died
            if letter.request is None:
                unreadable += 1
                click.echo(
                    f"{letter.entry_id}: not a request ({letter.code}); look at it with `muai dead show`", err=True
                )
                continue
            request = replayed(letter.entry_id, letter.request, client.settings.queue.default_deadline_s, time.time())
            [new_id] = client.submit_many([request])
            letters.remove([letter.entry_id])
            click.echo(f"{letter.request_id} → {new_id}")
    if unreadable:
        click.get_current_context().exit(1)


@dead.command()
@click.argument("entries", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Purge every dead letter.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_invocation
def purge(invocation: Invocation, entries: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Delete dead letters for good."""
    _refuse_unclear(entries, everything)
    with _letters(invocation) as (_, letters):
        found = [] if everything else [letter.entry_id for letter in _found(letters, entries)]
        count = len(letters) if everything else len(found)
        if count and not yes:
            click.confirm(f"Delete {count} dead letter{'s' if count != 1 else ''} for good?", abort=True)
        purged = letters.purge() if everything else letters.remove(found)
    click.echo(f"{purged} purged")


def _refuse_unclear(entries: Sequence[str], everything: bool) -> None:
    if bool(entries) == everything:
        raise click.UsageError("name entries (or their requests), or say --all")


def _found(letters: DeadLetters, entries: Sequence[str]) -> list[DeadLetter]:
    from muai_producers.errors import RequestNotFoundError

    found = letters.get(entries)
    known = {name for letter in found for name in (letter.entry_id, letter.request_id)}
    missing = [entry for entry in entries if entry not in known]
    if missing:
        raise RequestNotFoundError(f"there is no dead letter {', '.join(missing)}; `muai dead list` lists them")
    return found
