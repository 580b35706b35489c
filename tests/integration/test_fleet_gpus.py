"""GPUs in the fleet's records, in a real Redis."""

from __future__ import annotations

import time

import pytest

from muai_producers.fleet import GPUS_KEPT_S, Fleet, GpuRecord
from muai_producers.store import Store

pytestmark = pytest.mark.redis


def record(index: str, **fields: object) -> GpuRecord:
    return GpuRecord(**{"host": "h", "index": index, "uuid": f"GPU-{index}", **fields})  # type: ignore[arg-type]


def test_records_come_back_in_order_and_old_ones_are_forgotten(store: Store) -> None:
    fleet = Fleet(store)
    now_s = time.time()
    fleet.announce_gpus([record("10", written_at=now_s), record("2", written_at=now_s, utilization_percent=40.0)])
    fleet.announce_gpus([record("1", written_at=now_s - GPUS_KEPT_S - 1)])
    assert [gpu.index for gpu in fleet.gpus()] == ["2", "10"]
    assert fleet.view(["fake"]).gpus[0].utilization_percent == 40.0
    fleet.withdraw_gpus(fleet.gpus())
    assert fleet.gpus() == ()
