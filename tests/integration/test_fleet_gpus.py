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


def test_a_gpu_that_several_workers_have_is_told_of_once_with_the_worst_that_any_watch_sees(store: Store) -> None:
    fleet = Fleet(store)
    now_s = time.time()
    shared = [
        record("0", worker="a", written_at=now_s, read_at=now_s - 1, temperature_c=50.0),
        record("0", worker="b", written_at=now_s, read_at=now_s, temperature_c=51.0, state="failed", reason="hangs"),
        record("0", worker="c", written_at=now_s - 60, state="ok"),
    ]
    fleet.announce_gpus(shared)
    (gpu,) = fleet.gpus()
    assert (gpu.state, gpu.reason, gpu.temperature_c, gpu.worker) == ("failed", "hangs", 51.0, "a, b, c")
    fleet.withdraw_gpus(shared[1:2])
    (gpu,) = fleet.gpus()
    assert (gpu.state, gpu.reason, gpu.worker) == ("ok", "", "a, c"), "who sees it outweighs who is gone"
