"""`muai gateway`."""

from __future__ import annotations

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

WHAT_TO_DO = (
    "the gateway asks nobody who they are, so whoever reaches {host} could use it: keep it on this machine "
    "(--host 127.0.0.1) behind a proxy that authenticates, or say --insecure-no-auth (MUAI_INSECURE_NO_AUTH=1) where "
    "the network is trusted"
)


@click.command()
@click.option("--host", help="Address to listen on, instead of monitoring.server.host.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on, instead of monitoring.server.port; 0: any free."
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that share the port."
)
@click.option(
    "--insecure-no-auth",
    is_flag=True,
    envvar="MUAI_INSECURE_NO_AUTH",
    help="Listen on an address that others can reach, though nobody is asked who they are.",
)
@pass_invocation
def gateway(invocation: Invocation, host: str | None, port: int | None, workers: int, insecure_no_auth: bool) -> None:
    """Serve the HTTP API."""
    from muai_producers.gateway.server import is_loopback, serve

    server = invocation.settings.monitoring.server
    host = server.host if host is None else host
    if not insecure_no_auth and not is_loopback(host):
        raise click.UsageError(WHAT_TO_DO.format(host=host))
    serve(host, server.port if port is None else port, workers=workers, log_level=invocation.log_level)
