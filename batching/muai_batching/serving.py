"""Running a Celery worker of ours: quiet where Celery is talkative, the same for every kind of worker."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from celery import Celery
from celery.exceptions import SecurityWarning
from celery.worker.consumer import Consumer

CHATTY_LOGGERS = ("celery.worker.strategy", "celery.app.trace", "celery.beat")
"""Two lines for each batch and one for each scheduled task would drown what an operator looks for; they show in Flower
and with log level DEBUG."""


_StockBlueprint: Any = Consumer.Blueprint


class QuietConsumer(Consumer):
    """A Celery consumer without native delayed delivery: nothing here is sent with a delay, and on RabbitMQ the step
    declares 28 queues and warns of each of ours.
    """

    hub: Any
    event_dispatcher: Any
    task_consumer: Any
    _flush_events: Any

    class Blueprint(_StockBlueprint):  # type: ignore[misc]  # celery-types has it as a variable
        """The stock steps but that one."""

        default_steps: ClassVar[list[str]] = [
            step for step in _StockBlueprint.default_steps if "delayed_delivery" not in step
        ]


def serve(app: Celery, *, name: str, queues: Sequence[str], pool: str, log_level: str) -> None:
    """Run a worker of `app` until it is told to stop. Blocks.

    Args:
        name: shown in Flower, with the host's name.
        pool: `solo` or `threads`; never `prefork`, which CUDA does not survive.
    """
    if log_level.upper() != "DEBUG":
        for chatty in CHATTY_LOGGERS:
            logging.getLogger(chatty).setLevel(logging.WARNING)
    # Celery warns of root because of pickle, which is refused here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    argv = ["--quiet", "worker", "--pool", pool, "--queues", ",".join(queues)]
    argv += ["--hostname", f"{name}@{socket.gethostname()}", "--loglevel", log_level]
    app.worker_main([*argv, "--without-gossip", "--without-mingle", "--task-events"])
