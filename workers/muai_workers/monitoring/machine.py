"""What a machine's processors, memory and GPUs are doing."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.recorder import Reading, Recorder
from muai_workers.gpus.nvml import nvml_library

log = logging.getLogger(__name__)


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU now. None: the device does not tell."""

    gpu_id: str
    """Its number on this machine."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    """From 0 to 1."""
    temperature_c: float | None = None
    power_w: float | None = None


class GpuSource(Protocol):
    """Reads the GPUs of this machine."""

    def read(self) -> Sequence[GpuReading]:
        """Every GPU that answers; one that does not is left out."""
        ...


class NvmlGpus:
    """NVIDIA's management library. Without it, or without a driver, there are no GPUs.

    Args:
        library: None: the one that is installed, or its simulation.
    """

    def __init__(self, library: Any = None) -> None:
        self._nvml: Any = None
        try:
            nvml = nvml_library() if library is None else library
        except ImportError:
            log.debug("nvidia-ml-py is not installed: no metrics of GPUs")
            return
        try:
            nvml.nvmlInit()
            self._nvml = nvml
        except nvml.NVMLError as error:
            log.debug("no metrics of GPUs: %s", error)

    def read(self) -> Sequence[GpuReading]:
        """See `GpuSource.read`."""
        if self._nvml is None:
            return ()
        found = []
        for number in range(self._nvml.nvmlDeviceGetCount()):
            # A GPU that has fallen off the bus must not keep the others from being seen.
            with guarded("metrics"):
                found.append(self._read_one(number))
        return found

    def _read_one(self, number: int) -> GpuReading:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuReading(
            gpu_id=str(number),
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            utilization=self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            temperature_c=self._told(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            power_w=self._told(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        )

    def _told(self, ask: Any) -> float | None:
        """What a device says; None where its kind has no such sensor, as parts of a GPU have none."""
        try:
            value: float = ask()
        except self._nvml.NVMLError_NotSupported:
            return None
        return value


class MachineWatch:
    """Samples this machine; several processes of a machine may, for the page shows the latest reading of each GPU."""

    def __init__(self, recorder: Recorder, gpus: GpuSource | None = None) -> None:
        self._gpus = gpus or NvmlGpus()
        self._host = socket.gethostname()
        self._psutil: Any = _psutil()
        self._recorder = recorder
        recorder.sample_from(self.sample)

    def close(self) -> None:
        """Sample no more."""
        self._recorder.drop_sampler(self.sample)

    def sample(self) -> Iterator[Reading]:
        """The readings now."""
        if self._psutil is not None:
            memory = self._psutil.virtual_memory()
            yield instruments.CPU_USAGE, (self._host,), self._psutil.cpu_percent(interval=None)
            yield instruments.MEMORY_USED, (self._host,), float(memory.total - memory.available)
            yield instruments.MEMORY_TOTAL, (self._host,), float(memory.total)
        for gpu in self._gpus.read():
            yield from gpu_readings(gpu, self._host)


def gpu_readings(gpu: GpuReading, host: str) -> Iterator[Reading]:
    """One GPU's readings as gauges."""
    values = (
        (instruments.GPU_MEMORY_USED, gpu.memory_used_bytes),
        (instruments.GPU_MEMORY_TOTAL, gpu.memory_total_bytes),
        (instruments.GPU_UTILIZATION, gpu.utilization),
        (instruments.GPU_TEMPERATURE, gpu.temperature_c),
        (instruments.GPU_POWER, gpu.power_w),
    )
    for instrument, value in values:
        if value is not None:
            yield instrument, (gpu.gpu_id, host), float(value)


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        log.debug("psutil is not installed: no metrics of processors and memory")
        return None
    psutil.cpu_percent(interval=None)  # the first call only begins the interval
    return psutil
