"""Health and readiness: what the gateway knows of the installation, and the verdicts, which are pure."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec
import redis
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from muai_config import celery_settings
from muai_config.engines import ALL_ENGINES
from muai_producers.alerts.records import Alert
from muai_producers.alerts.store import AlertStore
from muai_producers.connections import state_client
from muai_producers.fleet import Fleet, FleetView
from muai_producers.monitoring.guard import guarded, standings
from muai_producers.monitoring.shared import SharedMetrics, degraded_parts
from muai_producers.runtime_config.versions import Applied, ConfigVersions
from muai_producers.scheduled import TaskRuns, overdue
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
KEPT_S = 0.5
"""How long a look at the installation serves: probes may come from many sides at once."""
PROBE_TIMEOUT_S = 3.0
NEARLY_FULL = 0.9
MAX_ALERTS_NAMED = 10
MAX_GPUS_NAMED = 16
MAX_REFUSALS_NAMED = 10


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the installation does, seen from this gateway."""

    status: Literal["healthy", "degraded", "unhealthy"]
    """degraded: requests are accepted, and may wait; unhealthy: they are refused."""
    uptime_seconds: float
    """Of this gateway."""
    models_loaded: list[str]
    engines_available: list[str]
    queue_size: int | None
    """Requests accepted and not yet answered; null when the state store does not answer."""
    queue_capacity: int
    reasons: list[str]
    """Why the status is not healthy."""


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this gateway should be sent requests."""

    ready: bool
    checks: dict[str, bool]
    """`serving`, `state_store`, `broker`, `collector`, and `model:NAME` for each preloaded model."""
    reasons: list[str]
    """Why it is not ready."""


@dataclass(frozen=True)
class Picture:
    """The installation at one moment."""

    state_error: str | None
    broker_error: str | None
    fleet: FleetView
    in_flight: int | None
    monitoring: Mapping[str, str] = field(default_factory=dict)
    """Parts of monitoring that do not work somewhere, and why."""
    overdue: tuple[str, ...] = ()
    """A sentence for each scheduled task that should have run."""
    alerts: tuple[Alert, ...] = ()
    """Those that last."""
    refusals: tuple[Applied, ...] = ()
    """Processes that could not apply a version of the runtime configuration, and keep what they had."""


def health(picture: Picture, settings: Settings, *, uptime_s: float, draining: bool) -> Health:
    """The verdict for operators and dashboards."""
    fleet = picture.fleet
    fatal = _unreachable(picture)
    warnings = [] if fatal else [*_missing(fleet, settings), *_strained(picture, settings), *_gpu_troubles(fleet)]
    warnings += [] if fatal else [*_refused(picture), *_watched(picture)]
    warnings += [f"{part} do not work: {reason}" for part, reason in sorted(picture.monitoring.items())]
    if draining:
        warnings.append("this gateway is stopping")
    return Health(
        status="unhealthy" if fatal else "degraded" if warnings else "healthy",
        uptime_seconds=round(uptime_s, 3),
        models_loaded=sorted({model for worker in fleet.workers for model in worker.models_loaded}),
        engines_available=[engine for engine in ALL_ENGINES if fleet.slots(engine)],
        queue_size=picture.in_flight,
        queue_capacity=settings.monitoring.server.queue_capacity,
        reasons=fatal + warnings,
    )


def readiness(picture: Picture, settings: Settings, *, draining: bool) -> Readiness:
    """The verdict for load balancers."""
    fleet = picture.fleet
    checks = {
        "serving": not draining,
        "state_store": picture.state_error is None,
        "broker": picture.broker_error is None,
        "collector": bool(fleet.collectors),
    }
    reasons = ["this gateway is stopping"] if draining else []
    reasons += _unreachable(picture)
    if not picture.state_error:
        reasons += [] if fleet.collectors else ["no collector is running"]
    for model in settings.monitoring.server.preload_models:
        checks[f"model:{model}"] = has_worker(fleet, settings, model)
        if not checks[f"model:{model}"] and not picture.state_error:
            reasons.append(f"no worker of an engine that serves {model} is running")
    return Readiness(ready=all(checks.values()), checks=checks, reasons=reasons)


def has_worker(fleet: FleetView, settings: Settings, model: str) -> bool:
    """Whether a live worker's engine is in the model's chain."""
    return any(fleet.slots(engine) for engine in settings.chain(settings.model(model)))


def _unreachable(picture: Picture) -> list[str]:
    told = (("state store", picture.state_error), ("broker", picture.broker_error))
    return [f"the {what} does not answer: {error}" for what, error in told if error is not None]


def _missing(fleet: FleetView, settings: Settings) -> list[str]:
    reasons = [] if fleet.collectors else ["no collector is running"]
    unserved = [name for name in settings.models if not has_worker(fleet, settings, name)]
    if unserved:
        reasons.append(f"no engine worker serves {', '.join(sorted(unserved)[:10])}")
    loaded = {model for worker in fleet.workers for model in worker.models_loaded}
    absent = set(settings.monitoring.server.preload_models) - loaded - set(unserved)
    reasons += [f"no worker has {model} loaded, though it is to be preloaded" for model in sorted(absent)]
    return reasons


def _strained(picture: Picture, settings: Settings) -> list[str]:
    reasons = [
        f"{engine} failed with {model} a short while ago and is passed over"
        for engine, model in sorted(picture.fleet.cooling)
    ]
    capacity = settings.monitoring.server.queue_capacity
    if picture.in_flight is not None and picture.in_flight >= NEARLY_FULL * capacity:
        reasons.append(f"nearly full: {picture.in_flight} of {capacity} requests are in flight")
    return reasons


def _refused(picture: Picture) -> list[str]:
    reasons = [
        f"{one.process} keeps version {one.version} of the runtime configuration, for it cannot apply version "
        f"{one.wanted}: {one.error}"
        for one in picture.refusals
    ]
    more = [f"and {len(reasons) - MAX_REFUSALS_NAMED} processes more"] if len(reasons) > MAX_REFUSALS_NAMED else []
    return [*reasons[:MAX_REFUSALS_NAMED], *more]


def _watched(picture: Picture) -> list[str]:
    alerts = [f"alert {alert.alert_type}: {alert.message}" for alert in picture.alerts]
    more = [f"and {len(alerts) - MAX_ALERTS_NAMED} alerts more"] if len(alerts) > MAX_ALERTS_NAMED else []
    return [*picture.overdue, *alerts[:MAX_ALERTS_NAMED], *more]


def _gpu_troubles(fleet: FleetView) -> list[str]:
    return [f"GPU {gpu.index} of {gpu.host} is {gpu.state}: {gpu.reason}" for gpu in fleet.gpus if gpu.state != "ok"][
        :MAX_GPUS_NAMED
    ]


class Observer:
    """Looks at the installation, on connections of its own that give up soon."""

    def __init__(self, settings: Settings, executor: Executor) -> None:
        self._client = state_client(settings.queue.state_url, timeout_s=2.0)
        self._store = Store(self._client, prefix=settings.queue.key_prefix)
        self._fleet = Fleet(self._store)
        self._runs, self._alerts = TaskRuns(self._store), AlertStore(self._store)
        self._metrics = SharedMetrics(self._store)
        self._versions = ConfigVersions(self._store)
        self._executor = executor
        self._broker = None if settings.queue.broker_url == settings.queue.state_url else _broker_probe(settings)
        self._looking: asyncio.Future[Picture] | None = None
        self._looked_s = 0.0

    async def picture(self) -> Picture:
        """The installation now, or as it was a moment ago."""
        if self._looking is None or (self._looking.done() and time.monotonic() - self._looked_s > KEPT_S):
            self._looking = asyncio.get_running_loop().run_in_executor(self._executor, self.look)
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), PROBE_TIMEOUT_S)
        except TimeoutError:
            return Picture(f"no answer within {PROBE_TIMEOUT_S:g} s", None, FleetView(), None)

    def look(self) -> Picture:
        """Ask the state store and the broker."""
        fleet, in_flight, state_error = FleetView(), None, None
        refusals: tuple[Applied, ...] = ()
        try:
            fleet, in_flight = self._fleet.view(ALL_ENGINES), self._store.in_flight()
            refusals = tuple(one for one in self._versions.applied() if one.error)
        except redis.RedisError as error:
            log.warning("the state store does not answer: %s", error)
            state_error = type(error).__name__
        told, alerts = self._watched() if state_error is None else ((), ())
        broker_error = state_error if self._broker is None else self._broker()
        self._looked_s = time.monotonic()
        monitoring = dict(standings.degraded())
        if state_error is None:
            with guarded("metrics"):
                monitoring |= degraded_parts(self._metrics.processes())
        return Picture(state_error, broker_error, fleet, in_flight, monitoring, told, alerts, refusals)

    def _watched(self) -> tuple[tuple[str, ...], tuple[Alert, ...]]:
        """What control workers tell: tasks that are overdue, alerts that last."""
        with guarded("alerts"):
            return tuple(overdue(self._runs.all(), time.time())), tuple(self._alerts.open())
        return (), ()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _broker_probe(settings: Settings) -> Callable[[], str | None]:
    """A function that connects to the broker, and says what went wrong, None when nothing did."""
    if settings.queue.broker_is_redis:
        return lambda: _ping_redis(settings.queue.broker_url)
    conf = celery_settings(settings, "producer")

    def connect() -> str | None:
        connection = Connection(conf["broker_url"], ssl=conf.get("broker_use_ssl") or False, connect_timeout=2)
        try:
            connection.connect()
        except (OSError, OperationalError, AMQPError) as error:
            log.warning("the broker does not answer: %s", error)
            return type(error).__name__
        finally:
            connection.release()
        return None

    return connect


def _ping_redis(url: str) -> str | None:
    client = state_client(url, timeout_s=2.0)
    try:
        client.ping()
    except redis.RedisError as error:
        log.warning("the broker does not answer: %s", error)
        return type(error).__name__
    finally:
        client.close()
    return None
