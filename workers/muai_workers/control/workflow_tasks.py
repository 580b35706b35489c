"""The steps of workflows as tasks of the control worker."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec
import redis
from celery import Celery
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from muai_producers.client import InferenceClient
from muai_producers.errors import BrokerError
from muai_producers.workflows.runs import STEP_TASK, Run, WorkflowRuns

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.runtime_config.live import LiveSettings

log = logging.getLogger(__name__)
AGAIN_AFTER_S = 0.5


def register_workflows(app: Celery, settings: Settings, live: LiveSettings) -> None:
    """Give `app` the task that runs one step; Celery's chain sends the next."""
    runs = WorkflowRuns(settings, InferenceClient(settings, live=live), app)

    @app.task(name=STEP_TASK, ignore_result=True, acks_late=True)
    def step(state: dict[str, Any], *, run: dict[str, Any], step: str) -> dict[str, Any]:
        """Run one step of a workflow; what it returns is the next step's state."""
        try:
            known = runs.take_step(msgspec.convert(run, Run), step, state)
        except (redis.RedisError, OperationalError, BrokerError) as error:
            log.warning("step %s of run %s waits: %s", step, run.get("id"), error)
            time.sleep(AGAIN_AFTER_S)
            raise Reject(str(error), requeue=True) from error
        if known is None:
            raise Ignore  # the run is over, whatever of the chain is left
        return known
