"""The specification's properties 15 to 18, 44 and 59: what is counted is shown, and counting never hurts."""

from __future__ import annotations

import math
import socket
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.transport_support import wait_until

from muai_config import ModelSpec, Settings, build_settings
from muai_producers.errors import MuaiError
from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import Standings, standings
from muai_producers.monitoring.instruments import INSTRUMENTS, Instrument
from muai_producers.monitoring.recorder import Labels, Recorder, Series
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.gpus.simulated import SimulatedGpu, SimulatedNvml, SimulatedState
from muai_workers.monitoring.exporter import PrometheusExporter
from muai_workers.monitoring.families import families
from muai_workers.monitoring.machine import GpuReading, MachineWatch, NvmlGpus
from muai_workers.monitoring.models import ModelWatch
from muai_workers.optimization_manager import OptimizationManager

LABEL = st.text(max_size=20)
AMOUNT = st.floats(min_value=0.001, max_value=1e9)


def a_model(name: str = "m") -> ModelSpec:
    return ModelSpec.model_validate(
        {"name": name, "task": "text-classification", "source": "hub:none", "engines": ["fake"]}
    )


def some_settings() -> Settings:
    model = {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}
    return build_settings({"models": {"m": model}}, {})


def values_of(metrics: Iterable[Metric]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {(sample.name, frozenset(sample.labels.items())): sample.value for one in metrics for sample in one.samples}


def total(exporter: PrometheusExporter, name: str, **labels: str) -> float:
    found = values_of(exporter.collect())
    return sum(value for (own, given), value in found.items() if own == name and labels.items() <= dict(given).items())


# Property 15: Inference metrics are recorded
@pytest.mark.property(15)
@settings(max_examples=50, deadline=None)
@given(batches=st.lists(st.lists(st.sampled_from(["fine", "BAD", "POISON"]), min_size=1, max_size=5), max_size=6))
def test_given_any_inferences_then_latency_and_throughput_of_each_that_completed_are_recorded(
    batches: list[list[str]],
) -> None:
    recorder = Recorder()
    exporter = PrometheusExporter(0, source=recorder)
    manager = OptimizationManager(some_settings(), engines={"fake": FakeEngine()}, recorder=recorder)
    list(exporter.collect())
    answers = [answer for texts in batches for answer in manager.infer_many("m", [{"text": text} for text in texts])]
    manager.close()
    served = sum(not isinstance(answer, MuaiError) for answer in answers)
    throughput = total(exporter, "throughput_requests_per_second", model="m")
    assert (throughput > 0) == (served > 0)
    assert total(exporter, "inference_latency_seconds_count", model="m", engine="fake") == served
    assert total(exporter, "inference_requests_total", status="success") == served
    assert total(exporter, "inference_requests_total") == len(answers)


@pytest.mark.property(15)
@settings(max_examples=50)
@given(latencies_ms=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), rate=st.floats(0, 1e6))
def test_given_what_the_specifications_methods_are_told_then_the_page_says_it(
    latencies_ms: list[float], rate: float
) -> None:
    exporter = PrometheusExporter(0)
    for latency_ms in latencies_ms:
        exporter.record_inference_latency("m", "onnx", latency_ms)
    exporter.record_throughput("m", rate)
    assert total(exporter, "inference_latency_seconds_count", model="m", engine="onnx") == len(latencies_ms)
    assert math.isclose(total(exporter, "inference_latency_seconds_sum"), sum(latencies_ms) / 1000, abs_tol=1e-9)
    assert total(exporter, "throughput_requests_per_second", model="m") == rate


# Property 16: Model lifecycle events are recorded
@pytest.mark.property(16)
@settings(max_examples=100)
@given(asked=st.lists(st.tuples(st.sampled_from(["load", "unload"]), st.sampled_from("abx")), max_size=20))
def test_given_any_loads_and_unloads_then_each_that_happened_is_recorded_once(asked: list[tuple[str, str]]) -> None:
    recorder = Recorder()
    engine = FakeEngine(FakeOptions(fail_to_load=("x",)))
    watch = ModelWatch(engine, recorder)
    happened: Counter[tuple[str, str]] = Counter()
    for what, name in asked:
        before = name in engine.loaded()
        if what == "load":
            try:
                engine.load(a_model(name))
                happened[name, "load"] += not before
            except MuaiError:
                happened[name, "load_failed"] += 1
        else:
            engine.unload(name)
            happened[name, "unload"] += before
    happened.update((name, "unload") for name in engine.loaded())
    engine.close()
    watch.close()
    counters = recorder.take().counters
    events = instruments.MODEL_EVENTS.name
    assert counters == {(events, (name, "fake", event)): n for (name, event), n in happened.items() if n}


# Property 17: Resource metrics are continuously recorded
@pytest.mark.property(17)
@settings(max_examples=30, deadline=None)
@given(periods=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=8))
def test_given_any_periods_then_each_has_the_memory_of_the_gpu_and_the_use_of_the_cpu(periods: list[int]) -> None:
    recorder, memory = Recorder(), [0]

    class Changing:
        def read(self) -> Sequence[GpuReading]:
            return [GpuReading(gpu_id="0", memory_used_bytes=memory[0])]

    watch = MachineWatch(recorder, Changing())
    exporter = PrometheusExporter(0, source=recorder)
    for used in periods:
        memory[0] = used
        assert total(exporter, "gpu_memory_used_bytes", gpu_id="0") == used
        assert 0 <= total(exporter, "cpu_usage_percent", host=socket.gethostname()) <= 100
    watch.close()
    exporter.record_resource_usage(512.0, 34.5)
    assert total(exporter, "gpu_memory_used_bytes", gpu_id="0") == 512 * 1024 * 1024
    assert total(exporter, "cpu_usage_percent") == 34.5


