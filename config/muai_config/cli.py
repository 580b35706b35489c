"""`muai config`: check, show, docs and example."""

import sys
from pathlib import Path

import click

from muai_config.errors import ConfigError
from muai_config.loading import Resolution, resolve_file
from muai_config.render import render_example, render_json, render_reference, render_yaml

WRONG_CONFIGURATION = 2

_path_argument = click.argument("path", required=False, type=click.Path(path_type=Path))
_output_option = click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to this file instead of the terminal.",
)


@click.group()
def config() -> None:
    """Check, show and document the configuration."""


@config.command()
@_path_argument
def check(path: Path | None) -> None:
    """Check PATH, or the configuration in effect, and name everything that is wrong with it."""
    resolution = _resolved(path)
    click.echo(summary(resolution))


@config.command()
@_path_argument
@click.option("--source", "with_sources", is_flag=True, help="Say where each value came from.")
@click.option("--format", "form", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def show(path: Path | None, with_sources: bool, form: str) -> None:
    """Print the values in effect, passwords masked."""
    resolution = _resolved(path)
    render = render_json if form == "json" else render_yaml
    click.echo(render(resolution, with_sources=with_sources), nl=False)


@config.command()
@_output_option
def docs(output: Path | None) -> None:
    """Write the reference of all settings, in Markdown."""
    _write(render_reference(), output)


@config.command()
@_output_option
def example(output: Path | None) -> None:
    """Write a configuration file with every setting at its default and a comment on each."""
    _write(render_example(), output)


def summary(resolution: Resolution) -> str:
    """One line on a configuration that is right."""
    kinds = [source.kind for source in resolution.sources.values()]
    models = len(resolution.settings.models)
    counts = f"{kinds.count('file')} from the file, {kinds.count('variable')} from variables"
    line = f"{resolution.file or 'no file'}: valid ({len(kinds)} settings: {counts}; {_counted(models, 'model')})"
    return f"{line}; not ours, left alone: {', '.join(resolution.ignored)}" if resolution.ignored else line


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _resolved(path: Path | None) -> Resolution:
    try:
        return resolve_file(path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(WRONG_CONFIGURATION)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror or error}") from error
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    config()
