"""Several GPUs, simulated, under real processes: one that fails is left alone, its work is done by the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway_support import GatewayStack, Process, gateway_stack
from tests.gpu_support import SimulatedGpus
from tests.transport_support import wait_until
from tests.up_support import Up

from muai_producers import InferenceClient
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.store import Store
from muai_producers.wire import InferenceResult

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]
GPUS = 3
SECTIONS = {
    "optimization": {"batcher": {"max_batch_size": 4}},
    "models": {"noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}},
}
VARIABLES = {
    "MUAI_QUEUE_LEASE_TTL_S": "2.0",
    "MUAI_MON_GPUS_CHECK_EVERY_S": "0.1",
    "MUAI_MON_GPUS_HANG_S": "6.0",
    "MUAI_MON_GPUS_QUARANTINE_S": "1.0",
}


class Machine:
    """A machine of three GPUs with one worker on each, a collector and a gateway."""

    def __init__(self, folder: Path, stack: GatewayStack, gpus: SimulatedGpus) -> None:
        self.stack, self.gpus = stack, gpus
        self.hang_file = folder / "hanging"
        self.fleet = Fleet(Store(stack.redis.client))
        self.client = InferenceClient(stack.settings)
        stack.start("collector", "--name", "c1")
        stack.start_gateway()
        self.workers: Process = stack.start("worker", "--engine", "fake", "--gpus", "all", "--slots", "1")
        wait_until(lambda: len(self.running()) == GPUS, 60, "the workers")

    def running(self) -> dict[str, WorkerRecord]:
        """The workers of the fleet, by GPU."""
        return {worker.gpu: worker for worker in self.fleet.view(()).workers}

    def health(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.stack.url}/health").json()
        return told

    def submit(self, number: int) -> list[str]:
        return self.client.submit_many({"model": "noop", "inputs": f"text {one}"} for one in range(number))

    def results(self, ids: Sequence[str]) -> list[InferenceResult]:
        outcomes = dict(self.client.results(ids, timeout_s=60))
        assert set(outcomes) == set(ids)
        for outcome in outcomes.values():
            assert isinstance(outcome, InferenceResult), outcome
        return list(outcomes.values())  # type: ignore[arg-type]

    def serve(self, number: int) -> set[str]:
        """Have requests served; which GPUs served them."""
        return {result.metadata["gpu_id"] for result in self.results(self.submit(number))}

    def close(self) -> None:
        self.client.close()
        self.workers.terminate()
        self.workers.popen.wait(30)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("gpus")
    gpus = SimulatedGpus(folder / "nvml.json", GPUS)
    fake = {"latency_per_batch_ms": 20, "hang_file": str(folder / "hanging")}
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patched.setenv("MUAI_TEST_NVML", str(gpus.file))
        patched.setenv("MUAI_TEST_FAKE_ENGINE", json.dumps(fake))
        for name, value in VARIABLES.items():
            patched.setenv(name, value)
        with gateway_stack(folder, sections=SECTIONS, queue_capacity=10_000) as stack:
            machine = Machine(folder, stack, gpus)
            try:
                yield machine
            finally:
                machine.close()
                print(machine.workers.log.read_text())  # noqa: T201 - shown where a test fails


def test_given_a_gpu_that_fails_under_load_then_nothing_is_lost_and_it_comes_back_once_it_is_well(
    machine: Machine,
) -> None:
    assert machine.health()["status"] == "healthy", machine.health()
    assert machine.serve(120) == {"0", "1", "2"}
    ids = machine.submit(800)
    next(iter(machine.client.results(ids, timeout_s=30)))
    machine.gpus.change(1, lost=True, xids=(79,))

    wait_until(lambda: machine.health()["status"] == "degraded", what="a degraded health page")
    (reason,) = machine.health()["reasons"]
    assert reason.startswith("GPU 1 of ")
    assert "is failed: " in reason
    wait_until(lambda: set(machine.running()) == {"0", "2"}, what="the worker's farewell")
    assert len(machine.results(ids)) == 800
    assert machine.serve(120) == {"0", "2"}
    assert machine.fleet.gpus()[1].last_xid == 79

    machine.gpus.change(1, lost=False)
    wait_until(lambda: set(machine.running()) == {"0", "1", "2"}, 60, "the worker's return")
    wait_until(lambda: machine.health()["status"] == "healthy", what="a healthy page")
    wait_until(lambda: "1" in machine.serve(60), what="work for the GPU that is back")


def test_given_an_application_error_then_nobody_stops(machine: Machine) -> None:
    before = {gpu: worker.pid for gpu, worker in machine.running().items()}
    machine.gpus.report(0, 31)
    wait_until(lambda: machine.fleet.gpus()[0].last_xid == 31, what="the error in the fleet's picture")
    assert machine.fleet.gpus()[0].state == "ok"
    assert machine.serve(30) <= {"0", "1", "2"}
    assert {gpu: worker.pid for gpu, worker in machine.running().items()} == before


def test_given_a_gpu_that_hangs_then_what_it_had_is_answered_by_the_others(machine: Machine) -> None:
    machine.hang_file.write_text("0")
    ids = machine.submit(60)
    wait_until(lambda: machine.fleet.gpus()[0].state == "failed", 30, "the verdict")
    assert "it hangs" in machine.fleet.gpus()[0].reason
    assert {result.metadata["gpu_id"] for result in machine.results(ids)} <= {"1", "2"}
    machine.hang_file.unlink()
    wait_until(lambda: len(machine.running()) == GPUS, 60, "the worker's return")
    wait_until(lambda: {gpu.state for gpu in machine.fleet.gpus()} == {"ok"}, what="GPUs that are well")


def test_given_no_driver_then_the_gpus_are_unseen_and_work_goes_on(machine: Machine) -> None:
    machine.gpus.load_driver(False)
    wait_until(lambda: {gpu.state for gpu in machine.fleet.gpus()} == {"unseen"}, what="unseen GPUs")
    assert len(machine.running()) == GPUS
    assert machine.serve(30)
    machine.gpus.load_driver(True)
    wait_until(lambda: {gpu.state for gpu in machine.fleet.gpus()} == {"ok"}, what="GPUs that are seen again")


def test_given_the_workers_are_told_to_stop_then_their_gpus_leave_the_picture(machine: Machine) -> None:
    machine.workers.terminate()
    assert machine.workers.popen.wait(30) == 0
    assert machine.fleet.gpus() == ()
    assert machine.running() == {}


class UpOnGpus(Up):
    """A `muai up --gpus all`."""

    def start(self) -> None:
        self.gpus = SimulatedGpus(self.home / "nvml.json", 2)
        self.env |= {"MUAI_GPUS": "all", "MUAI_TEST_NVML": str(self.gpus.file), "MUAI_MON_GPUS_CHECK_EVERY_S": "0.1"}
        super().start()


def test_given_a_whole_installation_on_gpus_then_each_has_its_worker_and_a_failed_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    up = UpOnGpus(tmp_path)
    try:
        up.submit()
        fleet = Fleet(Store(up.redis()))
        wait_until(lambda: {worker.gpu for worker in fleet.view(()).workers} == {"0", "1"}, 60, "both workers")
        up.gpus.change(0, rows_failed=True)
        wait_until(lambda: {worker.gpu for worker in fleet.view(()).workers} == {"1"}, 60, "one worker")
        up.submit()
        assert "fake-gpu0 is stopped: GPU 0 is failed" in " ".join(up.log.read_text().split())
    finally:
        up.stop()
