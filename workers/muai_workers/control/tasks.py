"""The scheduled tasks of the control worker, and their schedule."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from muai_config.queues import CONTROL
from muai_producers.connections import state_client
from muai_producers.store import Store
from muai_workers.control.reaper import Reaper
from muai_workers.control.singleton import singleton
from muai_workers.control.workflow_tasks import register_workflows

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
REAP_EVERY_S = 5.0
REAP_LIMIT_S = 60.0
REAP_TASK = "muai.control.reap"


def register(app: Celery, settings: Settings) -> None:
    """Give `app` the scheduled tasks, and the steps of workflows."""
    register_workflows(app, settings)
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

    app.conf.beat_schedule = {
        "reap": {
            "task": REAP_TASK,
            "schedule": REAP_EVERY_S,
            # A run that nobody took before the next is due is not worth making up for.
            "options": {"queue": CONTROL, "expires": REAP_EVERY_S},
        }
    }
    # Every task repeats at an interval, so there is nothing to remember on disk between runs.
    app.conf.beat_scheduler = "celery.beat:Scheduler"
