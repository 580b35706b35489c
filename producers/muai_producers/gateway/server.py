"""Serving the gateway with uvicorn: one process or several behind one port."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import ssl
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from muai_producers.cli.invocation import Invocation
from muai_producers.gateway.advisor import create_advisor
from muai_producers.gateway.app import create_gateway
from muai_producers.gateway.parting import PartingServer
from muai_producers.logs.setup import set_up_logging

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.gateway import ProxySettings, TlsSettings

SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may keep a thread waiting that has heard from Redis: Python's own 5 ms would be met several
times per round trip on a busy gateway."""
KEEP_ALIVE_S = 65
"""Longer than load balancers keep idle connections (60 s as a rule), so that they are the ones to close them."""
AFTER_DRAIN_S = 2
NOT_STARTED = 3
"""The exit status, uvicorn's own."""


@dataclass(frozen=True)
class Served:
    """What a process serves: its name in logs, and what makes its application."""

    name: str
    application: str


GATEWAY = Served("gateway", "muai_producers.gateway.server:application")
ADVISOR = Served("advisor", "muai_producers.gateway.server:advisor_application")


def application() -> FastAPI:
    """The gateway of a process that serves nothing else, under the configuration of its environment."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return create_gateway(_set_up(GATEWAY))


def advisor_application() -> FastAPI:
    """The advisor, likewise."""
    return create_advisor(_set_up(ADVISOR))


def _set_up(served: Served) -> Settings:
    invocation = Invocation()
    level = invocation.env.get("MUAI_LOG_LEVEL", "INFO")
    set_up_logging(invocation.settings, f"{served.name}-{os.getpid()}", level)
    return invocation.settings


def serve(host: str, port: int, *, workers: int, log_level: str, settings: Settings, served: Served = GATEWAY) -> None:
    """Serve until told to stop. Blocks."""
    gateway = settings.gateway
    set_up_logging(settings, f"{served.name}-{os.getpid()}", log_level)
    # uvicorn raises the signal that ended it once more when it is done; the end was orderly, so the status is 0.
    previous = {signum: signal.signal(signum, _ignore) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        options: dict[str, Any] = {
            "factory": True,
            "host": host,
            "port": port,
            "workers": workers,
            "log_level": log_level.lower(),
            "log_config": None,
            "access_log": log_level.upper() == "DEBUG",
            "server_header": False,
            **_proxy(gateway.proxy),
            **_tls(gateway.tls),
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": AFTER_DRAIN_S,
        }
        if workers > 1:
            uvicorn.run(served.application, **options)
        else:
            _serve_alone(uvicorn.Config(served.application, **options))
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _serve_alone(config: uvicorn.Config) -> None:
    server = PartingServer(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(NOT_STARTED)


def _proxy(proxy: ProxySettings) -> dict[str, Any]:
    if not proxy.trust_headers:
        return {"proxy_headers": False}
    return {"proxy_headers": True, "forwarded_allow_ips": list(proxy.trusted_addresses)}


def _tls(tls: TlsSettings) -> dict[str, Any]:
    if tls.certificate is None or tls.private_key is None:
        return {}
    options: dict[str, Any] = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.private_key)}
    if tls.client_ca is not None:
        options |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def _ignore(*_: Any) -> None:
    pass


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
