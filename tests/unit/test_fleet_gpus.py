"""GPUs in the fleet's records: what metrics, health and the console read."""

from __future__ import annotations

from muai_config import Settings
from muai_producers.fleet import CollectorRecord, FleetView, GpuRecord, WorkerRecord, as_seen
from muai_producers.gateway.health import Picture, health

NOW_S = 1_000_000.0


def record(index: str, **fields: object) -> GpuRecord:
    values = {"host": "h", "index": index, "uuid": f"GPU-{index}", "written_at": NOW_S, **fields}
    return GpuRecord(**values)  # type: ignore[arg-type]


def test_a_gpu_whose_watch_died_is_unseen_and_not_taken_for_well() -> None:
    assert as_seen(record("0"), NOW_S + 3).state == "ok"
    silent = as_seen(record("0"), NOW_S + 60)
    assert silent.state == "unseen"
    assert "60 s" in silent.reason
    assert as_seen(record("0", state="failed", reason="XID 79"), NOW_S + 60).reason == "XID 79"


def test_health_is_degraded_and_names_the_gpu_and_the_reason() -> None:
    worker = WorkerRecord(name="w", engine="onnx", slots=1)
    fleet = FleetView(
        workers=(worker,),
        collectors=(CollectorRecord(name="c"),),
        gpus=(record("0"), record("1", state="failed", reason="the driver reported XID 79: it fell off the bus")),
    )
    told = health(Picture(None, None, fleet, 0), Settings(), uptime_s=1.0, draining=False)
    assert told.status == "degraded"
    assert told.reasons == ["GPU 1 of h is failed: the driver reported XID 79: it fell off the bus"]
