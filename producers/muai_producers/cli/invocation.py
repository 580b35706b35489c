"""What every command is given: the configuration that it runs under, and how much it logs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.client import InferenceClient

BROKER_VARIABLES = ("MUAI_BROKER_URL", "MUAI_QUEUE_BROKER_URL")


def home_folder(env: Mapping[str, str] | None = None) -> Path:
    """Where an installation keeps its files: MUAI_HOME, or ~/.muai."""
    named = (os.environ if env is None else env).get("MUAI_HOME", "").strip()
    return Path(named).expanduser() if named else Path.home() / ".muai"


@dataclass
class Invocation:
    """One run of the command line."""

    log_level: str = "INFO"
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @functools.cached_property
    def settings(self) -> Settings:
        """The configuration in effect; where it names no broker, the broker of a running `muai up` is taken.

        Raises:
            ConfigError: the configuration is wrong.
        """
        from muai_config.loading import resolve_file
        from muai_producers.cli.running import running_stack

        resolution = resolve_file(None, self.env)
        if resolution.sources["queue", "broker_url"].kind != "default":
            return resolution.settings
        stack = running_stack(home_folder(self.env))
        if stack is None:
            return resolution.settings
        env = {name: value for name, value in self.env.items() if name not in BROKER_VARIABLES}
        return resolve_file(None, {**env, **stack.variables}).settings

    @contextmanager
    def client(self) -> Iterator[InferenceClient]:
        """A client under these settings."""
        from muai_producers.client import InferenceClient

        with InferenceClient(self.settings) as client:
            yield client


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)
