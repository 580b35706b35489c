"""`muai flower`, `muai engines` and `muai exporter`: looking at an installation."""

from __future__ import annotations

from pathlib import Path

import click

from muai_producers.cli.invocation import Invocation, pass_invocation


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on: monitoring.flower.port.")
@click.option("--address", help="Address to listen on: monitoring.flower.host.")
@pass_invocation
def flower(invocation: Invocation, port: int | None, address: str | None) -> None:
    """Run Flower on the broker: workers, queues and tasks in a browser."""
    settings = invocation.settings
    import flower as _flower  # noqa: F401 - says what to install where it is missing
    from celery import Celery

    from muai_config import celery_settings

    app = Celery("muai.flower", set_as_current=False)
    conf = celery_settings(settings, "producer")
    # Flower only watches, and its page of queues knows a broker by the name of kombu's own transport.
    conf.pop("broker_transport", None)
    options = conf["broker_transport_options"]
    conf["broker_transport_options"] = {name: options[name] for name in ("master_name",) if name in options}
    app.conf.update(conf)
    wanted = settings.monitoring.flower
    argv = ["flower", f"--port={port or wanted.port}", f"--address={address or wanted.host}"]
    if wanted.login_file is not None:
        argv.append(f"--basic-auth={_login(wanted.login_file)}")  # within this process: no command line shows it
    app.start([*argv, f"--logging={invocation.log_level.lower()}"])


def _login(file: Path) -> str:
    try:
        login = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise click.UsageError(f"monitoring.flower.login_file: {error}") from None
    user, colon, password = login.partition(":")
    if not (user and colon and password) or any(sign.isspace() or sign == "," for sign in login):
        raise click.UsageError(
            f"monitoring.flower.login_file: {file} must hold one line, user:password, without blanks and commas"
        )
    return login


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_invocation
def engines(invocation: Invocation, as_json: bool) -> None:
    """Say which engines can run here, and why the others cannot."""
    from muai_workers.engines.registry import availability_report

    report = availability_report(invocation.settings)
    if as_json:
        from muai_producers.cli.present import echo_json

        echo_json({name: {"available": one.available, "reason": one.reason} for name, one in report.items()})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "can run", "because")
    for name, one in report.items():
        table.add_row(name, "[green]yes[/green]" if one.available else "[red]no[/red]", one.reason)
    Console().print(table)


@click.command()
@click.option("--host", help="Address to listen on: monitoring.prometheus.host.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on: monitoring.prometheus.port.")
@click.option("--name", default="exporter", show_default=True, help="Its name in metrics and health.")
@pass_invocation
def exporter(invocation: Invocation, host: str | None, port: int | None, name: str) -> None:
    """Serve the whole installation's metrics for Prometheus: one page, to be scraped once."""
    settings = invocation.settings
    import logging

    from muai_workers.monitoring.exporter import run_exporter

    monitoring = settings.monitoring
    if not (monitoring.enabled and monitoring.prometheus.enabled):
        raise click.UsageError("metrics are switched off: monitoring.enabled, monitoring.prometheus.enabled")
    asked = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    prometheus = monitoring.prometheus.model_copy(update=asked)
    settings = settings.model_copy(update={"monitoring": monitoring.model_copy(update={"prometheus": prometheus})})
    logging.basicConfig(level=invocation.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run_exporter(settings, name)
