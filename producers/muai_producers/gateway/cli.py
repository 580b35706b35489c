"""`muai gateway` and `muai advisor`."""

from __future__ import annotations

import os

import click

from muai_producers.cli.invocation import Invocation, pass_invocation


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
    """Serve the HTTP API. Callers need a key (`muai keys create`) unless only this machine reaches the address."""
    from muai_producers.gateway.server import is_loopback, serve

    settings = invocation.settings
    server = settings.monitoring.server
    host = server.host if host is None else host
    if not is_loopback(host) and not insecure_no_auth:
        # Through the environment, as the configuration goes: to every process that shares the port.
        os.environ["MUAI_GATEWAY_REQUIRE_KEYS"] = "true"
    serve(
        host,
        server.port if port is None else port,
        workers=workers,
        log_level=invocation.log_level,
        settings=settings,
    )


@click.command()
@click.option("--host", help="Address to listen on, instead of monitoring.server.host.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port to listen on, instead of gateway.advice.port; 0: any free."
)
@click.option(
    "--insecure-no-auth",
    is_flag=True,
    envvar="MUAI_INSECURE_NO_AUTH",
    help="Listen on an address that others can reach, though nobody is asked who they are.",
)
@pass_invocation
def advisor(invocation: Invocation, host: str | None, port: int | None, insecure_no_auth: bool) -> None:
    """Serve advice over HTTP, and nothing else. The gateway serves it too."""
    from muai_producers.gateway.server import ADVISOR, is_loopback, serve

    settings = invocation.settings
    host = settings.monitoring.server.host if host is None else host
    if not is_loopback(host) and not insecure_no_auth:
        os.environ["MUAI_GATEWAY_REQUIRE_KEYS"] = "true"
    serve(
        host,
        settings.gateway.advice.port if port is None else port,
        workers=1,
        log_level=invocation.log_level,
        settings=settings,
        served=ADVISOR,
    )
