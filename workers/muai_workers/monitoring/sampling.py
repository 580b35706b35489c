"""Sampling the resources of every host: one process of each host, whichever comes first, samples for all.

The control worker's schedule asks for it with a broadcast that every Celery worker hears. The sample is taken by a
thread of its own, never by the loop that heard of it.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

from celery.worker.control import control_command

from muai_producers.connections import state_client
from muai_producers.monitoring.guard import guarded
from muai_producers.performance.recorder import StatisticsRecorder
from muai_producers.performance.series import Host
from muai_workers.gpus.nvml import nvml_library

if TYPE_CHECKING:
    from celery import Celery

    from muai_config import Settings

log = logging.getLogger(__name__)
SAMPLE_COMMAND = "muai_sample_host"
SAMPLE_EVERY_S = 10.0
_HELD_MS = int(SAMPLE_EVERY_S * 800)
_SAMPLER = "muai_host_sampler"
"""The attribute of a Celery application that holds its process's sampler."""


class HostSampler:
    """Samples this host when asked to, unless another process of it just has."""

    def __init__(self, settings: Settings, recorder: StatisticsRecorder) -> None:
        self._client: Any = state_client(settings.queue.state_url, timeout_s=1.0, retries=0)
        self._host = Host(socket.gethostname())
        self._lock = f"{settings.queue.key_prefix}:lock:sample:{self._host.name}"
        self._recorder = recorder
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._probe: Any = None
        self._thread = threading.Thread(target=self._run, name="muai-sample", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have a sample taken, soon. Returns at once."""
        self._asked.put(True)

    def close(self) -> None:
        """Stop sampling."""
        self._asked.put(False)
        self._thread.join(2.0)
        self._client.close()

    def _run(self) -> None:
        with guarded("statistics"):
            self._probe = ResourceProbe()
        while self._asked.get():
            with guarded("statistics"):
                self._sample()

    def _sample(self) -> None:
        if self._probe is not None and self._client.set(self._lock, 1, nx=True, px=_HELD_MS):
            self._recorder.used(self._host.member, self._probe.read())


class ResourceProbe:
    """Reads how much of a host's resources is in use, in percent.

    Raises:
        ModuleNotFoundError: psutil is not installed.
    """

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._nvml, self._gpus = _gpu_handles()
        psutil.cpu_percent(None)  # the first reading tells of nothing, the others of the time since the one before

    def read(self) -> dict[str, float]:
        """`cpu`, `memory`, and for each GPU `gpuN.memory` and `gpuN.utilization`."""
        used = {"cpu": self._psutil.cpu_percent(None), "memory": self._psutil.virtual_memory().percent}
        for number, handle in enumerate(self._gpus):
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                used[f"gpu{number}.memory"] = 100.0 * memory.used / memory.total
                used[f"gpu{number}.utilization"] = float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            except self._nvml.NVMLError as error:
                log.warning("GPU %d could not be sampled: %s", number, error)
        return used


def _gpu_handles() -> tuple[Any, list[Any]]:
    """The library and what it knows each GPU by; no GPUs where there is no library or no driver."""
    try:
        nvml = nvml_library()
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return nvml, []


def offer_sampling(app: Celery, settings: Settings, recorder: StatisticsRecorder) -> None:
    """Have this application's worker sample its host when the broadcast comes."""
    setattr(app, _SAMPLER, HostSampler(settings, recorder))


def end_sampling(app: Celery) -> None:
    """Stop what `offer_sampling` began."""
    sampler: HostSampler | None = getattr(app, _SAMPLER, None)
    if sampler is not None:
        delattr(app, _SAMPLER)
        sampler.close()


@control_command()
def muai_sample_host(state: Any) -> dict[str, str]:
    """Sample this host's resources for the performance data."""
    sampler: HostSampler | None = getattr(state.app, _SAMPLER, None)
    if sampler is not None:
        sampler.ask()
    return {"ok": "asked"}
