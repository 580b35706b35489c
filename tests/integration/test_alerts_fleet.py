"""An injected fault; ten control workers, each with beat; a webhook receiver and a real Alertmanager: told once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.gateway_support import GatewayStack, Process, gateway_stack
from tests.receiving import Receiver, receiver
from tests.transport_support import ROOT, free_port, wait_until

from muai_producers import InferenceClient
from muai_producers.alerts.store import AlertStore
from muai_producers.scheduled import TaskRuns
from muai_producers.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.timeout(300)]
NUM_CONTROLS = 10
ANOMALY = {
    "latency_threshold_ms": 300.0,
    "window_s": 10,
    "min_requests": 3,
    "check_every_s": 1.0,
    "resolve_after_s": 2.0,
    "throughput_threshold_rps": 0.0,
    "memory_threshold_percent": 100.0,  # the machine's own is none of this test's business
    "alert_destinations": ["log", "webhook", "alertmanager"],
}


def alertmanager_program() -> str:
    """Debian's `prometheus-alertmanager`; where there is none, a skip on a laptop and a failure in CI."""
    found = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("Alertmanager is not installed")
    return found or pytest.skip("Alertmanager is not installed here (Debian: prometheus-alertmanager)")


@contextlib.contextmanager
def alertmanager(folder: Path, receiver_url: str) -> Iterator[str]:
    """An Alertmanager of the test's own, which passes on what it is told to `receiver_url`; its address."""
    program = alertmanager_program()
    folder.mkdir()
    config = {
        "route": {
            "receiver": "test",
            "group_by": ["alertname", "subject"],
            "group_wait": "1s",
            "group_interval": "1s",
            "repeat_interval": "1h",
        },
        "receivers": [{"name": "test", "webhook_configs": [{"url": receiver_url, "send_resolved": True}]}],
    }
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        program,
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--cluster.listen-address=",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: _is_up(f"{url}/-/ready"), timeout_s=30, what="Alertmanager")
            yield url
        finally:
            process.terminate()


def _is_up(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def slow_worker(stack: GatewayStack) -> subprocess.Popen[bytes]:
    """A worker on the fake engine that takes as long as a request asks for."""
    path = os.pathsep.join(str(ROOT / name) for name in ("config", "producers", "batching", "workers", "."))
    env = {**os.environ, "PYTHONPATH": path, "MUAI_TEST_RUNS": str(stack.folder / "runs"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.chaos.role", "engine", str(stack.config), "w1"]
    with (stack.folder / "worker.log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)


class Load:
    """Sends a request at a time, of a text that may change, until it is stopped."""

    def __init__(self, stack: GatewayStack) -> None:
        self.text = "hello"
        self._client = InferenceClient(stack.settings)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(0.05):
            self._client.infer("noop", self.text, timeout_s=60)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._client.close()


def run_cli(stack: GatewayStack, *arguments: str) -> str:
    process = Process(stack.folder, stack.config, *arguments)
    assert process.popen.wait(timeout=60) == 0, process.log.read_text()
    return process.log.read_text()


def of_type(bodies: list[Any], alert_type: str) -> list[Any]:
    return [body for body in bodies if body["alert_type"] == alert_type]


def alerts_at_alertmanager(bodies: list[Any]) -> list[tuple[str, str]]:
    return [(alert["labels"]["alert_type"], alert["status"]) for body in bodies for alert in body["alerts"]]


@pytest.mark.property(39)
def test_given_ten_control_workers_and_a_slow_engine_then_each_destination_hears_of_it_once_and_of_its_end_once(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as exits:
        hook, behind_alertmanager = exits.enter_context(receiver()), exits.enter_context(receiver())
        url = exits.enter_context(alertmanager(tmp_path / "am", behind_alertmanager.url))
        anomaly = {**ANOMALY, "webhook_url": hook.url, "alertmanager_url": url}
        quiet = {"prometheus": {"enabled": False}, "tracing": {"enabled": False}}
        port = free_port()
        server = {"host": "127.0.0.1", "port": port}
        sections = {"monitoring": {"server": server, "anomaly": anomaly, **quiet}}
        stack = exits.enter_context(gateway_stack(tmp_path, sections=sections))
        stack.port, stack.url = port, f"http://127.0.0.1:{port}"
        worker = slow_worker(stack)
        exits.callback(worker.wait)
        exits.callback(worker.kill)
        stack.start("collector", "--name", "c1")
        stack.start("gateway")
        wait_until(lambda: _is_up(f"{stack.url}/health"), 60, "the gateway")
        controls = [stack.start("control", "--name", f"control-{number}") for number in range(NUM_CONTROLS)]
        store = Store(stack.redis.client)
        wait_until(lambda: TaskRuns(store).get("muai.control.check_anomalies"), 120, "the first check")
        load = Load(stack)
        exits.callback(load.stop)
        _watch_fault(stack, load, hook, behind_alertmanager)
        entry = AlertStore(store).history()[0]
        assert [(state.status, state.attempts) for state in entry.deliveries] == [("sent", 1)] * 6
        logs = "".join(process.log.read_text() for process in controls)
        assert logs.count("alert latency: noop") == 2, "the log hears of the beginning and of the end"
        expected = {"check_anomalies", "deliver_alerts", "roll_up", "sample_hosts", "tune"}

        def all_ran() -> bool:
            return {run.task.rpartition(".")[2] for run in TaskRuns(store).all()} >= expected

        wait_until(all_ran, 60, "every task to have run well")


def _watch_fault(stack: GatewayStack, load: Load, hook: Receiver, behind_alertmanager: Receiver) -> None:
    wait_until(lambda: _answered(stack) >= 20, 60, "requests that are well")
    assert hook.bodies == []
    load.text = "SLEEP:0.6"
    wait_until(lambda: of_type(hook.bodies, "latency"), 90, "the alert")
    wait_until(lambda: ("latency", "firing") in alerts_at_alertmanager(behind_alertmanager.bodies), 30, "Alertmanager")
    told = httpx.get(f"{stack.url}/health").json()
    assert told["status"] == "degraded"
    assert any("alert latency: noop" in reason for reason in told["reasons"]), told
    assert "latency: noop" in run_cli(stack, "alerts", "--open")
    assert "noop" in run_cli(stack, "top", "--once")
    load.text = "hello"
    wait_until(lambda: len(of_type(hook.bodies, "latency")) >= 2, 90, "the end of the alert")
    wait_until(lambda: ("latency", "resolved") in alerts_at_alertmanager(behind_alertmanager.bodies), 30, "its end")
    answered = _answered(stack)
    wait_until(lambda: _answered(stack) >= answered + 40, 60, "some more checks")
    assert [body["status"] for body in hook.bodies] == ["firing", "resolved"], hook.bodies
    assert sorted(alerts_at_alertmanager(behind_alertmanager.bodies)) == [
        ("latency", "firing"),
        ("latency", "resolved"),
    ]
    assert hook.bodies[0]["id"] == hook.bodies[1]["id"]
    assert httpx.get(f"{stack.url}/api/v1/alerts?open=true").json()["data"] == []
    shown = httpx.get(f"{stack.url}/api/v1/alerts").json()["data"]
    assert [alert["alert_type"] for alert in shown] == ["latency"]
    performance = httpx.get(f"{stack.url}/api/v1/performance?window_s=120&model=noop").json()
    assert performance["total"]["requests"] > 60
    assert performance["resources"]["trends"], "this host was sampled"


def _answered(stack: GatewayStack) -> int:
    return int(stack.redis.client.hget("muai:stats", "answered") or 0)  # type: ignore[arg-type]
