"""The specification's properties 29 to 33, against the performance data as they are kept in Redis."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.transport_support import OwnRedis

from muai_config import Settings, build_settings
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.recorder import StoreRecorder
from muai_producers.performance.series import Host, Series
from muai_producers.performance.store import PerformanceStore
from muai_producers.store import Store
from muai_producers.wire import Batch, InferenceRequest
from muai_workers.engines.fake import FakeEngine
from muai_workers.execution import BatchRunner, WorkerIdentity

pytestmark = pytest.mark.redis
SOME = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NOW_S = 1_790_000_003.0
DAY_S = 86_400
PREFIXES = (f"perf-{number}" for number in itertools.count())
latencies = st.floats(min_value=0.01, max_value=600_000, allow_nan=False)
names = st.sampled_from(["minilm", "bert", "gpt"])
engines = st.sampled_from(["onnx", "pytorch", "vllm"])


class Fleet:
    """Two processes that record, and one that asks, at a time of the test's own."""

    def __init__(self, server: OwnRedis) -> None:
        self.now_s = NOW_S
        self.store = Store(server.client, prefix=next(PREFIXES))
        self.recorders = [self._recorder(), self._recorder()]
        self.monitor = PerformanceMonitor(self.store, 7 * DAY_S, self.recorders[0], lambda: self.now_s)

    def _recorder(self) -> StoreRecorder:
        return StoreRecorder(PerformanceStore(self.store, 7 * DAY_S), lambda: self.now_s)

    def flush(self) -> None:
        for recorder in self.recorders:
            recorder.flush()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: Any) -> None:
        for recorder in self.recorders:
            recorder.close()


