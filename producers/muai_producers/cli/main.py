"""`muai`: finds the command, runs it, and turns what goes wrong into a line and an exit status.

Exit status: 0 done; 1 an error, told in one line with its code; 2 wrong usage or wrong configuration; 130 interrupted.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from muai_producers.cli.invocation import Invocation
from muai_producers.cli.registry import command_targets, missing_extra, summary

FAILED, WRONG, INTERRUPTED = 1, 2, 130
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Commands(click.Group):
    """The registered commands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(command_targets())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = command_targets().get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        targets = command_targets()
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(targets[name])) for name in self.list_commands(ctx)])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("muai")
        except importlib.metadata.PackageNotFoundError:
            version = "from a source tree"
        click.echo(f"muai {version}")
        ctx.exit()


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="The configuration file, instead of MUAI_CONFIG."
)
@click.option(
    "--log-level",
    envvar="MUAI_LOG_LEVEL",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    default="INFO",
    show_default=True,
    help="How much the processes log.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.pass_context
def muai(ctx: click.Context, config: Path | None, log_level: str) -> None:
    """Inference as a queue: submit requests, run the processes that serve them."""
    if config is not None:
        # Through the environment, so that it holds for every reader of the configuration and every process started.
        os.environ["MUAI_CONFIG"] = str(config.absolute())
    ctx.obj = Invocation(log_level)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit status."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    try:
        status = muai.main(args, prog_name="muai", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SystemExit as stop:  # Celery's own command line ends in one
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return FAILED
    except Exception as error:
        told = _explain(error)
        if told is None:
            raise
        line, code = told
        click.echo(line, err=True)
        return code
    return status if isinstance(status, int) else 0


def _explain(error: Exception) -> tuple[str, int] | None:
    """What to print for an error that is no fault of the program, and the exit status."""
    import redis

    from muai_config import ConfigError
    from muai_producers.errors import BrokerError, MuaiError

    if isinstance(error, ConfigError):
        return str(error), WRONG
    if isinstance(error, redis.RedisError):
        error = BrokerError(f"the state store does not answer: {error}")
    if isinstance(error, MuaiError):
        return f"{error.code}: {' '.join(error.message.split())}", FAILED
    if isinstance(error, ModuleNotFoundError):
        needed = missing_extra(error)
        return None if needed is None else (needed, FAILED)
    return None


if __name__ == "__main__":
    main()
