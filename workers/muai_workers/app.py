"""The Celery application of the engine workers and of the control worker, and how each is started."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from celery.beat import EmbeddedService

from muai_batching.serving import QuietConsumer, serve
from muai_config import celery_settings, load_settings
from muai_config.queues import CONTROL, WORKFLOW, engine_queue
from muai_producers.monitoring.pushing import start_pushing
from muai_producers.monitoring.recorder import recorder

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.engines import EngineName
    from muai_producers.runtime_config.live import LiveSettings


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


def create_control_app(settings: Settings, name: str = "control") -> Celery:
    """The application of the control worker and of beat.

    Args:
        name: the worker's name, as `muai config status` shows it.
    """
    from muai_producers.runtime_config.live import LiveSettings
    from muai_workers.control.tasks import register

    app = Celery("muai.control", set_as_current=False)
    app.conf.update(celery_settings(settings, "control"))
    app.conf.worker_consumer = QuietConsumer
    live = LiveSettings(settings, f"{name}@{socket.gethostname()} (control)")
    register(app, live)
    signals.worker_init.connect(lambda **_: _follow(live), weak=False)
    return app


def _follow(live: LiveSettings) -> None:
    """Follow the runtime configuration for as long as this process is a worker."""
    from muai_producers.runtime_config.following import ConfigFollower

    follower = ConfigFollower(live)
    follower.start()
    # Once it is ready: Celery sets signal handlers of its own before.
    signals.worker_ready.connect(lambda **_: follower.take_sighup(), weak=False)
    signals.worker_shutdown.connect(lambda **_: follower.close(), weak=False)


def run_engine_worker(
    settings: Settings, engine: EngineName, name: str | None = None, *, log_level: str = "INFO"
) -> None:
    """Run a worker of `engine` until it is told to stop. Blocks.

    Args:
        name: the worker's name in Flower and in results; made from the engine and process id where None.
    """
    name = name or f"{engine}-{os.getpid()}"
    app = create_engine_app(settings, engine, name)
    serve(app, name=name, queues=[engine_queue(engine)], pool="threads", log_level=log_level)


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
    from muai_workers.monitoring.machine import MachineWatch

    name = name or f"control-{os.getpid()}"
    app = create_control_app(settings, name)
    if beat:
        _embed_beat(app)
    watch, pusher = MachineWatch(recorder), start_pushing(settings, "control", name)
    try:
        serve(app, name=name, queues=[CONTROL, WORKFLOW], pool="threads", log_level=log_level)
    finally:
        watch.close()
        if pusher is not None:
            pusher.close()


def _embed_beat(app: Celery) -> None:
    """Run beat in a thread of the worker's process.

    What Celery's own --beat starts is a child process, and a worker that is killed leaves it behind, scheduling for
    ever.
    """

    def start(**_: Any) -> None:
        beat: Any = EmbeddedService(app, thread=True)
        beat.start()
        signals.worker_shutdown.connect(lambda **_: beat.stop(), weak=False)

    signals.worker_ready.connect(start, weak=False)


def __getattr__(name: str) -> Any:
    """`app`, for `celery -A muai_workers.app inspect …`: built when asked for, from the environment's configuration."""
    if name == "app":
        return create_control_app(load_settings())
    raise AttributeError(name)
