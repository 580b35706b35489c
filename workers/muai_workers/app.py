"""The Celery application of the engine workers and of the control worker, and how each is started."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from celery import Celery

from muai_config import celery_settings, load_settings
from muai_config.queues import CONTROL, WORKFLOW, engine_queue

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.engines import EngineName

WORKER_OPTIONS = ("--without-gossip", "--without-mingle", "--task-events")


def create_engine_app(settings: Settings, engine: EngineName, name: str) -> Celery:
    """The application of one engine's workers; the engine is made when the worker starts, not here.

    Args:
        name: the worker's name, as results show it.
    """
    from muai_workers.engine_worker import register

    app = Celery("muai.engine", set_as_current=False)
    app.conf.update(celery_settings(settings, "engine", engine))
    register(app, settings, engine, name)
    return app


def create_control_app(settings: Settings) -> Celery:
    """The application of the control worker and of beat."""
    from muai_workers.control.tasks import register

    app = Celery("muai.control", set_as_current=False)
    app.conf.update(celery_settings(settings, "control"))
    register(app, settings)
    return app


def run_engine_worker(
    settings: Settings, engine: EngineName, name: str | None = None, *, log_level: str = "INFO"
) -> None:
    """Run a worker of `engine` until it is told to stop. Blocks.

    Args:
        name: the worker's name in Flower and in results; made from the engine and process id where None.
    """
    name = name or f"{engine}-{os.getpid()}"
    if log_level.upper() == "INFO":
        # Two lines for each batch would drown what an operator looks for; batches show in Flower and in the metrics.
        for chatty in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    argv = ["worker", "--pool", "threads", "--queues", engine_queue(engine), "--hostname", f"{name}@{_host()}"]
    create_engine_app(settings, engine, name).worker_main([*argv, "--loglevel", log_level, *WORKER_OPTIONS])


def run_control(
    settings: Settings,
    name: str | None = None,
    *,
    beat: bool = True,
    log_level: str = "INFO",
) -> None:
    """Run a control worker, with beat inside it, until it is told to stop. Blocks.

    Args:
        beat: one control worker of a fleet runs beat; its tasks are locked, so a second one does no harm.
    """
    hostname = f"{name or f'control-{os.getpid()}'}@{_host()}"
    argv = ["worker", "--pool", "threads", "--queues", f"{CONTROL},{WORKFLOW}", "--hostname", hostname]
    argv += ["--loglevel", log_level, *WORKER_OPTIONS]
    if beat:
        argv.append("--beat")
    create_control_app(settings).worker_main(argv)


def _host() -> str:
    return socket.gethostname()


def __getattr__(name: str) -> Any:
    """`app`, for `celery -A muai_workers.app inspect …`: built when asked for, from the environment's configuration."""
    if name == "app":
        return create_control_app(load_settings())
    raise AttributeError(name)
