"""The scheduled tasks that watch and tune: sampling hosts, making data coarser, finding and telling what is wrong."""

from __future__ import annotations

import importlib.util
import logging
import time
from typing import TYPE_CHECKING, Any

from celery import Celery, signals

from muai_producers.connections import state_client
from muai_producers.performance.recorder import recorder_for
from muai_producers.performance.sampling import SAMPLE_COMMAND, SAMPLE_EVERY_S, end_sampling, offer_sampling
from muai_producers.scheduled import TaskRuns
from muai_producers.store import Store
from muai_workers.control.scheduling import Deadline, Scheduled, Scheduler
from muai_workers.gpus.nvml import nvml_library

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.runtime_config.live import LiveSettings

log = logging.getLogger(__name__)
ROLL_UP_EVERY_S = 30.0
TUNE_EVERY_S = 5.0
"""A look at whether anything is to be done; decisions have an interval of their own."""
DELIVER_EVERY_S = 2.0
CLEAN_EVERY_S = 3600.0
LIMIT_S = 30.0
FORGOTTEN_RUNS_S = 7 * 86_400.0


def register_watching(app: Celery, live: LiveSettings) -> dict[str, Any]:
    """Give `app` the tasks; returns their part of beat's schedule. Connects when the tasks run."""
    settings = live.started_with
    store = Store(state_client(settings.queue.state_url), prefix=settings.queue.key_prefix)
    is_on = settings.monitoring.enabled
    if importlib.util.find_spec("ddsketch") is None:
        if is_on:
            log.warning("no performance data, no alerts, no tuning: that needs pip install 'muai[monitoring]'")
        return {}
    if settings.optimization.tuner.enabled and not (is_on and settings.monitoring.performance.enabled):
        log.warning("nothing is tuned: that needs monitoring.enabled and monitoring.performance.enabled")
    if is_on:
        _sample_here(app, settings)
    watch = Watch(app, settings, store)
    live.subscribe(watch.on_settings, settings)
    scheduler = Scheduler(store)
    tasks = watch.tasks()
    for task in tasks:
        scheduler.register(app, task)
    return {task.name.rpartition(".")[2].replace("_", "-"): task.entry for task in tasks}


def _sample_here(app: Celery, settings: Settings) -> None:
    """The control worker samples its own host too."""

    def start(**_: Any) -> None:
        recorder = recorder_for(settings)
        offer_sampling(app, settings, recorder, nvml_library)

        def stop(**_: Any) -> None:
            end_sampling(app)
            recorder.close()

        signals.worker_shutdown.connect(stop, weak=False)

    signals.worker_ready.connect(start, weak=False)


class Watch:
    """What the tasks do."""

    def __init__(self, app: Celery, settings: Settings, store: Store) -> None:
        from muai_producers.performance.monitor import PerformanceMonitor
        from muai_workers.monitoring.anomalies import AnomalyDetector
        from muai_workers.tuning.auto_tuner import AutoTuner

        self._app = app
        self._settings = settings.monitoring
        self._monitor = PerformanceMonitor(store, self._settings.performance.retention_s)
        self._detector = AnomalyDetector(settings, store, self._monitor)
        self._runs = TaskRuns(store)
        self._tuner = AutoTuner(settings, store, self._monitor)

    def tasks(self) -> list[Scheduled]:
        """Those that the configuration wants."""
        # Without figures it tunes nothing; what it once set is to be given back then too.
        tasks = [Scheduled("muai.control.tune", TUNE_EVERY_S, LIMIT_S, self.tune, "statistics")]
        if not self._settings.enabled:
            return tasks
        tasks += [Scheduled("muai.control.clean_up", CLEAN_EVERY_S, LIMIT_S, self.clean_up, "statistics")]
        if self._settings.performance.enabled:
            tasks += [
                Scheduled("muai.control.sample_hosts", SAMPLE_EVERY_S, LIMIT_S, self.sample_hosts, "statistics"),
                Scheduled("muai.control.roll_up", ROLL_UP_EVERY_S, LIMIT_S, self.roll_up, "statistics"),
            ]
        # In the schedule also where `monitoring.anomaly.enabled` is false: it may become true while this runs.
        every_s = self._settings.anomaly.check_every_s
        return [
            *tasks,
            Scheduled("muai.control.check_anomalies", every_s, LIMIT_S, self.check_anomalies, "alerts"),
            Scheduled("muai.control.deliver_alerts", DELIVER_EVERY_S, LIMIT_S, self.deliver_alerts, "alerts"),
        ]

    def on_settings(self, settings: Settings) -> None:
        """Work by these settings from now on, as far as they are reloadable."""
        self._settings = settings.monitoring
        self._detector.on_settings(settings)

    def sample_hosts(self, _: Deadline) -> None:
        """Ask every host for a sample of its resources."""
        self._app.control.broadcast(SAMPLE_COMMAND)

    def roll_up(self, _: Deadline) -> int:
        """Add finished stretches of performance data up into coarser ones."""
        return self._monitor.data.roll_up(time.time())

    def tune(self, _: Deadline) -> int:
        """Adjust settings to the load, where that is switched on."""
        return len(self._tuner.run())

    def check_anomalies(self, deadline: Deadline) -> int:
        """Look for what is wrong with the fleet, and tell of it."""
        return len(self._detector.check(deadline).began)

    def deliver_alerts(self, deadline: Deadline) -> int:
        """Send alerts that could not be sent at once."""
        return self._detector.deliverer.run(deadline)

    def clean_up(self, _: Deadline) -> int:
        """Forget series, alerts and tasks of which nothing is left."""
        now_s = time.time()
        gone = [run.task for run in self._runs.all() if now_s - run.ended_at > FORGOTTEN_RUNS_S + run.every_s]
        self._runs.forget(gone)
        return self._monitor.data.forget_dead(now_s) + self._detector.alerts.trim() + len(gone)
