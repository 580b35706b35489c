"""`muai up` scraped by a real Prometheus: every panel and rule has data, and a fault fires its rule once and resolves.

Prometheus scrapes each second here, and the rules' minutes are made seconds, so that the test takes less than two
minutes; what is evaluated is otherwise what config/ holds.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.transport_support import ROOT, free_port, wait_until
from tests.up_support import MUAI, Up

from muai_config import build_settings
from muai_producers import InferenceClient
from muai_producers.alerts.records import Alert
from muai_producers.alerts.store import AlertStore
from muai_producers.errors import MuaiError

pytestmark = [
    pytest.mark.redis,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus on the PATH"),
]
DASHBOARDS = sorted((ROOT / "config/grafana/dashboards").glob("*.json"))
RULES = ROOT / "config/prometheus/rules.yml"
WINDOW = "15s"
ANOMALY = {
    "latency_threshold_ms": 300.0,
    "window_s": 10,
    "min_requests": 3,
    "check_every_s": 1.0,
    "resolve_after_s": 2.0,
    "memory_threshold_percent": 100.0,  # the machine's own is none of this test's business
}
# Metrics without data in this run: what each would take.
EXEMPT = {
    "muai_gpu_state": "a watched GPU that is there",
    "muai_redeliveries_total": "a process that was killed",
    "muai_alerts_total": "an alert of our own",
    "muai_tuning_decisions_total": "a tuner that decides",
    "muai_monitoring_failures_total": "a failure of monitoring",
    "muai_monitoring_degraded": "monitoring that does not work",
    "muai_kv_cache_evictions_total": "a cache that is full",
    "muai_trace_spans_total": "traces that are switched on",
}
NEVER_HERE = {
    "muai_gpu_state",
    "muai_trace_spans_total",
    "muai_tuning_decisions_total",
    "muai_kv_cache_evictions_total",
}
"""Of these, those that not even a machine under load can have."""
MODELS = {
    "classify": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
    "write": {"task": "text-generation", "source": "hub:none", "engines": ["fake"]},
    "falls": {"task": "text-classification", "source": "hub:none", "engines": ["fake", "pytorch"]},
}
GPU = {"uuid": "GPU-0", "memory_used_bytes": 1_000_000_000, "utilization_percent": 50}


class Prometheus:
    """Debian's Prometheus in a folder of its own, with the repository's rules."""

    def __init__(self, folder: Path, target: str) -> None:
        self.port = free_port()
        config = yaml.safe_load((ROOT / "config/prometheus/prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / "rules.yml")]
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "muai"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(hurried(RULES.read_text(encoding="utf-8")))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{self.port}"], stdout=self._log, stderr=self._log
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def firing(self, alert: str, since_s: float) -> list[float]:
        """The seconds at which the alert was firing."""
        selector = f'max(ALERTS{{alertname="{alert}", alertstate="firing"}})'
        found = self._get("query_range", query=selector, start=since_s, end=time.time(), step=1)["result"]
        return [at for at, _ in found[0]["values"]] if found else []

    def _get(self, what: str, **parameters: Any) -> dict[str, Any]:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{what}?{query}", timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        data: dict[str, Any] = told["data"]
        return data

    def has(self, expression: str) -> bool:
        """Whether an expression gives a number: a share of nothing is NaN."""
        try:
            return any(sample["value"][1] != "NaN" for sample in self.query(expression))
        except OSError:
            return False


def hurried(rules: str) -> str:
    """Rules whose minutes are seconds; those that look back look back long enough for a few scrapes."""
    return re.sub(r"for: (\d+)m", r"for: \1s", rules).replace("[5m]", f"[{WINDOW}]")


def panels() -> list[tuple[str, str]]:
    """Every expression of the dashboards, with where it stands."""
    return [
        (f"{path.stem}: {panel['title']}", target["expr"].replace("$__rate_interval", WINDOW))
        for path in DASHBOARDS
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ]


def exempt(expression: str) -> bool:
    return any(name in expression for name in EXEMPT)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScrapedUp]:
    up = ScrapedUp(tmp_path_factory.mktemp("up"), free_port())
    try:
        up.submit()
        yield up
    finally:
        up.stop()


class ScrapedUp(Up):
    """A `muai up` with a metrics page."""

    def __init__(self, home: Path, page: int) -> None:
        self.page = page
        fake = {"latency_per_batch_ms": 5, "keeps_conversations": True, "slow_ms": 3000}
        super().__init__(home, sections={"models": MODELS}, fake=fake)

    def start(self) -> None:
        file = self.home / "muai.yaml"
        configuration = json.loads(file.read_text())
        configuration["monitoring"] |= {
            "enabled": True,
            "prometheus": {"port": self.page},
            "tracing": {"enabled": False},
            "anomaly": ANOMALY,
        }
        file.write_text(json.dumps(configuration))
        (self.home / "nvml.json").write_text(json.dumps({"gpus": [GPU]}))
        self.env["MUAI_TEST_NVML"] = str(self.home / "nvml.json")
        super().start()

    @property
    def variables(self) -> dict[str, str]:
        """What leads a process to its Redis."""
        found: dict[str, str] = json.loads((self.home / "up.json").read_text())["variables"]
        return found

    def client(self) -> InferenceClient:
        """Of this installation."""
        sections = json.loads((self.home / "muai.yaml").read_text())
        models, broker = sections["models"], self.variables["MUAI_BROKER_URL"]
        return InferenceClient(build_settings({"models": models, "queue": {"broker_url": broker}}, {}))

    def text(self) -> str:
        """The metrics page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def health(self) -> dict[str, Any]:
        """The gateway's health page."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def is_degraded_for(self, word: str) -> bool:
        """Whether the health page gives a reason that has the word in it."""
        return any(word in reason for reason in self.health()["reasons"])


@pytest.fixture(scope="module")
def prometheus(up: ScrapedUp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{up.page}")
    try:
        wait_until(lambda: prometheus.has('up{job="muai"} == 1'), timeout_s=60, what="the first scrape")
        yield prometheus
    finally:
        prometheus.stop()


def load(up: ScrapedUp, client: InferenceClient, number: int) -> None:
    """A little of everything that an installation does."""
    ids = [
        client.submit("classify", f"some words {'and more ' * (one % 7)}{number}", tenant=f"tenant-{one % 3}")
        for one in range(12)
    ]
    ids += [client.submit("write", f"a b c {one}", conversation_id=f"talk-{one % 2}", stream=True) for one in range(3)]
    for bad in (client.submit("falls", "POISON", tenant="tenant-0"), client.submit("classify", "BAD")):
        with pytest.raises(MuaiError):
            client.result(bad, timeout_s=30)
    for request_id in ids:
        client.result(request_id, timeout_s=30)
    # The first of these is accepted, all others conflict with it.
    body = json.dumps({"model": "noop", "inputs": {"text": f"number {number}"}, "idempotency_key": "one-key"})
    headers = {"content-type": "application/json"}
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(f"{up.url}/v1/inference", body.encode(), headers), timeout=10)


def test_given_a_real_scrape_then_promtool_finds_nothing_to_complain_of(up: ScrapedUp) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool on the PATH")
    wait_until(lambda: "inference_latency_seconds_bucket" in up.text(), timeout_s=30, what="the first counts")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=up.text(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_given_load_then_every_panel_has_data(up: ScrapedUp, prometheus: Prometheus) -> None:
    expected = {expression: where for where, expression in panels() if not exempt(expression)}
    missing = dict(expected)
    deadline_s, number = time.monotonic() + 90, 0
    with up.client() as client:
        while missing and time.monotonic() < deadline_s:
            number += 1
            load(up, client, number)
            missing = {expression: where for expression, where in missing.items() if not prometheus.has(expression)}
    assert not missing
    for where, expression in panels():
        if any(name in expression for name in NEVER_HERE):
            assert not prometheus.has(expression), f"{where} has data: it is exempt no more"
    for rule in rules():
        prometheus.query(rule["expr"])  # a rule need not hold now; that it can be evaluated is what is asked


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(hurried(RULES.read_text(encoding="utf-8")))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_given_an_engine_that_becomes_slow_then_the_rule_and_our_own_alert_fire_once_and_resolve(
    up: ScrapedUp, prometheus: Prometheus
) -> None:
    def is_quiet() -> bool:
        return prometheus.has("vector(1)") and not prometheus.query('ALERTS{alertname="MuaiHighLatency"}')

    wait_until(is_quiet, timeout_s=60, what="the end of what was slow before")
    began_s = time.time()
    with up.client() as client:
        for request_id in [client.submit("noop", f"SLOW {one}") for one in range(3)]:
            client.result(request_id, timeout_s=60)
        wait_until(lambda: prometheus.firing("MuaiHighLatency", began_s), timeout_s=60, what="the alert")

        def own() -> list[Alert]:
            entries = AlertStore(client.store).history()
            told = [entry.alert for entry in entries if entry.alert.timestamp >= began_s]
            return [alert for alert in told if (alert.alert_type, alert.subject) == ("latency", "noop")]

        def are_resolved() -> bool:
            client.infer("noop", "quick again", timeout_s=30)
            return is_quiet() and any(alert.resolved_at is not None for alert in own())

        wait_until(are_resolved, timeout_s=90, what="the end of both alerts")
        assert len(own()) == 1, "our own began more than once"
    seconds = prometheus.firing("MuaiHighLatency", began_s)
    assert seconds[-1] - seconds[0] == len(seconds) - 1, "it fired more than once"


def test_given_a_metrics_port_that_is_taken_then_health_says_so_and_requests_go_on(up: ScrapedUp) -> None:
    # A second exporter wants the port that the first one has.
    second = subprocess.Popen(
        [*MUAI, "exporter", "--name", "too-late"],
        env={**up.env, **up.variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: up.is_degraded_for("too-late"), timeout_s=60, what="the health page to say so")
        assert up.health()["status"] == "degraded"
        assert up.is_degraded_for(f":{up.page}")
        with up.client() as client:
            assert client.infer("noop", "all the same", timeout_s=30).engine_used == "fake"
    finally:
        second.terminate()
        second.wait(timeout=20)
    wait_until(lambda: not up.is_degraded_for("too-late"), timeout_s=60, what="the end of it")
