"""Sampling the resources of every host: one process of each host, whichever comes first, samples for all.

The control worker's schedule asks for it with a broadcast that every Celery worker hears. The sample is taken by a
thread of its own, never by the loop that heard of it.
"""

from __future__ import annotations

import importlib
import logging
import queue
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.worker.control import control_command

from muai_producers.connections import state_client
from muai_producers.monitoring.guard import guarded
from muai_producers.performance.recorder import StatisticsRecorder
from muai_producers.performance.series import Host

if TYPE_CHECKING:
    from celery import Celery

    from muai_config import Settings

log = logging.getLogger(__name__)
SAMPLE_COMMAND = "muai_sample_host"
SAMPLE_EVERY_S = 10.0
_HELD_MS = int(SAMPLE_EVERY_S * 800)
_SAMPLER = "muai_host_sampler"
"""The attribute of a Celery application that holds its process's sampler."""


def _pynvml() -> Any:
    return importlib.import_module("pynvml")


class HostSampler:
    """Samples this host when asked to, unless another process of it just has.

    Args:
        nvml: gives NVIDIA's management library; raises ImportError where it is not installed.
    """

    def __init__(self, settings: Settings, recorder: StatisticsRecorder, nvml: Callable[[], Any] = _pynvml) -> None:
        self._nvml = nvml
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
        try:
            self._probe = ResourceProbe(self._nvml)
        except ModuleNotFoundError:
            log.info("this process samples no host: that needs pip install 'muai[worker]'")
        while self._asked.get():
            with guarded("statistics"):
                self._sample()

    def _sample(self) -> None:
        if self._probe is not None and self._client.set(self._lock, 1, nx=True, px=_HELD_MS):
            self._recorder.used(self._host.member, self._probe.read())


class ResourceProbe:
    """Reads how much of a host's resources is in use, in percent.

    Args:
        nvml: gives NVIDIA's management library; raises ImportError where it is not installed.
    Raises:
        ModuleNotFoundError: psutil is not installed.
    """

    def __init__(self, nvml: Callable[[], Any] = _pynvml) -> None:
        import psutil

        self._psutil = psutil
        self._nvml, self._gpus = _gpu_handles(nvml)
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


def _gpu_handles(library: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """The library and what it knows each GPU by; no GPUs where there is no library or no driver."""
    try:
        nvml = library()
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return nvml, []


def offer_sampling(
    app: Celery, settings: Settings, recorder: StatisticsRecorder, nvml: Callable[[], Any] = _pynvml
) -> None:
    """Have this application's worker sample its host when the broadcast comes. `nvml`: see `HostSampler`."""
    setattr(app, _SAMPLER, HostSampler(settings, recorder, nvml))


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
