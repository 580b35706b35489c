"""The tuner against a real Redis: what it reads, what it sets, who is told; with a simulated fleet and its clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from tests.transport_support import OwnRedis
from tests.tuning_simulation import STRETCH_S, Fleet

from muai_config import Settings, build_settings
from muai_producers.alerts.records import Finding
from muai_producers.cli.main import muai
from muai_producers.fleet import Fleet as FleetBook
from muai_producers.fleet import WorkerRecord
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.series import Series
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store
from muai_workers.monitoring.anomalies import AnomalyDetector
from muai_workers.tuning.auto_tuner import AutoTuner, TuningRecommendations
from muai_workers.tuning.looking import in_effect, values_of
from muai_workers.tuning.records import TuningEvent

pytestmark = pytest.mark.redis
BEGAN_S = 1_790_000_000.0
SIZE = "optimization.batcher.max_batch_size"
SERIES = Series("m", "onnx", "embedding")
LOW, HIGH = 10.0, 100.0


class Installation:
    """A simulated fleet whose performance data lie in Redis, and the tuner over it."""

    def __init__(self, server: OwnRedis, seed: int = 1, **tuner: Any) -> None:
        self.url = server.url
        self.store = Store(server.client)
        self.fleet = Fleet(seed=seed, now_s=BEGAN_S)
        self.settings = build_settings(self.document(**tuner), {})
        self.monitor = PerformanceMonitor(self.store, 604_800, wall_s=lambda: self.now_s)
        self.versions = ConfigVersions(self.store)
        self.editor = ConfigEditor(self.settings, self.versions, wall_s=lambda: self.now_s)
        self.tuner = self.another_tuner()
        self.now_s = BEGAN_S
        worker = WorkerRecord(name="w1", engine="onnx", slots=1, device="simulated")
        FleetBook(self.store).announce(worker)

    def document(self, **tuner: Any) -> dict[str, Any]:
        return {
            "queue": {"broker_url": self.url},
            "optimization": {
                "batcher": {"max_batch_size": 4},
                "tuner": {"enabled": True, "target_latency_ms": 500.0, **tuner},
            },
        }

    def another_tuner(self) -> AutoTuner:
        return AutoTuner(self.settings, self.store, self.monitor, lambda: self.now_s)

    @property
    def in_effect(self) -> Settings:
        return in_effect(self.settings, self.versions.current())

    def go(self, intervals: int, rate: float) -> list[TuningEvent]:
        """Let intervals pass; returns what the tuner decided."""
        events = []
        for _ in range(intervals):
            buckets = {}
            for _ in range(6):
                start_s = int(self.fleet.now_s)
                buckets[start_s, SERIES.member] = self.fleet.run_counted(STRETCH_S, rate, values_of(self.in_effect))
            for call in self.monitor.data.calls(buckets):
                self.monitor.data.call(call)
            # A little after the end, when everything has been written.
            self.now_s = self.fleet.now_s + 4.0
            FleetBook(self.store).announce(WorkerRecord(name="w1", engine="onnx", slots=1, device="simulated"))
            events += self.tuner.run()
        return events


@pytest.fixture
def installed(clean_redis: OwnRedis) -> Installation:
    return Installation(clean_redis)


def test_given_more_load_then_a_step_is_a_version_by_the_tuner_with_its_reason_and_is_kept_when_it_helps(
    installed: Installation,
) -> None:
    assert installed.go(3, LOW) == []
    first, *rest = installed.go(8, HIGH)
    assert (first.outcome, first.old) == ("raised", {"batch_size": 4})
    version = installed.versions.version(first.version)
    assert version.by == "tuner"
    assert version.changed == {SIZE: first.new["batch_size"]}
    assert first.rationale in version.why
    assert "batches are full" in version.why or "engines keep up" in version.why or "serve up to" in version.why
    assert rest[0].outcome == "kept"
    assert installed.in_effect.optimization.batcher.max_batch_size >= 16
    assert installed.tuner.get_tuning_history()[-1] == first
    assert "m on onnx (simulated)" in first.place


def test_given_a_control_worker_that_dies_then_another_goes_on_from_what_it_left(installed: Installation) -> None:
    installed.go(3, LOW)
    [event] = installed.go(1, HIGH)
    assert event.outcome == "raised"
    installed.tuner = installed.another_tuner()
    assert installed.go(2, HIGH)[0].outcome == "kept"


def test_given_two_control_workers_at_once_then_each_step_is_made_once(installed: Installation) -> None:
    installed.go(3, LOW)
    other = installed.another_tuner()
    events = installed.go(1, HIGH)
    assert len(events) == 1
    assert other.run() == []
    assert installed.versions.current_number() == 1


@pytest.mark.property(49)
def test_given_tuning_that_is_off_then_the_static_configuration_holds_exactly(clean_redis: OwnRedis) -> None:
    """Property 49."""
    installed = Installation(clean_redis, enabled=False)
    assert installed.go(2, LOW) + installed.go(4, HIGH) == []
    assert installed.versions.current_number() == 0
    assert not clean_redis.client.keys("muai:tuner:*")
    assert installed.in_effect == installed.settings


@pytest.mark.property(49)
def test_given_tuning_that_is_switched_off_at_run_time_then_what_it_set_is_unset_and_others_changes_stay(
    installed: Installation,
) -> None:
    """Property 49."""
    installed.editor.set({"optimization.batcher.min_batch_size": 2}, by="ada")
    installed.go(3, LOW)
    installed.go(2, HIGH)
    assert SIZE in installed.versions.current().overrides
    installed.editor.set({"optimization.tuner.enabled": False}, by="ada", why="enough")
    installed.now_s += 5.0
    [event] = installed.tuner.run()
    assert event.outcome == "stood_down"
    kept = {"optimization.batcher.min_batch_size": 2, "optimization.tuner.enabled": False}
    assert installed.versions.current().overrides == kept
    assert installed.tuner.run() == []
    installed.editor.unset(["optimization.tuner.enabled"], by="ada")
    assert "recalled" in [event.outcome for event in installed.go(3, HIGH)], "it remembers what it learnt"


@pytest.mark.property(49)
def test_given_monitoring_that_is_off_after_a_restart_then_what_was_tuned_is_given_back(
    installed: Installation,
) -> None:
    """Property 49: without figures there is no tuning, and nothing of it stays."""
    installed.go(3, LOW)
    installed.go(2, HIGH)
    assert SIZE in installed.versions.current().overrides
    document = installed.document() | {"monitoring": {"enabled": False}}
    installed.settings = build_settings(document, {})
    installed.tuner = installed.another_tuner()
    assert [event.outcome for event in installed.tuner.run()] == ["stood_down"]
    assert installed.versions.current().overrides == {}


@pytest.mark.property(49)
def test_given_one_parameter_that_is_tuned_no_more_then_it_alone_goes_back(installed: Installation) -> None:
    """Property 49, of a part of tuning."""
    installed.go(3, LOW)
    installed.go(2, HIGH)
    installed.editor.set({"optimization.tuner.enable_batch_size_tuning": False}, by="ada")
    installed.now_s += 5.0
    [event] = installed.tuner.run()
    assert (event.outcome, set(event.old)) == ("stood_down", {"batch_size"})
    assert installed.versions.current().overrides == {"optimization.tuner.enable_batch_size_tuning": False}
    left = {event.outcome for event in installed.go(4, HIGH)}
    assert left <= {"advised"}, "adaptive batching leaves nothing else to tune"


@pytest.mark.property(49)
def test_given_a_value_that_an_operator_had_set_then_switching_off_goes_back_to_it(installed: Installation) -> None:
    """Property 49."""
    installed.editor.set({SIZE: 6}, by="ada")
    installed.go(3, LOW)
    installed.go(1, HIGH)
    assert installed.versions.current().overrides[SIZE] > 6
    installed.editor.set({"optimization.tuner.enabled": False}, by="ada")
    installed.tuner.run()
    assert installed.versions.current().overrides[SIZE] == 6


def test_given_an_open_alert_then_the_trial_is_taken_back_between_two_intervals(installed: Installation) -> None:
    installed.go(3, LOW)
    installed.go(1, HIGH)
    detector = AnomalyDetector(installed.settings, installed.store, installed.monitor, wall_s=lambda: installed.now_s)
    failed = Finding(type="gpu_failure", subject="0 of host", severity="critical", message="GPU 0 of host: gone")
    detector.alerts.report(failed, keep_s=1e9)
    detector._commit([failed], installed.now_s)
    assert [alert.alert_type for alert in detector.alerts.open()] == ["gpu_failure"]
    installed.now_s += 5.0
    events = installed.tuner.run()
    assert [event.outcome for event in events] == ["rolled_back"], events
    [event] = events
    assert "GPU 0 of host: gone" in event.rationale
    assert installed.in_effect.optimization.batcher.max_batch_size == 4
    assert installed.versions.current().overrides == {}, "back to what the file says, not to an override of the same"
    assert installed.go(2, HIGH) == []
    installed.editor.set({"optimization.tuner.allowed_alerts": ["gpu_failure"]}, by="ada")
    assert [event.outcome for event in installed.go(2, HIGH)] == ["raised"], "unless it is allowed"


def test_given_a_change_of_other_settings_meanwhile_then_both_hold(
    installed: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.go(3, LOW)
    commit = installed.tuner.memory.commit

    def commit_late(*args: Any, **more: Any) -> bytes | None:
        if installed.versions.current_number() == 0:
            installed.editor.set({"queue.tenant_max_requests": 500}, by="ada")
        return commit(*args, **more)

    monkeypatch.setattr(installed.tuner.memory, "commit", commit_late)
    [event] = installed.go(1, HIGH)
    current = installed.versions.current()
    assert current.overrides == {"queue.tenant_max_requests": 500, SIZE: event.new["batch_size"]}


def test_given_a_question_then_the_recommendation_is_told_and_applied_only_when_asked(clean_redis: OwnRedis) -> None:
    installed = Installation(clean_redis, enabled=False)
    installed.go(2, HIGH)
    advised = installed.tuner.analyze_performance()
    assert advised.batch_size is not None
    assert advised.batch_size > 4
    assert "of requests are not answered within 500 ms" in advised.rationale
    assert "enable_quantization" in advised.quantization
    assert installed.versions.current_number() == 0
    version = installed.tuner.apply_tuning(advised)
    assert (version.changed, version.why) == ({SIZE: advised.batch_size}, advised.rationale)
    assert installed.tuner.apply_tuning(TuningRecommendations()) == version, "nothing recommended is no change"


def test_given_decisions_then_muai_tuning_tells_them(installed: Installation, tmp_path: Any) -> None:
    file = tmp_path / "muai.yaml"
    file.write_text(json.dumps(installed.document()), encoding="utf-8")
    env = {"MUAI_CONFIG": str(file), "COLUMNS": "220"}

    def told(*words: str) -> str:
        result = CliRunner(env=env).invoke(muai, ["tuning", *words])
        assert result.exit_code == 0, result.output
        return result.output

    assert "nothing was ever tuned" in told("history")
    installed.go(3, LOW)
    events = installed.go(3, HIGH)
    assert events
    assert "raised" in told("history")
    assert "batch_size 4 →" in told("history")
    lines = [json.loads(line) for line in told("history", "--json").splitlines()]
    assert [line["rationale"] for line in lines] == [event.rationale for event in reversed(events)]
    status = told("status")
    assert "the tuner is on" in status
    assert "it tunes for m on onnx (simulated)" in status
    assert "learnt for m on onnx (simulated) at about" in status
    assert json.loads(told("status", "--json"))["enabled"] is True
    assert "forgot what was learnt of" in told("forget")
    assert "learnt for" not in told("status")
