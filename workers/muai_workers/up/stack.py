"""A whole installation: its Redis where it needs one, its processes, and the supervisor over them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from muai_config.loading import resolve_file
from muai_producers.cli.running import RunningStack, forget_running, note_running
from muai_workers.up.console import OWN_NAME, SupervisorConsole
from muai_workers.up.decisions import Role
from muai_workers.up.embedded_redis import EmbeddedRedis
from muai_workers.up.observing import Observer
from muai_workers.up.plan import ProcessSpec, gpus_of, stack_specs
from muai_workers.up.supervisor import Supervisor

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_workers.gpus.watch import GpuWatch

BROKER, STATE = "MUAI_BROKER_URL", "MUAI_REDIS_URL"
HOST = ("monitoring", "server", "host")
PAGE_HOST = ("monitoring", "prometheus", "host")
LOOPBACK = "127.0.0.1"
"""Where an installation's gateway and metrics page listen unless the configuration says otherwise: they ask nobody who
they are."""
EVERYWHERE = ("0.0.0.0", "::")
# The same settings under the names that follow from their paths.
OTHER_NAMES = {BROKER: "MUAI_QUEUE_BROKER_URL", STATE: "MUAI_QUEUE_REDIS_URL"}


@dataclass(frozen=True)
class Wanted:
    """What `muai up` was asked for."""

    broker: str | None = None
    """None: what the configuration says, else an embedded Redis."""
    redis: str | None = None
    engines: Sequence[str] = ()
    collectors: int = 1
    gateway: bool = False
    flower: bool = False
    exporter: bool = False
    """Whether there is a metrics page, where the configuration has one."""
    log_level: str = "INFO"
    gpu_groups: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    """By engine, the GPUs of each of its workers; an engine that is not there has one worker, which sees them all."""


@dataclass(frozen=True)
class Addresses:
    """Where broker and state store are; None: an embedded Redis takes its place."""

    broker: str | None
    state: str | None
    """None: the same as the broker where that is a Redis."""

    @property
    def needs_redis(self) -> bool:
        """Whether one of the two is missing."""
        if self.broker is None:
            return True
        return self.state is None and not self.broker.startswith(("redis", "unix", "sentinel"))

    def variables(self, embedded_url: str | None) -> dict[str, str]:
        """The environment variables that say so to a process, every name of each setting."""
        broker = self.broker or embedded_url or ""
        state = self.state or embedded_url or ""
        values = {BROKER: broker, STATE: state}
        return values | {OTHER_NAMES[name]: "" for name in values}


def find_addresses(wanted: Wanted, env: Mapping[str, str]) -> Addresses:
    """Command line over environment over file; what nobody has said is None.

    Raises:
        ConfigError: the configuration is wrong.
    """
    resolution = resolve_file(None, env)
    queue = resolution.settings.queue
    is_said = {name: resolution.sources["queue", name].kind != "default" for name in ("broker_url", "redis_url")}
    broker = wanted.broker or (queue.broker_url if is_said["broker_url"] else None)
    return Addresses(broker, wanted.redis or (queue.redis_url if is_said["redis_url"] else None))


@contextmanager
def stack(wanted: Wanted, home: Path, console: SupervisorConsole) -> Iterator[tuple[Supervisor, Settings]]:
    """An installation that is ready to run, with the settings under which its processes run.

    Raises:
        ConfigError: the configuration, or an address on the command line, is wrong.
        BrokerError: the embedded Redis cannot be started.
    """
    with ExitStack() as held:
        addresses = find_addresses(wanted, os.environ)
        embedded = EmbeddedRedis(home / "redis") if addresses.needs_redis else None
        if embedded is not None:
            held.callback(embedded.release)
        variables = addresses.variables(None if embedded is None else embedded.url)
        resolution = resolve_file(None, {**os.environ, **variables})
        settings = resolution.settings
        suffix = "" if addresses.broker is None else f"-{socket.gethostname()}-{os.getpid()}"
        gateway_host = LOOPBACK if resolution.sources[HOST].kind == "default" else None
        specs = _redis_specs(embedded) + stack_specs(
            wanted.engines,
            variables,
            collectors=wanted.collectors,
            gateway=wanted.gateway,
            gateway_host=gateway_host,
            flower=wanted.flower,
            exporter=wanted.exporter and settings.monitoring.enabled and settings.monitoring.prometheus.enabled,
            exporter_host=LOOPBACK if resolution.sources[PAGE_HOST].kind == "default" else None,
            log_level=wanted.log_level,
            suffix=suffix,
            gpu_groups=wanted.gpu_groups,
        )
        watch = _gpu_watch(settings, specs, suffix)
        observer = Observer(settings)
        supervisor = Supervisor(
            specs,
            console,
            grace_s=float(settings.monitoring.server.graceful_shutdown_timeout),
            gate=(lambda: True) if embedded is None else embedded.is_ready,
            observe=lambda: observer.latest,
            drain=embedded is not None and addresses.broker is None,  # nobody else serves the requests that are there
            warden=watch,
        )
        if watch is not None:
            watch.start(supervisor.standings)
            held.callback(watch.stop)
        observer.start()
        held.callback(observer.stop)
        note_running(home, RunningStack(os.getpid(), variables))
        held.callback(forget_running, home, os.getpid())
        if embedded is not None:
            console.line(OWN_NAME, f"Redis of its own on port {embedded.port}, data in {embedded.folder}")
        if wanted.gateway:
            what = "console and API" if settings.gateway.console.enabled else "API"
            console.line(OWN_NAME, f"{what}: {gateway_url(settings, gateway_host)} (once the gateway has started)")
        yield supervisor, settings


def _gpu_watch(settings: Settings, specs: Sequence[ProcessSpec], suffix: str) -> GpuWatch | None:
    """The watch over the GPUs that workers are pinned to; None where none is, or nobody wants it."""
    from muai_workers.gpus.watch import GpuWatch

    groups = {spec.name: gpus_of(spec) for spec in specs if gpus_of(spec)}
    if not (groups and settings.monitoring.gpus.enabled):
        return None
    grace_s = float(settings.monitoring.server.graceful_shutdown_timeout)
    return GpuWatch(settings, groups, grace_s, suffix=suffix)


def gateway_url(settings: Settings, host: str | None) -> str:
    """Where people on this machine find the gateway.

    Args:
        host: where it listens; None: where the configuration says.
    """
    server = settings.monitoring.server
    host = server.host if host is None else host
    if host in EVERYWHERE:
        host = LOOPBACK
    scheme = "http" if settings.gateway.tls.certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}/"


def _redis_specs(embedded: EmbeddedRedis | None) -> list[ProcessSpec]:
    return [] if embedded is None else [ProcessSpec("redis", Role.REDIS, embedded.command)]