def config() -> Settings:
    models = {"noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}}
    return build_settings({"models": models}, {})


@pytest.mark.property(29)
@SOME
@given(kinds=st.lists(st.sampled_from(["fine", "BAD"]), min_size=1, max_size=12))
def test_given_any_requests_that_a_worker_ends_then_the_latency_of_each_is_recorded(
    clean_redis: OwnRedis, kinds: list[str]
) -> None:
    with Fleet(clean_redis) as fleet:
        runner = BatchRunner(
            config(),
            FakeEngine(),
            fleet.store,
            WorkerIdentity("w1"),
            statistics=fleet.recorders[1],
            wall_s=lambda: fleet.now_s,
        )
        requests = [
            InferenceRequest(
                id=f"{fleet.store.keys.prefix}-{number}",
                model="noop",
                task="text-classification",
                inputs={"text": kind},
                submitted_at=NOW_S - 2.0,
            )
            for number, kind in enumerate(kinds)
        ]
        runner.run(
            Batch(
                id=fleet.store.keys.prefix,
                engine="fake",
                model="noop",
                task="text-classification",
                requests=requests,
                chain=(),
                formed_at=NOW_S - 0.5,
                received_at=tuple(NOW_S - 1.0 for _ in requests),
            )
        )
        runner.close()
        report = fleet.monitor.report(60)
    bad = kinds.count("BAD")
    assert report.total.requests == len(kinds)
    assert report.total.latency["total"].count == len(kinds)
    assert report.total.latency["total"].p50_ms == pytest.approx(2000, rel=0.01)
    assert report.total.errors == ({"invalid_request": bad} if bad else {})
    if bad < len(kinds):
        assert report.total.latency["queue"].p50_ms == pytest.approx(1000, rel=0.01)
        assert report.total.latency["batching"].p50_ms == pytest.approx(500, rel=0.01)


@pytest.mark.property(30)
@SOME
@given(runs=st.lists(st.tuples(names, engines, latencies), min_size=1, max_size=60))
def test_given_any_runs_then_inference_times_are_told_by_model_and_engine(
    clean_redis: OwnRedis, runs: list[tuple[str, str, float]]
) -> None:
    with Fleet(clean_redis) as fleet:
        for number, (model, engine, inference_ms) in enumerate(runs):
            recorder = fleet.recorders[number % 2]
            recorder.served(Series(model, engine, "embedding"), [(1.0,)] * 3 + [(inference_ms,), (inference_ms + 3,)])
        fleet.flush()
        report = fleet.monitor.report(60)
        for model, engine in {(model, engine) for model, engine, _ in runs}:
            own = sorted(ms for one, other, ms in runs if (one, other) == (model, engine))
            [series] = [one for one in report.series if (one.model, one.engine) == (model, engine)]
            assert series.latency["inference"].count == len(own)
            assert series.latency["inference"].max_ms == pytest.approx(own[-1], rel=0.0101)
            asked = fleet.monitor.get_percentiles("inference", 60, model=model, engine=engine)
            assert asked["p50"] == pytest.approx(own[(len(own) - 1) // 2], rel=0.0101)
        assert sum(one.latency["inference"].count for one in report.models) == len(runs)


@pytest.mark.property(31)
@SOME
@given(ages_s=st.lists(st.integers(0, 5400), min_size=1, max_size=80), window_s=st.integers(10, 7200))
def test_given_any_window_then_throughput_is_what_ended_in_it(
    clean_redis: OwnRedis, ages_s: list[int], window_s: int
) -> None:
    with Fleet(clean_redis) as fleet:
        for age_s in sorted(ages_s, reverse=True):
            fleet.now_s = NOW_S - age_s
            fleet.recorders[age_s % 2].served(Series("m", "onnx", "embedding"), ((1.0,),) * 5)
            fleet.flush()
        fleet.now_s = NOW_S
        before = fleet.monitor.report(window_s)
        fleet.monitor.data.roll_up(NOW_S)
        after = fleet.monitor.report(window_s)
        for report in (before, after):
            inside = sum(NOW_S - age_s >= report.from_s for age_s in ages_s)
            assert report.total.requests == inside, "what is made coarser counts once, as before"
            assert report.from_s <= NOW_S - window_s
            assert NOW_S - window_s - report.from_s < 600
        expected = after.total.requests / (NOW_S - after.from_s)
        assert fleet.monitor.get_throughput(window_s) == pytest.approx(expected, abs=1e-4)


@pytest.mark.property(32)
@SOME
@given(samples=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=29))
def test_given_any_samples_then_cpu_memory_and_gpus_of_each_host_are_told_over_time(
    clean_redis: OwnRedis, samples: list[tuple[float, float, float]]
) -> None:
    with Fleet(clean_redis) as fleet:
        for number, (cpu, memory, gpu) in enumerate(samples):
            fleet.now_s = NOW_S - 10 * (len(samples) - 1 - number)
            for host, recorder in zip(("a", "b"), fleet.recorders, strict=True):
                recorder.used(Host(host).member, {"cpu": cpu, "memory": memory, "gpu0.memory": gpu})
            fleet.flush()
        trends = fleet.monitor.get_resource_trends(300)
    for place, resource in enumerate(("cpu", "memory", "gpu0.memory")):
        values = [sample[place] for sample in samples]
        assert set(trends.of(resource)) == {"a", "b"}
        for trend in trends.of(resource).values():
            assert [point.mean_percent for point in trend.points] == [
                pytest.approx(value, abs=0.51) for value in values
            ]
            assert trend.latest_percent == pytest.approx(values[-1], abs=0.51)
            assert trend.max_percent == pytest.approx(max(values), abs=0.51)


@pytest.mark.property(33)
@SOME
@given(values=st.lists(latencies, min_size=1, max_size=400))
def test_given_any_measurements_of_two_processes_then_percentiles_are_within_one_percent(
    clean_redis: OwnRedis, values: list[float]
) -> None:
    with Fleet(clean_redis) as fleet:
        for number, value_ms in enumerate(values):
            fleet.recorders[number % 2].timed(Series("", "", ""), "step", value_ms)
        fleet.flush()
        asked = fleet.monitor.get_percentiles("step", 60)
    ordered = sorted(values)
    for name, rank in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert asked[name] == pytest.approx(ordered[int(rank * (len(ordered) - 1))], rel=0.01001)
