"""Which models stay in memory: bytes, counts, those in use, those that are kept; and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import models

from muai_config import ModelSpec, Settings
from muai_producers.errors import ModelLoadError, OutOfMemoryError
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.gpus.simulated import SimulatedGpu, SimulatedNvml, SimulatedState
from muai_workers.model_manager import ModelManager
from muai_workers.models.memory import GpuMemory, ProcessMemory
from muai_workers.models.residency import Limits, Resident, believed_bytes, make_room

LIMIT_S = 20.0
NAMES = ("a", "b", "c", "d")


def spec(name: str, **fields: object) -> ModelSpec:
    return models.model_spec(name, "text-generation", "folder:/nowhere", **fields)


def catalog(max_memory_mb: int | None = None, max_cached: int | None = None, **fields: dict[str, object]) -> Settings:
    """Settings with the models a to d; `fields` are those of the models."""
    chosen = models.settings([spec(name, **fields.get(name, {})) for name in NAMES])
    limits = {"max_memory_mb": max_memory_mb, "max_cached": max_cached}
    return chosen.model_copy(update={"model_cache": chosen.model_cache.model_copy(update=limits)})


class SumMeter:
    """What the models of an engine take, by their sizes."""

    def __init__(self, size_mb: dict[str, float]) -> None:
        self.size_mb = size_mb
        self.engine: FakeEngine | None = None

    def used_bytes(self) -> int:
        assert self.engine is not None
        return sum(int(self.size_mb[name] * 1_000_000) for name in self.engine.loaded())


class SizedEngine(FakeEngine):
    """An engine whose models take nothing, and are said to take something."""

    def __init__(self, estimated_mb: dict[str, float]) -> None:
        super().__init__()
        self.estimated_mb = estimated_mb
        self.on_load = lambda _: None

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        return int(self.estimated_mb[spec.name] * 1_000_000)

    def load(self, spec: ModelSpec) -> None:
        self.on_load(spec.name)
        with self._lock:
            self.loads += spec.name not in self._models
            self._models[spec.name] = b""


def manager(
    chosen: Settings, estimated_mb: dict[str, float], real_mb: dict[str, float] | None = None, wait_s: float = LIMIT_S
) -> tuple[ModelManager, SizedEngine]:
    engine, meter = SizedEngine(estimated_mb), SumMeter(real_mb or estimated_mb)
    meter.engine = engine
    return ModelManager(chosen, engine, meter, wait_s), engine


def test_given_a_budget_then_the_least_recently_used_goes_before_the_next_is_loaded() -> None:
    sizes = {"a": 40.0, "b": 40.0, "c": 40.0, "d": 10.0}
    held, engine = manager(catalog(max_memory_mb=100), sizes)
    seen: list[float] = []
    engine.on_load = lambda name: seen.append(sum(sizes[one] for one in (*engine.loaded(), name)))
    for name in ("a", "b", "a", "c", "d"):
        held.load_model(name)
    assert held.loaded_models() == ("a", "c", "d")
    assert held.memory_bytes() == {"a": 40_000_000, "c": 40_000_000, "d": 10_000_000}
    assert max(seen) <= 100.0


def test_given_a_model_that_is_larger_than_estimated_then_others_go_once_it_is_measured() -> None:
    estimated = dict.fromkeys(NAMES, 10.0)
    held, engine = manager(catalog(max_memory_mb=100), estimated, {"a": 30.0, "b": 30.0, "c": 90.0, "d": 200.0})
    for name in ("a", "b", "c"):
        held.load_model(name)
    assert engine.loaded() == ("c",)
    with pytest.raises(ModelLoadError, match=r"d takes 200 MB, and models.max_memory_mb is 100"):
        held.load_model("d")
    assert "d" not in engine.loaded()


def test_given_a_model_to_be_kept_then_it_never_goes_and_what_does_not_fit_beside_it_is_refused() -> None:
    held, _ = manager(catalog(max_memory_mb=100, a={"keep_loaded": True}), {"a": 60.0, "b": 30.0, "c": 35.0, "d": 50.0})
    for name in ("a", "b", "c", "b"):
        held.load_model(name)
    assert set(held.loaded_models()) == {"a", "b"}
    with pytest.raises(ModelLoadError, match="beside a, which keep_loaded keeps: raise it"):
        held.load_model("d")
    assert set(held.loaded_models()) == {"a", "b"}, "nothing goes for what cannot come"


def test_given_models_in_use_then_the_next_waits_for_room_and_in_the_end_is_refused() -> None:
    sizes = dict.fromkeys(NAMES, 60.0)
    held, _ = manager(catalog(max_memory_mb=100), sizes)
    with ThreadPoolExecutor(1) as threads:
        with held.keeping("a"):
            waiting = threads.submit(held.load_model, "b")
            assert held.loaded_models() == ("a",)
        waiting.result(LIMIT_S)
    assert held.loaded_models() == ("b",)
    impatient, _ = manager(catalog(max_memory_mb=100), sizes, wait_s=0.05)
    with impatient.keeping("a"), pytest.raises(OutOfMemoryError, match="a had been in use"):
        impatient.load_model("b")


def test_given_many_requests_at_once_then_a_model_is_loaded_once() -> None:
    held, engine = manager(catalog(), dict.fromkeys(NAMES, 1.0))
    begun, go_on = threading.Event(), threading.Event()

    def slowly(_: str) -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)

    engine.on_load = slowly
    with ThreadPoolExecutor(8) as threads:
        loads = [threads.submit(held.load_model, "a") for _ in range(8)]
        assert begun.wait(LIMIT_S)
        engine.on_load = lambda _: None
        held.load_model("b")  # another model's request waits for none of them
        assert not any(one.done() for one in loads)
        assert held.loading_models() == ("a",)
        go_on.set()
        for one in loads:
            one.result(LIMIT_S)
    assert engine.loads == 2


def test_given_a_load_that_fails_then_the_next_that_waits_tries_itself() -> None:
    held, engine = manager(catalog(max_memory_mb=100), dict.fromkeys(NAMES, 60.0))
    events: list[str] = []
    held.on_lifecycle(lambda event, *_: events.append(event))
    failures: Iterator[bool] = iter([True])

    def fail_once(_: str) -> None:
        if next(failures, False):
            raise ModelLoadError("no")

    engine.on_load = fail_once
    with pytest.raises(ModelLoadError):
        held.load_model("a")
    held.load_model("b")
    assert held.loaded_models() == ("b",), "what failed to load takes no room"
    assert events == ["loading", "failed", "loading", "loaded"]


def test_given_a_limit_of_batches_then_no_more_of_the_model_run_at_once_and_others_do() -> None:
    held, _ = manager(catalog(a={"max_concurrency": 2}), dict.fromkeys(NAMES, 1.0))
    running, most, lock, go_on = [0], [0], threading.Lock(), threading.Semaphore(0)

    def run(name: str) -> None:
        with held.keeping(name):
            with lock:
                running[0] += name == "a"
                most[0] = max(most[0], running[0])
            assert go_on.acquire(timeout=LIMIT_S)
            with lock:
                running[0] -= name == "a"

    with ThreadPoolExecutor(8) as threads:
        runs = [threads.submit(run, "a") for _ in range(6)]
        other = threads.submit(run, "b")
        for _ in range(7):
            go_on.release()
        for one in (*runs, other):
            one.result(LIMIT_S)
    assert most[0] == 2


def test_given_an_engine_that_let_go_of_a_model_then_it_is_loaded_again() -> None:
    held, engine = manager(catalog(), dict.fromkeys(NAMES, 1.0))
    held.load_model("a")
    engine.unload("a")
    held.load_model("a")
    assert engine.loads == 2


def test_given_memory_that_ran_out_then_what_nobody_uses_goes() -> None:
    held, engine = manager(catalog(b={"keep_loaded": True}), dict.fromkeys(NAMES, 1.0))
    for name in ("a", "b", "c"):
        held.load_model(name)
    with held.keeping("c"):
        held.relieve()
        assert set(engine.loaded()) == {"b", "c"}


def test_given_a_listener_that_raises_then_the_model_is_loaded_nevertheless() -> None:
    held, _ = manager(catalog(), dict.fromkeys(NAMES, 1.0))
    held.on_lifecycle(lambda *_: 1 / 0)
    held.load_model("a")
    assert held.loaded_models() == ("a",)


def test_given_real_memory_then_what_is_measured_is_what_the_models_take() -> None:
    sizes = {"a": 60.0, "b": 50.0, "c": 70.0, "d": 45.0}
    meter = ProcessMemory()
    before = meter.used_bytes()
    assert before is not None
    held = ModelManager(catalog(max_memory_mb=150), FakeEngine(FakeOptions(model_mb=sizes)), meter)
    for name in ("a", "b", "c", "a", "d"):
        held.load_model(name)
        told = held.memory_bytes()
        assert told[name] == pytest.approx(sizes[name] * 1e6, rel=0.1)
        assert sum(told.values()) <= 150e6
        used = meter.used_bytes()
        assert used is not None
        assert used - before <= 165e6, "the process itself has grown beyond the budget"
    held.close()


def test_given_gpus_then_memory_is_measured_on_those_alone() -> None:
    state = SimulatedState(
        gpus=tuple(SimulatedGpu(uuid=f"GPU-{n}", memory_used_bytes=10**n) for n in range(3)), driver_loaded=True
    )
    assert GpuMemory(["0", "GPU-2"], lambda: SimulatedNvml(lambda: msgspec.json.encode(state))).used_bytes() == 101
    gone = SimulatedState(gpus=(), driver_loaded=False)
    assert GpuMemory(["0"], lambda: SimulatedNvml(lambda: msgspec.json.encode(gone))).used_bytes() is None


def test_given_a_measurement_far_below_the_estimate_then_the_estimate_holds() -> None:
    assert believed_bytes(100, 130) == 130
    assert believed_bytes(100, 60) == 60
    assert believed_bytes(100, 10) == believed_bytes(100, None) == believed_bytes(100, -5) == 100
    assert believed_bytes(0, 70) == 70


RESIDENTS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2), st.booleans(), st.booleans()), max_size=8).map(
    lambda rows: [Resident(f"m{n}", size, users, keeps, busy) for n, (size, users, keeps, busy) in enumerate(rows)]
)


@settings(max_examples=300, deadline=None)
@given(residents=RESIDENTS, needed=st.integers(0, 120), max_bytes=st.none() | st.integers(0, 300))
def test_given_any_models_then_what_goes_is_idle_oldest_first_and_no_more_than_it_takes(
    residents: list[Resident], needed: int, max_bytes: int | None
) -> None:
    room = make_room(residents, needed, Limits(max_bytes))
    by_name = {one.name: one for one in residents}
    assert all(by_name[name].may_go for name in room.unload)
    assert list(room.unload) == [one.name for one in residents if one.name in room.unload]
    left = sum(one.num_bytes for one in residents if one.name not in room.unload)
    if max_bytes is None:
        assert room.enough
        assert not room.unload
        return
    assert room.enough == (left + needed <= max_bytes)
    if room.unload:
        assert left + by_name[room.unload[-1]].num_bytes + needed > max_bytes, "one too many went"
    if not room.enough and room.may_come:
        assert all(not one.may_go or not one.num_bytes for one in residents if one.name not in room.unload)
    assert room.may_come == (sum(one.num_bytes for one in residents if one.keeps) + needed <= max_bytes)
