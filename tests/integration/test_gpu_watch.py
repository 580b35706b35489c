"""The watch over GPUs, look by look: what it holds, what it tells the fleet, and what it does not conclude."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.gpu_support import SimulatedGpus
from tests.transport_support import own_redis

from muai_config import Settings
from muai_producers.fleet import Fleet, GpuRecord, WorkerRecord
from muai_producers.store import Store
from muai_workers.gpus.nvml import GpuReader
from muai_workers.gpus.simulated import SimulatedNvml
from muai_workers.gpus.watch import HUNG_PATIENCE_S, GpuWatch
from muai_workers.up.supervisor import Standing

pytestmark = pytest.mark.redis
GROUPS = {"w-gpu0+1": ("0", "1"), "w-gpu2": ("2",)}
RUNNING = {"w-gpu0+1": Standing(100, None), "w-gpu2": Standing(101, None)}
GRACE_S = 30.0
Make = Callable[..., GpuWatch]


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus(tmp_path / "nvml.json", 3)


@pytest.fixture
def fleet(store: Store) -> Fleet:
    return Fleet(store)


@pytest.fixture
def make(muai_settings: Settings, gpus: SimulatedGpus) -> Iterator[Make]:
    made: list[GpuWatch] = []

    def make_watch(settings: Settings = muai_settings, groups: dict[str, tuple[str, ...]] = GROUPS) -> GpuWatch:
        reader = GpuReader(["0", "1", "2"], lambda: SimulatedNvml.of_file(gpus.file))
        made.append(GpuWatch(settings, groups, GRACE_S, reader))
        return made[-1]

    yield make_watch
    for watch in made:
        watch.stop()


def working(fleet: Fleet, **told: Any) -> None:
    """The worker of GPU 2 says that it has work."""
    name = f"w-gpu2@{socket.gethostname()}"
    fleet.announce(WorkerRecord(name=name, engine="fake", slots=1, pid=101, **{"in_flight": 3, **told}))


def test_given_a_gpu_of_a_group_that_fails_then_their_worker_is_held_and_all_are_told_of(
    make: Make, gpus: SimulatedGpus, fleet: Fleet
) -> None:
    watch = make()
    watch.look(RUNNING, 0.0, 1000.0)
    assert not watch.holds()
    gpus.change(1, lost=True)
    watch.look(RUNNING, 2.0, 1002.0)
    hold = watch.holds()["w-gpu0+1"]
    assert (set(watch.holds()), hold.patience_s) == ({"w-gpu0+1"}, GRACE_S)
    assert "GPU 1 is failed: it does not answer" in hold.reason
    assert watch.remarks() == ["GPU 1 is failed: it does not answer: GPU is lost"]
    assert watch.remarks() == []
    records = {gpu.index: gpu for gpu in raw(fleet)}
    assert {index: gpu.state for index, gpu in records.items()} == {"0": "ok", "1": "failed", "2": "ok"}
    assert records["1"].uuid == "GPU-1", "its name and id are those of before"
    assert records["1"].memory_total_bytes is None
    assert records["2"].worker == f"w-gpu2@{socket.gethostname()}"


def test_given_a_gpu_that_two_workers_share_then_an_error_of_it_stops_both(
    make: Make, gpus: SimulatedGpus, fleet: Fleet
) -> None:
    watch = make(groups={"onnx-gpu0": ("0",), "pytorch-gpu0": ("0",), "onnx-gpu1": ("1",)})
    watch.look({}, 0.0, 1000.0)
    gpus.report(0, 48)
    watch.look({}, 2.0, 1002.0)
    assert set(watch.holds()) == {"onnx-gpu0", "pytorch-gpu0"}
    assert sorted(record.worker.partition("@")[0] for record in raw(fleet)) == [
        "onnx-gpu0",
        "onnx-gpu1",
        "pytorch-gpu0",
    ]


def test_given_a_worker_that_gets_nothing_done_then_its_gpu_hangs_and_it_is_killed_soon(
    make: Make, fleet: Fleet, muai_settings: Settings
) -> None:
    watch = make()
    hang_s = muai_settings.monitoring.gpus.hang_s or 0.0
    working(fleet)
    watch.look(RUNNING, 0.0, 1000.0)
    watch.look(RUNNING, hang_s - 1, 1000.0)
    assert not watch.holds()
    working(fleet, progress=1)
    watch.look(RUNNING, hang_s, 1000.0)
    watch.look(RUNNING, 2 * hang_s - 1, 1000.0)
    assert not watch.holds(), "it has answered something meanwhile"
    watch.look(RUNNING, 2 * hang_s, 1000.0)
    assert watch.holds()["w-gpu2"].patience_s == HUNG_PATIENCE_S
    quarantine_s = muai_settings.monitoring.gpus.quarantine_s
    gone = {**RUNNING, "w-gpu2": Standing(None, None)}
    watch.look(gone, 2 * hang_s + quarantine_s - 1, 1000.0)
    assert watch.holds()
    watch.look(gone, 2 * hang_s + quarantine_s, 1000.0)
    assert not watch.holds()


def test_given_a_worker_that_loads_a_model_for_ever_then_its_gpu_hangs_once_that_took_too_long(
    make: Make, gpus: SimulatedGpus, fleet: Fleet, muai_settings: Settings
) -> None:
    watch = make()
    load_hang_s = muai_settings.monitoring.gpus.load_hang_s or 0.0
    working(fleet, in_flight=0, models_loading=("qwen",))
    watch.look(RUNNING, 0.0, 1000.0)
    watch.look(RUNNING, load_hang_s - 1, 1000.0)
    gpus.change(2, memory_used_bytes=12_345)
    watch.look(RUNNING, load_hang_s, 1000.0)
    watch.look(RUNNING, 2 * load_hang_s - 1, 1000.0)
    assert not watch.holds(), "some of it came into the GPU's memory meanwhile"
    watch.look(RUNNING, 2 * load_hang_s, 1000.0)
    assert "was loading qwen" in watch.holds()["w-gpu2"].reason
    assert watch.holds()["w-gpu2"].patience_s == HUNG_PATIENCE_S


def test_given_a_worker_that_falls_silent_with_work_in_its_engine_then_it_hangs_as_well(
    make: Make, fleet: Fleet, muai_settings: Settings
) -> None:
    watch = make()
    working(fleet)
    watch.look(RUNNING, 0.0, 1000.0)
    fleet.withdraw(f"w-gpu2@{socket.gethostname()}")
    watch.look(RUNNING, muai_settings.monitoring.gpus.hang_s or 0.0, 1000.0)
    assert set(watch.holds()) == {"w-gpu2"}


def test_given_a_new_run_of_the_worker_then_what_the_old_one_did_counts_no_more(
    make: Make, fleet: Fleet, muai_settings: Settings
) -> None:
    watch = make()
    working(fleet)
    watch.look(RUNNING, 0.0, 1000.0)
    restarted = {**RUNNING, "w-gpu2": Standing(202, None)}
    watch.look(restarted, muai_settings.monitoring.gpus.hang_s or 0.0, 1000.0)
    assert not watch.holds()


def test_given_a_state_store_that_goes_away_then_it_is_said_once_and_nothing_hangs(
    make: Make, muai_settings: Settings, tmp_path: Path
) -> None:
    with own_redis(tmp_path) as server:
        queue = muai_settings.queue.model_copy(update={"redis_url": server.url})
        watch = make(muai_settings.model_copy(update={"queue": queue}))
        working(Fleet(Store(server.client)))
        watch.look(RUNNING, 0.0, 1000.0)
        assert watch.remarks() == []
        server.kill()
        for moment_s in (1000.0, 2000.0):
            watch.look(RUNNING, moment_s, 1000.0)
        assert not watch.holds()
        (remark,) = watch.remarks()
        assert "the state store does not answer" in remark


def test_given_a_worker_that_was_given_up_then_its_gpu_is_degraded_and_says_so(make: Make, fleet: Fleet) -> None:
    watch = make()
    given_up = {**RUNNING, "w-gpu2": Standing(None, "it died 5 times in a row")}
    watch.look(given_up, 0.0, 1000.0)
    (told,) = [record for record in raw(fleet) if record.index == "2"]
    assert told.state == "degraded"
    assert "its worker was given up: it died 5 times in a row" in told.reason


def test_given_no_driver_at_first_then_the_records_without_ids_give_way_to_those_with(
    make: Make, gpus: SimulatedGpus, fleet: Fleet
) -> None:
    gpus.load_driver(False)
    watch = make()
    watch.look(RUNNING, 0.0, 1000.0)
    assert {(record.uuid, record.state) for record in raw(fleet)} == {(index, "unseen") for index in "012"}
    assert "there is no NVIDIA driver" in raw(fleet)[0].reason
    gpus.load_driver(True)
    watch.look(RUNNING, 2.0, 1002.0)
    assert {(record.uuid, record.state) for record in raw(fleet)} == {(f"GPU-{index}", "ok") for index in "012"}
    watch.stop()
    assert raw(fleet) == []


def raw(fleet: Fleet) -> list[GpuRecord]:
    """The records as they were written, whenever that was."""
    written = fleet._client.hgetall(fleet._keys.gpus).values()
    return sorted((msgspec.json.decode(one, type=GpuRecord) for one in written), key=lambda one: one.index)
