"""What NVIDIA's management library tells of this machine's GPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from muai_workers.gpus.simulated import FILE_VARIABLE, SimulatedNvml

log = logging.getLogger(__name__)
MOST_EVENTS = 1000
"""Of one GPU at one look."""
Value = TypeVar("Value")


def nvml_library() -> Any:
    """The library, or its simulation where `MUAI_TEST_NVML` names a file; not yet initialised.

    Raises:
        ImportError: nvidia-ml-py is not installed.
    """
    simulated = os.environ.get(FILE_VARIABLE)
    if simulated:
        return SimulatedNvml.of_file(simulated)
    import pynvml

    return pynvml


def count_gpus() -> int:
    """How many GPUs this machine has; 0 as well where no driver or no library tells."""
    try:
        nvml = nvml_library()
    except ImportError:
        return 0
    try:
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError:
        return 0


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """One GPU at one moment. None: the device does not tell."""

    gpu: str
    """As `--gpus` names it."""
    uuid: str = ""
    name: str = ""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    slowdown_c: float | None = None
    """From this temperature on it is slowed down."""
    shutdown_c: float | None = None
    """At this temperature it switches itself off."""
    power_w: float | None = None
    power_limit_w: float | None = None
    ecc_uncorrected: int | None = None
    """Memory errors that could not be corrected, since the driver was loaded or the GPU was reset."""
    rows_pending: bool = False
    """A broken row of its memory is to be replaced at the next reset."""
    rows_failed: bool = False
    """A broken row of its memory could not be replaced."""
    recovery_action: int = 0
    """What the driver wants done, as `nvmlDeviceGpuRecoveryAction_t`; 0: nothing."""
    xids: tuple[int, ...] = field(default=())
    """Errors that the driver reported since the look before."""
    lost: str = ""
    """Why the device does not answer; '' when it does."""


class NoDriverError(Exception):
    """NVML tells nothing of any GPU, for the reason in the message."""


class GpuReader:
    """Reads some GPUs again and again. Not thread-safe.

    Args:
        gpus: as `--gpus` names them: numbers in the order of PCI addresses, or ids.
        library: gives the library; asked again after the driver went away.
    """

    def __init__(self, gpus: Sequence[str], library: Callable[[], Any] = nvml_library) -> None:
        self._gpus = tuple(gpus)
        self._library = library
        self._nvml: Any = None
        self._events: dict[str, Any] = {}
        """A set for each GPU, where it can be heard: one that is lost spoils the set that it is in."""
        self._deaf: set[str] = set()
        """GPUs of which it was said that they cannot be heard."""
        self._known: dict[str, tuple[str, str]] = {}
        """UUID and name of each, which a GPU that is lost no longer tells."""

    def read(self) -> list[Vitals]:
        """All of them now, in their order.

        Raises:
            NoDriverError: the library is not installed, or there is no driver at the moment.
        """
        if self._nvml is None:
            self._open()
        nvml = self._nvml
        try:
            nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            self.close()
            raise NoDriverError(f"the NVIDIA driver does not answer: {error}") from error
        return [self._read_one(gpu) for gpu in self._gpus]

    def close(self) -> None:
        """Let go of the library."""
        nvml = self._nvml
        if nvml is None:
            return
        for gpu in list(self._events):
            self._stop_listening(gpu)
        self._nvml = None
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            log.debug("closing NVML: %s", error)

    def _open(self) -> None:
        try:
            nvml = self._library()
        except ImportError as error:
            raise NoDriverError("nvidia-ml-py is not installed (pip install 'muai[worker]')") from error
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NoDriverError(f"there is no NVIDIA driver: {error}") from error
        self._nvml = nvml

    def _handle(self, gpu: str) -> Any:
        if gpu.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(gpu))
        return self._nvml.nvmlDeviceGetHandleByUUID(gpu)

    def _listen(self, gpu: str, handle: Any) -> None:
        """Hear of the GPU's events from now on."""
        nvml = self._nvml
        if gpu not in self._events:
            try:
                events = nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            except nvml.NVMLError as error:
                if gpu not in self._deaf:
                    log.warning("errors that the driver reports of GPU %s (XIDs) cannot be heard of: %s", gpu, error)
                self._deaf.add(gpu)
                return
            self._events[gpu] = events

    def _stop_listening(self, gpu: str) -> None:
        events = self._events.pop(gpu, None)
        if events is not None:
            try:
                self._nvml.nvmlEventSetFree(events)
            except self._nvml.NVMLError as error:
                log.debug("letting go of GPU %s's events: %s", gpu, error)

    def _reported(self, gpu: str) -> tuple[int, ...]:
        """Errors of the GPU since the look before. Waits for nothing."""
        nvml, events, found = self._nvml, self._events.get(gpu), list[int]()
        while events is not None and len(found) < MOST_EVENTS:
            try:
                event = nvml.nvmlEventSetWait_v2(events, 0)
                if event.eventType & nvml.nvmlEventTypeXidCriticalError:
                    found.append(int(event.eventData))
            except nvml.NVMLError_Timeout:
                break
            except nvml.NVMLError as error:
                log.debug("hearing of GPU %s: %s", gpu, error)
                break
        return tuple(found)

    def _read_one(self, gpu: str) -> Vitals:
        nvml = self._nvml
        uuid, name = self._known.get(gpu, (gpu, ""))
        xids = self._reported(gpu)  # what it said before it was lost, first
        try:
            handle = self._handle(gpu)
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            name = _text(nvml.nvmlDeviceGetName(handle))
            self._known[gpu] = uuid, name
            vitals = self._ask(gpu, uuid, name, handle, xids)
            self._listen(gpu, handle)
        except nvml.NVMLError as error:
            self._stop_listening(gpu)  # once it is back it is another device to the driver
            return Vitals(gpu=gpu, uuid=uuid, name=name, lost=str(error), xids=xids)
        return vitals

    def _ask(self, gpu: str, uuid: str, name: str, handle: Any, xids: tuple[int, ...]) -> Vitals:
        nvml, told = self._nvml, self._told

        def threshold(which: int) -> float | None:
            return told(lambda: float(nvml.nvmlDeviceGetTemperatureThreshold(handle, which)))

        def ecc() -> int:
            return int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )

        # Not optional: a device that does not even tell this does not answer.
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        rows = told(lambda: nvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
        return Vitals(
            gpu=gpu,
            uuid=uuid,
            name=name,
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            utilization_percent=told(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temperature_c=told(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
            slowdown_c=threshold(nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
            shutdown_c=threshold(nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
            power_w=told(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            power_limit_w=told(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            ecc_uncorrected=told(ecc),
            rows_pending=bool(rows[2]),
            rows_failed=bool(rows[3]),
            recovery_action=self._recovery_action(handle),
            xids=xids,
        )

    def _recovery_action(self, handle: Any) -> int:
        """0 as well where the driver is older than the question."""
        nvml = self._nvml
        wanted = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
        if wanted is None:
            return 0
        answer = self._told(lambda: nvml.nvmlDeviceGetFieldValues(handle, [wanted])[0])
        return int(answer.value.uiVal) if answer is not None and answer.nvmlReturn == 0 else 0

    def _told(self, ask: Callable[[], Value]) -> Value | None:
        """What a device says; None where its kind has no such sensor, or keeps it from us.

        Raises:
            NVMLError: the device is lost, and has nothing to say any more.
        """
        nvml = self._nvml
        try:
            return ask()
        except nvml.NVMLError_GpuIsLost:
            raise
        except nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
