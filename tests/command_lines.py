"""Whether command lines are such that the real command-line programs accept them; nothing is run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import pytest


@contextmanager
def _parsing_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[click.Context]]:
    """While it lasts, click parses a command line, its subcommand's included, and calls no command."""
    parsed: list[click.Context] = []

    def note(_: click.Command, ctx: click.Context) -> None:
        parsed.append(ctx)

    with monkeypatch.context() as patch:
        patch.setattr(click.Command, "invoke", note)
        yield parsed


def parse_muai(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of the innermost command of `muai ARGUMENTS`, as the command would get them.

    Raises:
        click.UsageError: the command line would be refused.
    """
    from muai_producers.cli.main import muai

    with _parsing_only(monkeypatch) as parsed:
        muai.main(list(arguments), prog_name="muai", standalone_mode=False)
    assert len(parsed) > 1, f"muai {shlex.join(arguments)} names no command"
    return dict(parsed[-1].params)


def parse_celery(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> dict[str, Any]:
    """The same for `celery ARGUMENTS`; the application that it names must exist."""
    from celery.bin.celery import celery

    with _parsing_only(monkeypatch) as parsed:
        celery.main(list(arguments), prog_name="celery", standalone_mode=False)
    assert len(parsed) > 1, f"celery {shlex.join(arguments)} names no command"
    return dict(parsed[-1].params)
