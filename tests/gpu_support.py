"""GPUs that are not there: a file that the simulated NVML reads, and what becomes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from muai_workers.gpus.simulated import SimulatedGpu, SimulatedState


class SimulatedGpus:
    """The GPUs of a machine, as every process reads them from the file."""

    def __init__(self, file: Path, number: int) -> None:
        self.file = file
        self.state = SimulatedState(gpus=tuple(SimulatedGpu(uuid=f"GPU-{index}") for index in range(number)))
        self._write()

    def change(self, index: int, **fields: Any) -> None:
        """From now on one GPU is so."""
        gpus = list(self.state.gpus)
        gpus[index] = msgspec.structs.replace(gpus[index], **fields)
        self.state = msgspec.structs.replace(self.state, gpus=tuple(gpus))
        self._write()

    def report(self, index: int, xid: int) -> None:
        """The driver reports an error of one GPU."""
        self.change(index, xids=(*self.state.gpus[index].xids, xid))

    def load_driver(self, loaded: bool) -> None:
        self.state = msgspec.structs.replace(self.state, driver_loaded=loaded)
        self._write()

    def json(self) -> bytes:
        return msgspec.json.encode(self.state)

    def _write(self) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_bytes(self.json())
        os.replace(fresh, self.file)  # noqa: PTH105 - as the module says: whole, or not at all