# Property 18: Metrics are exposed in Prometheus format
@st.composite
def recordings(draw: st.DrawFn) -> list[tuple[Instrument, Labels, float]]:
    chosen = draw(st.lists(st.sampled_from(INSTRUMENTS), max_size=12))
    return [(one, tuple(draw(LABEL) for _ in one.labels), draw(AMOUNT)) for one in chosen]


@pytest.mark.property(18)
@settings(max_examples=30, deadline=None)
@given(recorded=recordings())
def test_given_anything_that_was_recorded_then_the_page_is_valid_and_says_it(
    recorded: list[tuple[Instrument, Labels, float]],
) -> None:
    recorder, shown = Recorder(), set[str]()
    for instrument, labels, value in recorded:
        shown.add(instrument.name)
        if instrument.kind == "counter":
            recorder.count(instrument, *labels, by=value)
        elif instrument.kind == "histogram":
            recorder.observe(instrument, *labels, values=[value])
        else:
            recorder.set(instrument, *labels, value=value)
    exporter = PrometheusExporter(0, "127.0.0.1", "/page", source=recorder)
    exporter.start_server()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/page", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            text = answer.read().decode()
    finally:
        exporter.stop_server()
    parsed = {one.name: one for one in text_string_to_metric_families(text)}
    for name in shown:
        instrument = instruments.BY_NAME[name]
        family = parsed[name.removesuffix("_total") if instrument.kind == "counter" else name]
        assert family.type == instrument.kind
        assert family.documentation == instrument.help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} <= set(instrument.labels)
            assert sample.value >= 0


# Property 44: Per-GPU metrics are exposed
@pytest.mark.property(44)
@settings(max_examples=50, deadline=None)
@given(gpus=st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 100)), min_size=1, max_size=16))
def test_given_any_gpus_then_memory_and_utilisation_of_each_are_exposed(gpus: list[tuple[int, int]]) -> None:
    recorder = Recorder()
    simulated = [
        SimulatedGpu(uuid=f"GPU-{number}", memory_used_bytes=used, utilization_percent=percent)
        for number, (used, percent) in enumerate(gpus)
    ]
    state = msgspec.json.encode(SimulatedState(gpus=tuple(simulated)))
    watch = MachineWatch(recorder, NvmlGpus(SimulatedNvml(lambda: state)))
    exporter = PrometheusExporter(0, source=recorder)
    for number, (used, percent) in enumerate(gpus):
        assert total(exporter, "gpu_memory_used_bytes", gpu_id=str(number)) == used
        assert total(exporter, "muai_gpu_utilization_ratio", gpu_id=str(number)) == percent / 100
    watch.close()


# Property 59: Monitoring failures don't block requests
class _Forgetful(set[Series]):
    def __contains__(self, series: object) -> bool:
        return False


class BrokenNowAndThen(Recorder):
    """A recorder whose innermost step fails as it is told to."""

    def __init__(self, failures: Sequence[bool]) -> None:
        super().__init__()
        self._plan = iter(failures)
        self.failed = 0

        self._known = _Forgetful()  # so that each series is admitted anew, and each may fail

    def _admitted(self, instrument: Instrument, labels: Labels) -> Series:
        if next(self._plan, False):
            self.failed += 1
            raise RuntimeError("the recorder is broken")
        return instrument.name, labels


@pytest.mark.property(59)
@settings(max_examples=50, deadline=None)
@given(failures=st.lists(st.booleans(), max_size=60), texts=st.lists(st.sampled_from(["a", "b", "BAD"]), max_size=6))
def test_given_metrics_that_fail_at_any_point_then_every_request_is_answered_as_ever(
    failures: list[bool], texts: list[str]
) -> None:
    inputs = [{"text": text} for text in texts]
    recorder = BrokenNowAndThen(failures)
    before = standings.failures().get("metrics", 0)
    with_broken = OptimizationManager(some_settings(), engines={"fake": FakeEngine()}, recorder=recorder)
    whole = OptimizationManager(some_settings(), engines={"fake": FakeEngine()}, recorder=Recorder())
    told, expected = with_broken.infer_many("m", inputs), whole.infer_many("m", inputs)
    with_broken.close()
    whole.close()
    assert [getattr(one, "outputs", type(one)) for one in told] == [
        getattr(one, "outputs", type(one)) for one in expected
    ]
    assert standings.failures().get("metrics", 0) - before == recorder.failed


@pytest.mark.property(59)
def test_given_a_port_that_is_taken_then_it_is_said_and_served_once_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muai_workers.monitoring.page.TRY_AGAIN_S", 0.02)
    own = Standings()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        exporter = PrometheusExporter(taken.getsockname()[1], "127.0.0.1", own_standings=own)
        exporter.start_server()
        exporter.record_inference_latency("m", "onnx", 5.0)
        assert not exporter.is_served
        assert str(exporter.port) in own.degraded()["metrics"]
    wait_until(lambda: exporter.is_served, what="the page")
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5) as answer:
        assert b'inference_latency_seconds_count{engine="onnx",model="m"} 1.0' in answer.read()
    exporter.stop_server()
    assert own.degraded() == {}


def test_given_no_recordings_then_the_page_has_no_series() -> None:
    assert list(families(Recorder().take(), {})) == []
