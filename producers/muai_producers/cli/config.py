"""`muai config`, with what needs an installation: changes at run time, their history, and who applies them."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from muai_config.cli import config as offline
from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_producers.runtime_config.editing import ConfigEditor
    from muai_producers.runtime_config.versions import ConfigVersion, ConfigVersions

APPLY_LIMIT_S = 3.0
_why = click.option("--why", default="", help="The reason, for the history.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")


@click.group(commands=offline.commands)
def config() -> None:
    """Check, show, document and change the configuration."""


@contextmanager
def _opened(invocation: Invocation) -> Iterator[tuple[ConfigEditor, ConfigVersions]]:
    from muai_producers.connections import state_client
    from muai_producers.runtime_config.editing import ConfigEditor
    from muai_producers.runtime_config.versions import ConfigVersions
    from muai_producers.store import Store

    settings = invocation.settings
    client = state_client(settings.queue.state_url)
    try:
        versions = ConfigVersions(Store(client, prefix=settings.queue.key_prefix))
        yield ConfigEditor(settings, versions), versions
    finally:
        client.close()


def who() -> str:
    """Whoever runs this, for the history."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a user id without a name, in a container
        return socket.gethostname()


def read_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, each value written as in the file: a number, true, null, [a, list].

    Raises:
        click.UsageError: one is no such pair, or its value is not YAML.
    """
    import yaml

    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise click.UsageError(f"{assignment!r} is not KEY=VALUE, as in optimization.batcher.max_batch_size=64")
        if key in changes:
            raise click.UsageError(f"{key} is given twice")
        try:
            changes[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise click.UsageError(f"the value of {key} cannot be read: {' '.join(str(error).split())}") from None
    return changes


@config.command("set")
@click.argument("assignments", metavar="KEY=VALUE...", nargs=-1, required=True)
@_why
@pass_invocation
def set_(invocation: Invocation, assignments: tuple[str, ...], why: str) -> None:
    """Change settings of the running installation: checked as a whole, applied by every process at once.

    Values are written as in the file. Only reloadable settings can be changed: `muai config docs` marks them. They
    hold over file and environment until they are changed again, unset, or rolled back.
    """
    changes = read_changes(assignments)
    with _opened(invocation) as (editor, versions):
        before = versions.current_number()
        _report(editor.set(changes, by=who(), why=why), before, versions)


@config.command()
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@_why
@pass_invocation
def unset(invocation: Invocation, keys: tuple[str, ...], why: str) -> None:
    """Let settings go by file and environment again."""
    with _opened(invocation) as (editor, versions):
        before = versions.current_number()
        _report(editor.unset(keys, by=who(), why=why), before, versions)


@config.command()
@click.argument("version", type=click.IntRange(min=0), required=False)
@_why
@pass_invocation
def rollback(invocation: Invocation, version: int | None, why: str) -> None:
    """Go back to VERSION, or to the one before the latest. 0 takes every change back."""
    with _opened(invocation) as (editor, versions):
        before = versions.current_number()
        _report(editor.rollback(version, by=who(), why=why), before, versions)


@config.command()
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, help="Most versions to print.")
@_json
@pass_invocation
def history(invocation: Invocation, count: int, as_json: bool) -> None:
    """List the changes made at run time, newest first."""
    from muai_producers.cli.present import echo_json

    with _opened(invocation) as (_, versions):
        found = versions.history(count)
    if as_json:
        import msgspec

        for version in found:
            echo_json(msgspec.to_builtins(version))
    elif found:
        _print_history(found)
    else:
        click.echo("nothing was ever changed at run time")


def _print_history(found: Sequence[ConfigVersion]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from muai_producers.runtime_config.live import describe_changes

    table = Table("version", "when", "by", Column("change", overflow="fold"), "why")
    for version in found:
        when = datetime.fromtimestamp(version.at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        what = describe_changes(version)
        if version.restores is not None:
            what = f"back to version {version.restores}: {what}"
        table.add_row(str(version.number), when, version.by, what, version.why)
    Console().print(table)


@config.command()
@_json
@pass_invocation
def status(invocation: Invocation, as_json: bool) -> None:
    """Say which version each process works by. Exit status 1 where one could not apply the latest."""
    from muai_producers.cli.present import echo_json

    with _opened(invocation) as (_, versions):
        number, applied = versions.current_number(), versions.applied()
    if as_json:
        import msgspec

        for one in applied:
            echo_json(msgspec.to_builtins(one))
    else:
        click.echo(f"version {number}" if number else "version 0: nothing is changed at run time")
        for one in applied:
            click.echo(f"  {one.process}: version {one.version}{'; ' + one.error if one.error else ''}")
        if not applied:
            click.echo("  no process of this installation is running")
    if any(one.version != number for one in applied):
        raise click.exceptions.Exit(1)


def _report(version: ConfigVersion, before: int, versions: ConfigVersions) -> None:
    """Say what was done, and wait a moment to say who has taken it up."""
    from muai_producers.runtime_config.live import describe_changes

    if version.number == before:
        click.echo(f"version {before}: nothing to change")
        return
    click.echo(f"version {version.number}: {describe_changes(version)}")
    until_s = time.monotonic() + APPLY_LIMIT_S
    while True:
        applied = versions.applied()
        behind = [one for one in applied if one.version < version.number]
        if not [one for one in behind if one.wanted < version.number] or time.monotonic() > until_s:
            break
        time.sleep(0.02)
    click.echo(f"applied by {len(applied) - len(behind)} of {len(applied)} processes")
    for one in behind:
        click.echo(
            f"  {one.process} stays at version {one.version}: {one.error or 'it has not answered yet'}", err=True
        )
    if behind:
        raise click.exceptions.Exit(1)
