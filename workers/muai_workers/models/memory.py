"""How much memory is in use where models are loaded: on this process's GPUs, or in main memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from muai_workers.gpus.nvml import nvml_library

log = logging.getLogger(__name__)


class MemoryMeter(Protocol):
    """Says how much is in use now, so that a difference says what something took."""

    def used_bytes(self) -> int | None:
        """None: nobody can tell."""
        ...


class ProcessMemory:
    """What this process and those that it started have to themselves, in main memory."""

    def used_bytes(self) -> int | None:
        """See `MemoryMeter.used_bytes`."""
        try:
            import psutil
        except ImportError:
            return None
        own = psutil.Process()
        total = 0
        for process in (own, *own.children(recursive=True)):
            try:
                # Pages of files that are mapped and not changed belong to nobody.
                total += process.memory_full_info().uss
            except psutil.Error:
                continue  # it has just ended, or is another user's
        return total


class GpuMemory:
    """What is in use on some GPUs, by whomever: a worker has its GPUs to itself."""

    def __init__(self, gpus: Sequence[str], library: Callable[[], Any] = nvml_library) -> None:
        self._gpus = tuple(gpus)
        self._nvml: Any = None
        try:
            nvml = library()
            nvml.nvmlInit()
            self._nvml = nvml
        except Exception as error:  # noqa: BLE001 - no library, no driver: whatever it is, nobody can tell then
            log.debug("memory of GPUs cannot be measured: %s", error)

    def used_bytes(self) -> int | None:
        """See `MemoryMeter.used_bytes`."""
        nvml = self._nvml
        if nvml is None:
            return None
        try:
            handles = [
                nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID(gpu)
                for gpu in self._gpus
            ]
            return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
        except nvml.NVMLError as error:
            log.debug("memory of GPUs cannot be measured: %s", error)
            return None


def memory_meter() -> MemoryMeter:
    """That of the GPUs which this process is pinned to; of main memory where it is pinned to none."""
    gpus = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return GpuMemory(gpus) if gpus and gpus != ["-1"] else ProcessMemory()
