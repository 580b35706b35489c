"""The scheduled tasks of the control worker, and their schedule."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from muai_config.queues import CONTROL
from muai_producers.client import InferenceClient
from muai_producers.connections import state_client
from muai_producers.files.folder import FileFolder
from muai_producers.files.shelf import FileShelf
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.store import Store
from muai_workers.control.batches import BatchRunner
from muai_workers.control.reaper import Reaper
from muai_workers.control.rounds import Rounds
from muai_workers.control.singleton import singleton
from muai_workers.control.watching import register_watching
from muai_workers.control.webhooks import WebhookSender, send_webhooks
from muai_workers.control.workflow_tasks import register_workflows

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
REAP_EVERY_S = 5.0
REAP_LIMIT_S = 60.0
REAP_TASK = "muai.control.reap"
BATCHES_TASK = "muai.control.batches"
BATCHES_EVERY_S = 1.0
BATCHES_FOR_S = 10.0
WEBHOOKS_TASK = "muai.control.webhooks"
WEBHOOKS_EVERY_S = 1.0
WEBHOOKS_FOR_S = 10.0
SWEEP_TASK = "muai.control.sweep_files"
SWEEP_EVERY_S = 3600.0


def _every(task: str, seconds: float) -> dict[str, Any]:
    # A run that nobody took before the next is due is not worth making up for.
    return {"task": task, "schedule": seconds, "options": {"queue": CONTROL, "expires": seconds}}


def _register_batches(app: Celery, settings: Settings, live: LiveSettings) -> None:
    client = InferenceClient(settings, live=live)
    folder = FileFolder.from_settings(settings)
    runner = BatchRunner(
        settings, client.store, lambda requests, limits: client.submitter().submit(requests, limits), folder
    )
    live.subscribe(runner.on_settings, settings)
    prefix = settings.queue.key_prefix
    rounds = Rounds(client.store.client, f"{prefix}:lock:batch", runner.batches.open_ids, runner.step)

    @app.task(name=BATCHES_TASK, ignore_result=True)
    def batches() -> int:
        """Go on with the batches of requests from files."""
        try:
            return rounds.run(BATCHES_FOR_S)
        except (redis.RedisError, OperationalError) as error:
            log.warning("could not go on with batches: %s; the next run will", error)
            return 0

    @app.task(name=SWEEP_TASK, ignore_result=True)
    def sweep_files() -> int:
        """Delete files that have expired, and what crashes have left in their folder."""
        shelf = FileShelf(client.store, folder, settings.gateway.files)
        with singleton(client.store.client, f"{prefix}:lock:sweep", REAP_LIMIT_S) as is_ours:
            if not is_ours:
                return 0
            expired = shelf.expire()
            return expired + folder.sweep(lambda name: shelf.is_known(name) or runner.batches.is_open(name))


def _register_webhooks(app: Celery, settings: Settings, store: Store) -> None:
    sender = WebhookSender(settings, store)

    @app.task(name=WEBHOOKS_TASK, ignore_result=True)
    def webhooks() -> int:
        """Post word of requests that have ended to whoever asked for it."""
        return send_webhooks(sender, WEBHOOKS_FOR_S)


def register(app: Celery, live: LiveSettings) -> None:
    """Give `app` the scheduled tasks, and the steps of workflows.

    Args:
        live: what the tasks work by; what is reloadable of it changes while they run.
    """
    settings = live.started_with
    register_workflows(app, settings, live)
    store = Store(state_client(settings.queue.state_url), prefix=settings.queue.key_prefix)
    reaper = Reaper(app, settings, store)

    @app.task(name=REAP_TASK, ignore_result=True)
    def reap() -> dict[str, int] | None:
        """Repair what crashes have left behind."""
        try:
            with singleton(store.client, f"{settings.queue.key_prefix}:lock:reap", REAP_LIMIT_S) as is_ours:
                found = asdict(reaper.run()) if is_ours else {}
        except (redis.RedisError, OperationalError) as error:
            log.warning("could not look for leftovers: %s; the next run will", error)
            return None
        if any(found.values()):
            log.info("repaired %s", ", ".join(f"{count} {what}" for what, count in found.items() if count))
        return found

    _register_batches(app, settings, live)
    _register_webhooks(app, settings, store)
    app.conf.beat_schedule = {
        "reap": _every(REAP_TASK, REAP_EVERY_S),
        "batches": _every(BATCHES_TASK, BATCHES_EVERY_S),
        "webhooks": _every(WEBHOOKS_TASK, WEBHOOKS_EVERY_S),
        "sweep-files": _every(SWEEP_TASK, SWEEP_EVERY_S),
        **register_watching(app, live),
    }
    # Every task repeats at an interval, so there is nothing to remember on disk between runs.
    app.conf.beat_scheduler = "celery.beat:Scheduler"
