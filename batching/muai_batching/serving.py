"""Running a Celery worker of ours: quiet where Celery is talkative, the same for every kind of worker."""

from __future__ import annotations

import gc
import logging
import socket
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker.consumer import Consumer
from celery.worker.consumer.heart import Heart
from celery.worker.heartbeat import Heart as HeartbeatEvents

from muai_producers.logs.setup import set_up_logging

if TYPE_CHECKING:
    from muai_config import Settings

CHATTY_LOGGERS = ("celery.worker.strategy", "celery.app.trace", "celery.beat")
"""Two lines for each batch and one for each scheduled task would drown what an operator looks for; they show in Flower
and with log level DEBUG."""

CYCLES_AFTER = 20_000
"""Objects made, and not freed, between two looks for cycles; Python's own default is 700."""


_StockBlueprint: Any = Consumer.Blueprint
_StockHeartbeat: Any = HeartbeatEvents


class HeartbeatOnce(_StockHeartbeat):  # type: ignore[misc]  # celery-types knows none of it
    """Celery's heartbeat events, each tried once.

    Celery's own are tried, on the worker's event loop, until they are sent. On AMQP kombu may lose its way in that: it
    connects anew again and again, each time to find that the exchange it declares is bound to the lost channel. The
    worker then takes no work, keeps its place in the fleet, and does not end when it is told to. An event that cannot
    be sent now is kept by the dispatcher, and the loop itself notices that the connection is gone.
    """

    def _send(self, event: str, retry: bool = False) -> Any:
        return super()._send(event, retry=False)


class HeartbeatOnceStep(Heart):
    """The consumer's step that sends them."""

    heartbeat_interval: float | None

    def start(self, c: Any) -> None:
        """Called by Celery once the event dispatcher is connected."""
        c.heart = HeartbeatOnce(c.timer, c.event_dispatcher, self.heartbeat_interval)
        c.heart.start()


def _step(stock: str) -> Any:
    return HeartbeatOnceStep if stock.endswith(":Heart") else stock


class QuietConsumer(Consumer):
    """A Celery consumer whose heartbeat cannot hold it up, and without native delayed delivery: nothing here is sent
    with a delay, and on RabbitMQ the step declares 28 queues and warns of each of ours.
    """

    hub: Any
    event_dispatcher: Any
    task_consumer: Any
    _flush_events: Any

    class Blueprint(_StockBlueprint):  # type: ignore[misc]  # celery-types has it as a variable
        """The stock steps but those two."""

        default_steps: ClassVar[list[Any]] = [
            _step(step) for step in _StockBlueprint.default_steps if "delayed_delivery" not in step
        ]


def _spare_what_stays(**_: Any) -> None:
    """Have Python look for cycles seldom, and not among what was there when work began: among ten thousands of waiting
    requests, none of which is in a cycle, it would look for a sixth of a collector's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(CYCLES_AFTER, 20, 20)


def serve(app: Celery, settings: Settings, *, name: str, queues: Sequence[str], pool: str, log_level: str) -> None:
    """Run a worker of `app` until it is told to stop. Blocks.

    Args:
        name: shown in Flower, with the host's name.
        pool: `solo` or `threads`; never `prefork`, which CUDA does not survive.
    """
    if log_level.upper() != "DEBUG":
        for chatty in CHATTY_LOGGERS:
            logging.getLogger(chatty).setLevel(logging.WARNING)
    signals.worker_ready.connect(_spare_what_stays, weak=False)
    # A receiver of this signal is what keeps Celery from setting up logs of its own.
    signals.setup_logging.connect(lambda **_: set_up_logging(settings, name, log_level), weak=False)
    # Celery warns of root because of pickle, which is refused here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    argv = ["--quiet", "worker", "--pool", pool, "--queues", ",".join(queues)]
    argv += ["--hostname", f"{name}@{socket.gethostname()}", "--loglevel", log_level]
    app.worker_main([*argv, "--without-gossip", "--without-mingle"])
