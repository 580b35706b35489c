"""Health and readiness as verdicts on a picture of the installation."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from muai_config import Settings, build_settings
from muai_producers.fleet import CollectorRecord, FleetView, WorkerRecord
from muai_producers.gateway.health import Observer, Picture, health, readiness
from muai_producers.runtime_config.versions import Applied

COLLECTOR = CollectorRecord(name="c1")
WORKER = WorkerRecord(name="w1", engine="onnx", slots=1, models_loaded=("m",))


@pytest.fixture
def settings() -> Settings:
    return build_settings(
        {
            "monitoring": {"server": {"queue_capacity": 10, "preload_models": ["m"]}},
            "models": {"m": {"task": "embedding", "source": "hub:none", "engines": ["onnx", "pytorch"]}},
        },
        {},
    )


def picture(*, state: str | None = None, broker: str | None = None, in_flight: int = 0, **fleet: Any) -> Picture:
    view = FleetView(**{"workers": (WORKER,), "collectors": (COLLECTOR,), **fleet})
    return Picture(state, broker, view, in_flight)


def test_given_all_is_there_then_healthy_and_ready(settings: Settings) -> None:
    verdict = health(picture(in_flight=3), settings, uptime_s=1.23456, draining=False)
    assert verdict.status == "healthy"
    assert verdict.reasons == []
    assert verdict.uptime_seconds == 1.235
    assert (verdict.models_loaded, verdict.engines_available) == (["m"], ["onnx"])
    assert (verdict.queue_size, verdict.queue_capacity) == (3, 10)
    ready = readiness(picture(), settings, draining=False)
    assert ready.ready
    assert ready.reasons == []


@pytest.mark.parametrize(
    ("given", "reason", "is_ready"),
    [
        ({"collectors": ()}, "no collector is running", False),
        ({"workers": ()}, "no engine worker serves m", False),
        ({"workers": (WorkerRecord(name="w", engine="vllm", slots=1),)}, "no engine worker serves m", False),
        ({"workers": (WorkerRecord(name="w", engine="pytorch", slots=1),)}, "no worker has m loaded", True),
        ({"cooling": {("onnx", "m"): "why"}}, "onnx failed with m", True),
        ({"in_flight": 9}, "nearly full: 9 of 10", True),
    ],
)
def test_given_something_amiss_then_degraded_with_the_reason(
    settings: Settings, given: dict[str, Any], reason: str, is_ready: bool
) -> None:
    verdict = health(picture(**given), settings, uptime_s=1.0, draining=False)
    assert verdict.status == "degraded"
    assert [told for told in verdict.reasons if told.startswith(reason)]
    ready = readiness(picture(**given), settings, draining=False)
    assert ready.ready is is_ready
    assert bool(ready.reasons) is not is_ready


@pytest.mark.parametrize("what", ["state", "broker"])
def test_given_broker_or_state_store_is_away_then_unhealthy_and_not_ready(settings: Settings, what: str) -> None:
    given = picture(**{what: "TimeoutError"})
    verdict = health(given, settings, uptime_s=1.0, draining=False)
    assert verdict.status == "unhealthy"
    assert len(verdict.reasons) == 1
    assert "TimeoutError" in verdict.reasons[0]
    ready = readiness(given, settings, draining=False)
    assert not ready.ready
    assert ready.checks["broker" if what == "broker" else "state_store"] is False


def test_given_the_gateway_stops_then_it_is_not_ready_though_all_is_there(settings: Settings) -> None:
    assert not readiness(picture(), settings, draining=True).ready
    assert health(picture(), settings, uptime_s=1.0, draining=True).status == "degraded"


def test_given_a_broker_apart_from_the_state_store_then_each_is_asked_for_itself() -> None:
    settings = build_settings(
        {"queue": {"broker_url": "amqp://127.0.0.1:1//", "redis_url": "redis://127.0.0.1:1/0"}}, {}
    )
    with ThreadPoolExecutor(1) as executor:
        observer = Observer(settings, executor)
        seen = observer.look()
        observer.close()
    assert (seen.state_error, seen.broker_error) == ("ConnectionError", "ConnectionRefusedError")


def test_given_processes_that_could_not_apply_a_version_then_health_names_them_with_the_reason(
    settings: Settings,
) -> None:
    refusals = tuple(Applied(process=f"p{n}", version=2, wanted=3, error="no room") for n in range(12))
    given = dataclasses.replace(picture(), refusals=refusals)
    verdict = health(given, settings, uptime_s=1.0, draining=False)
    assert verdict.status == "degraded"
    assert len(verdict.reasons) == 11
    assert verdict.reasons[0].startswith("p0 keeps version 2 ")
    assert verdict.reasons[0].endswith("cannot apply version 3: no room")
    assert verdict.reasons[-1] == "and 2 processes more"
    assert readiness(given, settings, draining=False).ready, "it works on by what it had"
