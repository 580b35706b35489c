"""Advice for any situation at all: a plan that holds together, in bounds, and that contradicts nothing it was told."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.advice_support import RECORDED, llama, recorded

from muai_config import Settings
from muai_config.errors import Source
from muai_config.runtime import overlaid, reloadable_values
from muai_producers.advice.applying import split
from muai_producers.advice.bottlenecks import bottlenecks
from muai_producers.advice.engine import plan_of
from muai_producers.advice.estimates import GAINS, Estimate, told, total
from muai_producers.advice.records import ApplyRequest, OptimizationPlan
from muai_producers.advice.situation import Situation
from muai_producers.advice.vllm_metrics import ScrapeError, read_metrics, with_scrape

MANY = settings(max_examples=100, deadline=None)
SOME = settings(max_examples=40, deadline=None)
COUNTS = ("requests", "running", "waiting", "preemptions", "evictions", "lookups", "kept_bytes", "memory_total_bytes")
SIZES = ("mean_batch", "p95_batch", "tokens_per_step", "prompt_tokens", "output_tokens", "kv_capacity_tokens")
TIMES = (
    *("wait_ms", "batching_ms", "prefill_ms", "decode_ms", "inference_ms", "total_ms", "per_request_ms"),
    "per_batch_ms",
)
SHARES = ("busy_share", "padding_waste", "kv_used_share", "prefix_hit_share")
START = Settings()
SIZE = "optimization.batcher.max_batch_size"


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


@st.composite
def situations(draw: st.DrawFn, *, ours: bool) -> Situation:
    """Figures that need not fit together: what monitoring says while it is half there."""
    values: dict[str, Any] = {name: draw(maybe(st.floats(0, 1e12))) for name in COUNTS}
    values |= {name: draw(maybe(st.floats(0, 1e6))) for name in SIZES}
    values |= {name: draw(maybe(st.floats(0, 1e7))) for name in TIMES}
    values |= {name: draw(maybe(st.floats(0, 1))) for name in SHARES}
    values |= {name: draw(maybe(st.floats(0, 100))) for name in ("memory_percent", "utilization_percent")}
    values["prefix_caching"] = draw(maybe(st.booleans()))
    values["device"] = draw(st.sampled_from(["", "cpu", "cuda"]))
    values["architecture"] = draw(st.sampled_from([None, llama()]))
    values["source"] = draw(st.sampled_from(["", "a test"]))
    if ours:
        size = draw(st.integers(1, 4096))
        target = draw(maybe(st.floats(0.1, 1e6)))
        adaptive = draw(st.booleans())
        changed = {SIZE: size, "optimization.batcher.latency_target_ms": target}
        changed["optimization.batcher.adaptive_batching"] = adaptive
        config = reloadable_values(overlaid(START, changed, Source("runtime")))
        config["optimization.onnx.enable_quantization"] = draw(st.booleans())
        return Situation("m", "muai", True, draw(st.sampled_from(["vllm", "onnx", "pytorch"])), config=config, **values)
    keys = {"max_num_seqs": st.integers(1, 5000), "max_batch_size": st.integers(1, 5000)}
    keys |= {"quantization": st.sampled_from(["none", "awq", "fp8", None]), "max_model_len": st.integers(1, 200_000)}
    keys |= {"kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16"]), "dtype": st.sampled_from(["auto", "fp32"])}
    config = draw(st.fixed_dictionaries({}, optional=keys))
    return Situation("localhost:8000", "vllm", False, "vllm", config=config, **values)


def check(plan: OptimizationPlan, situation: Situation) -> None:
    names = [f"{one.type.value}_{index}" for index, one in enumerate(plan.optimizations)]
    assert plan.priority_order == names
    parameters = [change.parameter for one in plan.optimizations for change in one.config_changes]
    assert len(parameters) == len(set(parameters)), "two of its changes are of one parameter"
    for one in plan.optimizations:
        assert one.config_changes
        assert one.estimated_improvement
        assert all(change.current_value != change.recommended_value for change in one.config_changes)
    again = msgspec.json.decode(msgspec.json.encode(plan), type=OptimizationPlan)
    assert again == plan, "it cannot be given back to be applied"
    if situation.quantization:
        assert plan.quantization_config is None
    kinds = {one.kind for one in bottlenecks(situation)}
    limits = [
        one.recommended_value for opt in plan.optimizations for one in opt.config_changes if one.parameter == SIZE
    ]
    if "memory_pressure" in kinds:
        assert all(size <= situation.config[SIZE] for size in limits)


@MANY
@given(situations(ours=True))
def test_given_any_situation_of_ours_then_what_is_reloadable_of_its_plan_is_allowed(situation: Situation) -> None:
    plan = plan_of(situation, "")
    check(plan, situation)
    values, others = split(ApplyRequest(plan=plan))
    overlaid(START, values, Source("runtime"))
    assert all(not one.parameter.startswith("optimization.batcher") for one in others)
    target = situation.config["optimization.batcher.latency_target_ms"]
    a, b = situation.per_request_ms, situation.per_batch_ms
    if SIZE in values and values[SIZE] > situation.config[SIZE] and target is not None and a is not None:
        assert a * values[SIZE] + (b or 0.0) <= target * 1.000001


@MANY
@given(situations(ours=False))
def test_given_any_situation_of_a_server_then_its_plan_holds_together(situation: Situation) -> None:
    plan = plan_of(situation, "")
    check(plan, situation)
    capacity, context = situation.kv_capacity_tokens, situation.context_tokens
    size = plan.batching_config.max_batch_size if plan.batching_config else None
    if size is not None and capacity is not None and context is not None:
        assert size * context[1] <= capacity * 1.000001, "keys and values have no room for that"


@MANY
@given(st.floats(0.1, 1e3), st.floats(0.2, 100), st.integers(2, 512), st.floats(0, 1e6))
def test_given_a_known_curve_then_what_full_batches_really_bring_is_in_the_range(
    per_request_ms: float, shared: float, size: int, wait_ms: float
) -> None:
    per_batch_ms = shared * per_request_ms * size
    inference_ms = per_request_ms * size + per_batch_ms
    config = {**reloadable_values(START), SIZE: size, "optimization.batcher.max_batch_tokens": 100_000_000}
    situation = Situation(
        "m", "muai", True, "pytorch", source="a test", config=config, requests=1000.0, mean_batch=float(size),
        p95_batch=float(size), per_request_ms=per_request_ms, per_batch_ms=per_batch_ms, inference_ms=inference_ms,
        wait_ms=wait_ms + 2 * inference_ms, total_ms=wait_ms + 3 * inference_ms, busy_share=1.0,
    )  # fmt: skip
    plan = plan_of(situation, "")
    [one] = plan.optimizations
    low, _, high = one.estimated_improvement.partition("%")[0].partition("-")
    wanted = one.config_changes[0].recommended_value
    now, then = (n / (per_request_ms * n + per_batch_ms) for n in (size, wanted))
    assert int(low) - 1 <= 100 * (then / now - 1) <= int(high or low) + 1


ESTIMATES = st.builds(
    lambda gain, bounds: Estimate(gain, min(bounds), max(bounds), "a test of 1"),
    st.sampled_from(GAINS),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@MANY
@given(st.lists(ESTIMATES, min_size=1, max_size=6))
def test_given_any_estimates_then_all_together_bring_no_less_than_each_and_no_more_than_there_is(
    estimates: list[Estimate],
) -> None:
    assert told(estimates).count("(a test of 1)") == len(estimates)
    for part in total(estimates).partition(" expected")[0].split(", "):
        numbers, _, what = part.partition("% ")
        low, _, high = numbers.partition("-")
        own = [one for one in estimates if one.what == what]
        assert int(high or low) >= round(100 * max(one.high for one in own)) - 1
        if what != "throughput increase":
            assert int(high or low) <= 100


FIGURES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total")
FIGURES += ("request_prompt_tokens_sum", "request_generation_tokens_count", "e2e_request_latency_seconds_sum")
FIGURES += ("request_decode_time_seconds_sum", "request_queue_time_seconds_sum", "generation_tokens_total")


@SOME
@given(
    st.fixed_dictionaries({}, optional={name: st.floats() for name in FIGURES}),
    st.sampled_from(["None", "0", "-3", "nan", "inf", "1e300", "x", "2048"]),
    st.fixed_dictionaries({}, optional={name: st.integers(-5, 10**30) for name in ("max_num_seqs", "max_model_len")}),
)
def test_given_a_server_that_says_any_figures_then_there_is_a_plan(
    values: dict[str, float], blocks: str, config: dict[str, int]
) -> None:
    page = recorded({"num_gpu_blocks": blocks, "kv_cache_size_tokens": blocks}, **values)
    base = Situation("localhost:8000", "vllm", False, "vllm", config=config)
    situation = with_scrape(base, read_metrics(page), 2e9)
    check(plan_of(dataclasses.replace(situation, architecture=llama()), ""), situation)


@SOME
@given(st.data())
def test_given_a_real_page_with_anything_done_to_it_then_it_is_read_or_refused_in_a_sentence(
    data: st.DataObject,
) -> None:
    text = RECORDED.read_text(encoding="utf-8")
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 2000)))
    broken = text[:at] + data.draw(st.text(max_size=20)) + text[until:]
    try:
        found = read_metrics(broken)
    except ScrapeError as error:
        assert "/metrics" in error.message  # noqa: PT017 - most pages can be read
        return
    situation = with_scrape(Situation("localhost:8000", "vllm", False, "vllm"), found, 2e9)
    plan_of(dataclasses.replace(situation, architecture=llama()), "")
