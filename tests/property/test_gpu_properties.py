"""The specification's properties 40 to 43: models over several GPUs, load among them, GPUs that fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import models

from muai_batching.transport.restraint import LONGEST_S, Restraint
from muai_config import build_settings
from muai_workers.cli import worker as worker_cli
from muai_workers.cli.gpus import group_gpus, group_size, with_tensor_parallel
from muai_workers.engines.vllm_plan import plan_vllm
from muai_workers.gpus.nvml import GpuReader, NoDriverError, Vitals
from muai_workers.gpus.simulated import SimulatedGpu, SimulatedNvml, SimulatedState
from muai_workers.gpus.verdict import GpuCase, Rules, WorkerLook, next_case, next_effort, unseen
from muai_workers.gpus.xids import APPLICATION, HARDWARE
from muai_workers.up.plan import gpu_worker_specs

RULES = Rules(hang_s=30.0, load_hang_s=90.0, quarantine_s=60.0)
SIZES = st.integers(1, 8)


# Property 40: Tensor parallelism is supported on multi-GPU
@pytest.mark.property(40)
@settings(max_examples=100, deadline=None)
@given(size=SIZES, num_groups=st.integers(1, 8), engine=st.sampled_from(["vllm", "deepspeed"]))
def test_given_gpus_and_a_tensor_parallel_size_then_each_process_has_so_many_and_each_gpu_one_process(
    size: int, num_groups: int, engine: str
) -> None:
    chosen = with_tensor_parallel(build_settings({}, {}), engine, size)
    gpus = tuple(str(number) for number in range(size * num_groups))
    groups = group_gpus(gpus, group_size(chosen, engine))
    specs = gpu_worker_specs(engine, groups, None, {"--tensor-parallel": size}, log_level="INFO")
    pinned = [spec.variables["CUDA_VISIBLE_DEVICES"].split(",") for spec in specs]
    assert [len(group) for group in pinned] == [size] * num_groups
    assert [gpu for group in pinned for gpu in group] == list(gpus)
    assert len({spec.name for spec in specs}) == num_groups
    for spec in specs:
        assert spec.command[-2:] == ("--tensor-parallel", str(size))
    if engine == "vllm":
        spec = models.model_spec("m", "text-generation", "folder:/nowhere")
        plan = plan_vllm(spec, Path("/nowhere"), chosen, "cuda")
        assert plan.arguments["tensor_parallel_size"] == plan.num_ranks == size
    else:
        assert chosen.optimization.deepspeed.tensor_parallel == size


@pytest.mark.property(40)
@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 8), engine=st.sampled_from(["onnx", "pytorch", "fake"]))
def test_given_an_engine_that_does_not_share_models_then_tensor_parallel_is_refused_with_the_way_out(
    size: int, engine: str
) -> None:
    result = CliRunner().invoke(worker_cli.worker, ["--engine", engine, "--tensor-parallel", str(size)])
    assert result.exit_code == 2
    assert "vllm and deepspeed" in " ".join(result.output.split())


# Property 41: Pipeline parallelism is supported on multi-GPU
@pytest.mark.property(41)
@settings(max_examples=100, deadline=None)
@given(tensor=st.integers(1, 4), stages=st.integers(1, 4), num_groups=st.integers(1, 4), spare=st.integers(0, 15))
def test_given_pipeline_stages_then_a_process_has_a_gpu_for_every_part_of_every_stage(
    tensor: int, stages: int, num_groups: int, spare: int
) -> None:
    configured = build_settings({"optimization": {"vllm": {"pipeline_parallel_size": stages}}}, {})
    chosen = with_tensor_parallel(configured, "vllm", tensor)
    per_process = group_size(chosen, "vllm")
    plan = plan_vllm(models.model_spec("m", "text-generation", "folder:/nowhere"), Path("/nowhere"), chosen, "cuda")
    assert per_process == plan.num_ranks == tensor * stages
    assert plan.arguments["pipeline_parallel_size"] == stages
    gpus = [str(number) for number in range(per_process * num_groups + spare % per_process)]
    if spare % per_process:
        with pytest.raises(ValueError, match=f"groups of {per_process}"):
            group_gpus(gpus, per_process)
    else:
        assert [gpu for group in group_gpus(gpus, per_process) for gpu in group] == gpus


# Property 42: Load is balanced across GPUs
@dataclass
class Hands:
    """A worker: what it holds, and how it decides."""

    restraint: Restraint
    held: int


@pytest.mark.property(42)
@settings(max_examples=200, deadline=None)
@given(
    at_work=st.integers(1, 16),
    took_s=st.floats(0.05, 600.0),
    shares=st.lists(st.integers(0, 32), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_given_workers_with_more_and_less_to_do_then_the_one_with_least_takes_the_next_batch(
    at_work: int, took_s: float, shares: list[int], order: object
) -> None:
    workers = []
    for held in shares:
        restraint = Restraint(at_work)
        restraint.took(took_s)
        workers.append(Hands(restraint, min(held, 2 * at_work - 1)))
    order.shuffle(workers)  # type: ignore[attr-defined]
    # Each hears of the batch at once, and asks again when its patience is over; time passes from one to the next.
    asks = [(0.0, index) for index in range(len(workers))]
    taker = None
    while taker is None:
        now_s, index = asks.pop(0)
        one = workers[index]
        if one.restraint.may_take(one.held, 2 * at_work - one.held, now_s):
            taker = one
        else:
            asks = sorted([*asks, (now_s + one.restraint.rest_s(now_s), index)])
        assert now_s <= LONGEST_S
    assert min(at_work, taker.held) == min(min(at_work, one.held) for one in workers)


@pytest.mark.property(42)
@settings(max_examples=100, deadline=None)
@given(
    num_workers=st.integers(1, 6),
    durations_s=st.lists(st.floats(0.03, 2.0), min_size=1, max_size=30),
    gaps_s=st.lists(st.floats(0.0, 0.5), min_size=30, max_size=30),
)
def test_given_batches_that_come_over_time_then_no_gpu_stands_idle_while_one_waits_behind_another(
    num_workers: int, durations_s: list[float], gaps_s: list[float]
) -> None:
    fleet = SimulatedFleet(num_workers)
    now_s = 0.0
    for gap_s, duration_s in zip(gaps_s, durations_s, strict=False):
        now_s += gap_s
        fleet.put(now_s, duration_s)
    fleet.run()
    assert fleet.num_done == len(durations_s)
    assert fleet.num_passed_over == 0


class SimulatedFleet:
    """Workers of one slot that hold one batch ready, on one queue; events in the order of time."""

    def __init__(self, number: int) -> None:
        self.free = [Restraint(1) for _ in range(number)]
        self.holds: list[list[float]] = [[] for _ in range(number)]
        self.ends_s: list[float] = [0.0] * number
        self.queue: list[tuple[float, float]] = []
        """When each batch came, and how long it takes."""
        self.waits_since_s: dict[int, float] = {}
        self.events: list[tuple[float, int, str, float, int]] = []
        self.num_done = 0
        self.num_passed_over = 0
        """Workers that had nothing to do when one that had took a batch. A batch that comes while a wait for an earlier
        one is nearly over may go to either.
        """
        for restraint in self.free:
            restraint.took(10.0)

    def put(self, now_s: float, duration_s: float) -> None:
        self._at(now_s, "put", duration_s, 0)

    def _at(self, when_s: float, kind: str, value: float, worker: int) -> None:
        self.events.append((when_s, len(self.events), kind, value, worker))

    def run(self) -> None:
        while self.events:
            self.events.sort()
            now_s, _, kind, value, worker = self.events.pop(0)
            if kind == "put":
                self.queue.append((now_s, value))
                for each in range(len(self.free)):
                    self._ask(each, now_s)
            elif kind == "end":
                self.num_done += 1
                self.holds[worker].pop(0)
                if self.holds[worker]:
                    self._begin(worker, now_s)
                self._ask(worker, now_s)
            else:
                self._ask(worker, now_s)

    def _ask(self, worker: int, now_s: float) -> None:
        held, restraint = self.holds[worker], self.free[worker]
        if len(held) == 2:
            return
        taken = restraint.may_take(len(held), 2 - len(held), now_s)
        if not taken:
            self.waits_since_s.setdefault(worker, now_s)
            self._at(now_s + restraint.rest_s(now_s), "ask", 0.0, worker)
            return
        waited_since_s = self.waits_since_s.pop(worker, now_s)
        if held and self.queue and waited_since_s >= self.queue[0][0]:
            self.num_passed_over += sum(not other for other in self.holds)
        was_idle = not held
        for _ in range(min(taken, len(self.queue))):
            held.append(self.queue.pop(0)[1])
        if was_idle and held:
            self._begin(worker, now_s)
        if self.queue:
            self._ask(worker, now_s)

    def _begin(self, worker: int, now_s: float) -> None:
        self._at(now_s + self.holds[worker][0], "end", 0.0, worker)


# Property 43: GPU failures are detected
FAILURES = st.one_of(
    st.sampled_from(sorted(HARDWARE)).map(lambda xid: {"xids": (xid,)}),
    st.just({"lost": True}),
    st.just({"rows_failed": True}),
    st.just({"ecc_uncorrected": 1}),
    st.sampled_from([1, 2, 4]).map(lambda action: {"recovery_action": action}),
    st.integers(94, 120).map(lambda degrees: {"temperature_c": degrees}),
)


class Watched:
    """Simulated GPUs, and the case of each as one look follows another."""

    def __init__(self, number: int) -> None:
        self.gpus = [SimulatedGpu(uuid=f"GPU-{index}") for index in range(number)]
        self.driver_loaded = True
        self.reader = GpuReader([str(index) for index in range(number)], lambda: SimulatedNvml(self._state))
        self.cases = [GpuCase() for _ in range(number)]
        self.now_s = 0.0
        self.look(0.0)

    def _state(self) -> bytes:
        return msgspec.json.encode(SimulatedState(gpus=tuple(self.gpus), driver_loaded=self.driver_loaded))

    def look(self, after_s: float) -> None:
        self.now_s += after_s
        try:
            vitals = self.reader.read()
        except NoDriverError as error:
            self.cases = [unseen(case, str(error)) for case in self.cases]
            return
        self.cases = [
            next_case(case, told, None, RULES, self.now_s) for case, told in zip(self.cases, vitals, strict=True)
        ]

    def change(self, index: int, **fields: object) -> None:
        self.gpus[index] = msgspec.structs.replace(self.gpus[index], **fields)


@pytest.mark.property(43)
@settings(max_examples=150, deadline=None)
@given(number=st.integers(1, 4), which=st.integers(0, 3), failure=FAILURES)
def test_given_any_failure_then_the_next_look_tells_it_of_that_gpu_alone_and_it_comes_back_when_it_is_well(
    number: int, which: int, failure: dict[str, object]
) -> None:
    which %= number
    watched = Watched(number)
    assert [case.state for case in watched.cases] == ["ok"] * number
    watched.change(which, **failure)
    watched.look(2.0)
    assert watched.cases[which].state == "failed"
    assert watched.cases[which].reason
    if "xids" in failure:
        assert watched.cases[which].last_xid == failure["xids"][0]  # type: ignore[index]
    assert [case.state for index, case in enumerate(watched.cases) if index != which] == ["ok"] * (number - 1)
    watched.change(which, lost=False, rows_failed=False, recovery_action=0, temperature_c=40, ecc_uncorrected=0)
    watched.look(RULES.quarantine_s - 0.1)
    assert watched.cases[which].state == "failed", "a moment of health is not enough"
    watched.look(0.2)
    assert watched.cases[which].state == "ok"


@pytest.mark.property(43)
@settings(max_examples=100, deadline=None)
@given(xids=st.lists(st.sampled_from(sorted(APPLICATION)), max_size=20), unknown=st.integers(200, 999))
def test_given_errors_of_applications_then_the_gpu_stays_in_use_and_the_last_is_told(
    xids: list[int], unknown: int
) -> None:
    watched = Watched(1)
    for xid in [*xids, unknown]:
        watched.change(0, xids=(*watched.gpus[0].xids, xid))
        watched.look(1.0)
        assert (watched.cases[0].state, watched.cases[0].last_xid) == ("ok", xid)


@pytest.mark.property(43)
@settings(max_examples=100, deadline=None)
@given(pauses_s=st.lists(st.floats(0.0, 600.0), min_size=1, max_size=12))
def test_given_failures_that_follow_each_other_then_each_keeps_the_gpu_out_for_longer(pauses_s: list[float]) -> None:
    watched = Watched(1)
    before_s = 0.0
    for number, pause_s in enumerate(pauses_s):
        watched.change(0, xids=(*watched.gpus[0].xids, 79))
        watched.look(1.0)
        quarantine_s = watched.cases[0].quarantine_s(RULES)
        assert quarantine_s == min(3600.0, 60.0 * 2**number)
        assert quarantine_s >= before_s
        before_s = quarantine_s
        watched.look(quarantine_s)
        assert watched.cases[0].state == "ok"
        watched.look(pause_s)


@pytest.mark.property(43)
@settings(max_examples=150, deadline=None)
@given(
    looks=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([None, 0.0, 50.0]), st.floats(0.1, 20.0)),
        min_size=1,
        max_size=40,
    )
)
def test_given_any_course_of_work_then_a_gpu_hangs_when_nothing_moved_for_the_time_and_not_before(
    looks: list[tuple[int, int, float | None, float]],
) -> None:
    effort, case, now_s, still_since_s = None, GpuCase(), 0.0, 0.0
    progress, before = 0, None
    for in_flight, answered, utilization, after_s in looks:
        now_s += after_s
        progress += answered
        look = WorkerLook(1, in_flight, progress)
        seen = (in_flight > 0, progress, utilization)
        if seen != before or not in_flight:
            still_since_s = now_s
        before = seen
        vitals = Vitals(gpu="0", utilization_percent=utilization)
        effort = next_effort(effort, look, vitals, now_s)
        assert effort is not None
        case = next_case(GpuCase(), vitals, effort.hang(RULES, now_s), RULES, now_s)
        hangs = in_flight > 0 and now_s - still_since_s >= RULES.hang_s
        assert (case.state == "failed") == hangs
        assert ("hangs" in case.reason) == hangs


@pytest.mark.property(43)
@settings(max_examples=150, deadline=None)
@given(
    looks=st.lists(
        st.tuples(st.sampled_from([(), ("a",), ("a", "b")]), st.sampled_from([None, 0, 10]), st.floats(0.1, 60.0)),
        min_size=1,
        max_size=40,
    )
)
def test_given_any_course_of_loading_then_a_gpu_hangs_when_its_memory_did_not_move_for_the_time_of_loads(
    looks: list[tuple[tuple[str, ...], int | None, float]],
) -> None:
    effort, now_s, still_since_s = None, 0.0, 0.0
    before = None
    for loading, memory, after_s in looks:
        now_s += after_s
        vitals = Vitals(gpu="0", utilization_percent=0.0, memory_used_bytes=memory)
        seen = (loading, memory)
        if seen != before or not loading:
            still_since_s = now_s
        before = seen
        effort = next_effort(effort, WorkerLook(1, 0, 0, loading), vitals, now_s)
        assert effort is not None
        case = next_case(GpuCase(), vitals, effort.hang(RULES, now_s), RULES, now_s)
        assert (case.state == "failed") == (bool(loading) and now_s - still_since_s >= RULES.load_hang_s)
        assert case.state == "ok" or f"was loading {', '.join(loading)}" in case.reason


@pytest.mark.property(43)
@settings(max_examples=50, deadline=None)
@given(failed=st.booleans(), away=st.integers(1, 5))
def test_given_no_driver_then_a_gpu_is_unseen_and_one_that_had_failed_stays_failed(failed: bool, away: int) -> None:
    watched = Watched(2)
    if failed:
        watched.change(0, lost=True)
        watched.look(1.0)
    watched.driver_loaded = False
    for _ in range(away):
        watched.look(1.0)
    assert [case.state for case in watched.cases] == ["failed" if failed else "unseen", "unseen"]
    watched.driver_loaded = True
    watched.look(1.0)
    assert watched.cases[1].state == "ok"
