"""An NVML without GPUs, for tests: it has the functions of `pynvml` that are called here, and reads a JSON file.

The file is read at every call, so that what it says may change while processes run: written whole under another name
and moved into place, it is never seen half written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

FILE_VARIABLE = "MUAI_TEST_NVML"
"""Names the file: a `SimulatedState` as JSON."""


class SimulatedGpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU. None: the device does not tell."""

    uuid: str
    name: str = "Simulated GPU"
    memory_used_bytes: int = 0
    memory_total_bytes: int = 80_000_000_000
    utilization_percent: int | None = 0
    temperature_c: int | None = 40
    slowdown_c: int | None = 89
    shutdown_c: int | None = 94
    power_w: float | None = 100.0
    power_limit_w: float | None = 700.0
    ecc_uncorrected: int | None = 0
    rows_pending: bool = False
    rows_failed: bool = False
    recovery_action: int | None = 0
    lost: bool = False
    """It has fallen off the bus: every call on it fails."""
    xids: tuple[int, ...] = ()
    """All that the driver has reported of it, oldest first."""


class SimulatedState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine's GPUs, in the order of their numbers."""

    gpus: tuple[SimulatedGpu, ...]
    driver_loaded: bool = True


class SimulatedNvmlError(Exception):
    """As `pynvml.NVMLError`."""


class NotSupportedError(SimulatedNvmlError):
    """The device has no such sensor."""


class NotFoundError(SimulatedNvmlError):
    """There is no such GPU."""


class GpuIsLostError(SimulatedNvmlError):
    """The GPU has fallen off the bus."""


class NoEventError(SimulatedNvmlError):
    """No event came in time."""


class DriverNotLoadedError(SimulatedNvmlError):
    """There is no driver."""


class SimulatedNvml:
    """See the module.

    Args:
        read: gives the state as JSON.
    """

    NVMLError = SimulatedNvmlError
    NVMLError_NotSupported = NotSupportedError
    NVMLError_NotFound = NotFoundError
    NVMLError_GpuIsLost = GpuIsLostError
    NVMLError_Timeout = NoEventError
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SHUTDOWN = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    nvmlEventTypeXidCriticalError = 8  # noqa: N815

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> SimulatedNvml:
        """Read the file at each call."""
        return cls(Path(path).read_bytes)

    def _state(self) -> SimulatedState:
        state = msgspec.json.decode(self._read(), type=SimulatedState)
        if not state.driver_loaded:
            raise DriverNotLoadedError("Driver Not Loaded")
        return state

    def _gpu(self, uuid: str) -> SimulatedGpu:
        gpu = self._named(uuid)
        if gpu.lost:
            raise GpuIsLostError("GPU is lost")
        return gpu

    def _named(self, uuid: str) -> SimulatedGpu:
        for gpu in self._state().gpus:
            if gpu.uuid == uuid:
                return gpu
        raise NotFoundError("Not Found")

    # -- as in pynvml; a handle is the GPU's UUID -----------------------------------------------------------------

    def nvmlInit(self) -> None:  # noqa: N802
        self._state()

    def nvmlShutdown(self) -> None:  # noqa: N802
        """Nothing is held."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._state().gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        gpus = self._state().gpus
        if not 0 <= index < len(gpus):
            raise NotFoundError("Not Found")
        return gpus[index].uuid

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return self._named(uuid).uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return self._named(handle).uuid

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return self._gpu(handle).name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        gpu = self._gpu(handle)
        return SimpleNamespace(used=gpu.memory_used_bytes, total=gpu.memory_total_bytes)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=_given(self._gpu(handle).utilization_percent))

    def nvmlDeviceGetTemperature(self, handle: str, _sensor: int) -> int:  # noqa: N802
        return int(_given(self._gpu(handle).temperature_c))

    def nvmlDeviceGetTemperatureThreshold(self, handle: str, threshold: int) -> int:  # noqa: N802
        gpu = self._gpu(handle)
        return int(_given(gpu.shutdown_c if threshold == self.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN else gpu.slowdown_c))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return int(_given(self._gpu(handle).power_w) * 1000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        return int(_given(self._gpu(handle).power_limit_w) * 1000)

    def nvmlDeviceGetTotalEccErrors(self, handle: str, _kind: int, _counter: int) -> int:  # noqa: N802
        return int(_given(self._gpu(handle).ecc_uncorrected))

    def nvmlDeviceGetRemappedRows(self, handle: str) -> tuple[int, int, int, int]:  # noqa: N802
        gpu = self._gpu(handle)
        return 0, 0, int(gpu.rows_pending), int(gpu.rows_failed)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:  # noqa: N802
        action = self._gpu(handle).recovery_action
        value = SimpleNamespace(uiVal=action or 0)
        return [SimpleNamespace(nvmlReturn=0 if action is not None else 3, value=value) for _ in fields]

    def nvmlEventSetCreate(self) -> dict[str, int]:  # noqa: N802
        return {}

    def nvmlEventSetFree(self, event_set: dict[str, int]) -> None:  # noqa: N802
        event_set.clear()

    def nvmlDeviceRegisterEvents(self, handle: str, _types: int, event_set: dict[str, int]) -> None:  # noqa: N802
        event_set[handle] = len(self._named(handle).xids)

    def nvmlEventSetWait_v2(self, event_set: dict[str, int], _timeout_ms: int) -> Any:  # noqa: N802
        """Give the next event at once, or none: waiting would be waiting for a file to change."""
        for gpu in self._state().gpus:
            told = event_set.get(gpu.uuid)
            if told is not None and told < len(gpu.xids):
                event_set[gpu.uuid] = told + 1
                xid = gpu.xids[told]
                return SimpleNamespace(device=gpu.uuid, eventType=self.nvmlEventTypeXidCriticalError, eventData=xid)
        raise NoEventError("Timeout")


def _given(value: float | None) -> float:
    if value is None:
        raise NotSupportedError("Not Supported")
    return value
