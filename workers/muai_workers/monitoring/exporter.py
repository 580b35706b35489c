"""`PrometheusExporter`, of one process or of a whole installation, and the process that serves the latter."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import Metric

from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import Standings, guarded, standings
from muai_producers.monitoring.outcomes import SUCCESS
from muai_producers.monitoring.pushing import start_pushing
from muai_producers.monitoring.recorder import Gathered, Recorder, Series
from muai_producers.monitoring.recorder import recorder as own_recorder
from muai_workers.monitoring.families import families
from muai_workers.monitoring.installation import Installation, Picture
from muai_workers.monitoring.machine import MachineWatch
from muai_workers.monitoring.page import MetricsPage
from muai_workers.monitoring.rates import Rates

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0
STALE_S = 15.0
"""A picture older than this is not shown: the installation could not be looked at meanwhile."""


class PrometheusExporter:
    """A page of metrics in Prometheus' text format.

    By itself it shows what its own process records: with the methods below, or with the recorder that it is given, such
    as `muai_producers.monitoring.recorder.recorder`, which `OptimizationManager` records to.

    Args:
        port: 0 takes any that is free.
        source: what is recorded here is shown; None: a recorder of the exporter's own. Nobody else may take from it.
        picture: what to show of a whole installation, in place of the recorder's.
    """

    def __init__(
        self,
        port: int = 9090,
        host: str = "0.0.0.0",
        path: str = "/metrics",
        *,
        source: Recorder | None = None,
        picture: Callable[[], Picture | None] | None = None,
        own_standings: Standings = standings,
    ) -> None:
        self._source = source or Recorder()
        self._picture = picture
        self._lock = threading.Lock()
        self._sums = Gathered()
        self._rates = Rates()
        self._page = MetricsPage(host, port, path, self.collect, own_standings)

    @property
    def port(self) -> int:
        """Where the page is, or will be."""
        return self._page.port

    @property
    def is_served(self) -> bool:
        """Whether the page can be asked for: not while something else has the port."""
        return self._page.is_served

    def record_inference_latency(self, model_name: str, engine: str, latency_ms: float) -> None:
        """An inference has completed. Counts it, as a success, besides observing how long it took."""
        self._source.count(instruments.REQUESTS, model_name, engine, SUCCESS)
        self._source.observe(instruments.LATENCY, model_name, engine, values=(latency_ms / 1000,))

    def record_throughput(self, model_name: str, requests_per_second: float) -> None:
        """The throughput as whoever calls has measured it. Unless it is called, it is that of the last 30 s."""
        self._source.set(instruments.THROUGHPUT, model_name, value=requests_per_second)

    def record_resource_usage(self, gpu_memory_mb: float, cpu_percent: float) -> None:
        """Memory of this process's GPU, in units of 1,048,576 bytes, and this machine's CPU use, from 0 to 100."""
        self._source.set(instruments.GPU_MEMORY_USED, "0", "", value=gpu_memory_mb * 1024 * 1024)
        self._source.set(instruments.CPU_USAGE, "", value=cpu_percent)

    def start_server(self) -> None:
        """Serve the page. Where the port is taken, that is logged, and tried again until it is free."""
        self._page.start()

    def stop_server(self) -> None:
        """Stop serving."""
        self._page.close()

    def collect(self) -> Iterable[Metric]:
        """What the page shows now."""
        if self._picture is not None:
            picture = self._picture()
            if picture is None:
                return families(Gathered(), {(instruments.STORE_UP.name, ()): 0.0})
            return families(picture.sums, picture.gauges)
        with self._lock:
            self._sums.add(self._source.take())
            sums = Gathered(
                dict(self._sums.counters), {key: list(cells) for key, cells in self._sums.histograms.items()}
            )
            follow = self._rates.add(time.monotonic(), sums.counters)
        gauges: dict[Series, float] = {**follow}
        for instrument, labels, value in self._source.readings():
            gauges[instrument.name, labels] = value
        return families(sums, gauges)


class InstallationWatch:
    """Looks at an installation every two seconds, so that scrapes, however many, cost it nothing more."""

    def __init__(self, installation: Installation, every_s: float = LOOK_EVERY_S) -> None:
        self._installation = installation
        self._every_s = every_s
        self._rates = Rates()
        self._latest: Picture | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="muai-installation", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join(timeout=5.0)
        self._installation.close()

    def picture(self) -> Picture | None:
        """The latest look; None when there is none, or none of late."""
        latest = self._latest
        return None if latest is None or time.time() - latest.taken_s > STALE_S else latest

    def _run(self) -> None:
        while True:
            with guarded("metrics"):
                picture = self._installation.look()
                picture.gauges.update(self._rates.add(time.monotonic(), picture.sums.counters))
                self._latest = picture
            if self._closed.wait(self._every_s):
                return


def run_exporter(settings: Settings, name: str = "exporter") -> None:
    """Serve the installation's page until told to stop. Blocks."""
    prometheus = settings.monitoring.prometheus
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    watch = InstallationWatch(Installation(settings))
    machine = MachineWatch(own_recorder)
    exporter = PrometheusExporter(prometheus.port, prometheus.host, prometheus.path, picture=watch.picture)
    pusher = start_pushing(settings, "exporter", name)
    try:
        watch.start()
        exporter.start_server()
        stop.wait()
    finally:
        exporter.stop_server()
        watch.close()
        machine.close()
        if pusher is not None:
            pusher.close()
