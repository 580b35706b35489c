"""Plans for six recorded situations, against rules of what is sensible that know nothing of how plans are made."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
from tests.advice_support import RECORDED, RECORDINGS, llama, recorded

from muai_config import Settings
from muai_config.runtime import reloadable_values
from muai_producers.advice.architecture import architecture_of
from muai_producers.advice.bottlenecks import bottlenecks
from muai_producers.advice.engine import plan_of
from muai_producers.advice.records import OptimizationPlan
from muai_producers.advice.situation import Situation
from muai_producers.advice.vllm_metrics import ScrapeError, read_metrics

RANGE = re.compile(
    r"(?:(\d+)-)?(\d+)% (memory reduction|latency reduction|throughput increase)(?: of [a-z ]+)? \((.{20,})\)", re.S
)


def plan_for(name: str) -> OptimizationPlan:
    return plan_of(RECORDINGS[name].situation(), "2026-11-25T00:00:00Z")


def changes(plan: OptimizationPlan) -> dict[str, Any]:
    return {change.parameter: change.recommended_value for one in plan.optimizations for change in one.config_changes}


def kinds(name: str) -> set[str]:
    return {one.kind for one in bottlenecks(RECORDINGS[name].situation())}


@pytest.mark.parametrize("name", RECORDINGS)
def test_any_plan_has_changes_that_change_something_and_ranges_that_say_where_they_come_from(name: str) -> None:
    plan = plan_for(name)
    assert plan.priority_order == [f"{one.type.value}_{index}" for index, one in enumerate(plan.optimizations)]
    for one in plan.optimizations:
        assert one.config_changes
        assert all(change.current_value != change.recommended_value for change in one.config_changes)
        for told in one.estimated_improvement.split("; "):
            found = RANGE.match(told) or RANGE.match(one.estimated_improvement)
            assert found, told
            assert re.search(r"\d", found[4]), "no figure in the reason"


def test_no_two_situations_get_the_same_plan() -> None:
    plans = {name: (changes(plan_for(name)), plan_for(name).estimated_total_improvement) for name in RECORDINGS}
    for (one, first), (other, second) in itertools.combinations(plans.items(), 2):
        assert first != second, (one, other)


def test_under_memory_pressure_the_first_advice_saves_memory_and_nothing_asks_for_more() -> None:
    assert "memory_pressure" in kinds("memory pressure")
    plan = plan_for("memory pressure")
    assert plan.optimizations[0].type.value in ("kv_cache", "quantization")
    assert "memory reduction" in plan.optimizations[0].estimated_improvement
    assert changes(plan)["kv_cache_dtype"] == "fp8"
    assert changes(plan).get("max_num_seqs", 0) < 64


def test_an_idle_gpu_gets_no_larger_batches_and_no_quantization_but_may_give_memory_back() -> None:
    assert kinds("idle GPU") == {"low_utilization"}
    plan = plan_for("idle GPU")
    assert {one.type.value for one in plan.optimizations} <= {"kv_cache"}
    reserved = 32768 * llama().kv_per_token * 2
    assert changes(plan)["kv_cache_memory_bytes"] < reserved
    # 8192 tokens, the longest request, are more than eight times the 327 that are held.
    assert changes(plan)["kv_cache_memory_bytes"] == 8192 * llama().kv_per_token * 2


def test_a_long_queue_gets_more_requests_at_once_as_far_as_there_is_room() -> None:
    assert "queueing" in kinds("long queue")
    plan = plan_for("long queue")
    assert changes(plan)["max_num_seqs"] == 32
    assert 32 * (400 + 200) <= 32768
    assert plan.batching_config is not None
    assert plan.batching_config.max_batch_size == 32
    assert "throughput increase" in plan.estimated_total_improvement


def test_short_prompts_get_nothing_for_their_caches_and_a_larger_gain_than_long_ones() -> None:
    plan = plan_for("short prompts")
    assert "kv_cache" not in {one.type.value for one in plan.optimizations}
    assert "cache_inefficiency" not in kinds("short prompts")

    def gain(name: str) -> int:
        told = next(one for one in plan_for(name).optimizations if one.type.value == "batching")
        found = RANGE.match(told.estimated_improvement)
        assert found
        return int(found[2])

    assert gain("short prompts") > gain("long queue")


def test_what_is_quantized_already_is_not_quantized_again() -> None:
    plan = plan_for("quantized already")
    assert plan.quantization_config is None
    assert "quantization" not in changes(plan)
    assert plan_for("long queue").quantization_config is not None
    by_name = dataclasses.replace(RECORDINGS["empty configuration"].situation(), model="Qwen/Qwen3-8B-AWQ")
    assert plan_of(by_name, "").quantization_config is None


def test_an_empty_configuration_takes_the_limit_from_what_runs_while_others_wait() -> None:
    plan = plan_for("empty configuration")
    assert changes(plan)["max_num_seqs"] == 32
    [change] = [one for opt in plan.optimizations for one in opt.config_changes if one.parameter == "max_num_seqs"]
    assert change.current_value is None


def test_where_nothing_was_measured_the_plan_says_so_and_claims_no_least_gain() -> None:
    config = {"max_batch_size": 32, "quantization": "none", "max_model_len": 4096}
    situation = Situation("localhost:8000", "vllm", False, "vllm", config=config, unmeasured="nobody is there")
    plan = plan_of(situation, "")
    assert {one.type.value for one in plan.optimizations} == {"quantization", "batching"}
    assert changes(plan) == {"quantization": "int8", "max_batch_size": 64}
    assert "nothing was measured: nobody is there" in plan.estimated_total_improvement
    for one in plan.optimizations:
        assert all(told.startswith("0-") for told in re.findall(r"(?:^|; )(\d[\d-]*%)", one.estimated_improvement))


def test_where_nothing_is_known_nothing_is_claimed() -> None:
    plan = plan_of(Situation("localhost:8000", "vllm", False, "vllm", unmeasured="nobody is there"), "")
    assert plan.optimizations == []
    assert plan.estimated_total_improvement == "none can be claimed; nothing was measured: nobody is there"


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_that_are_published() -> None:
    found = llama()
    assert abs(found.num_parameters - 8.03e9) < 0.01 * 8.03e9
    assert found.kv_per_token * 2 == 131072
    minilm = architecture_of(
        {
            "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512,
        }
    )  # fmt: skip
    assert minilm is not None
    assert abs(minilm.num_parameters - 22.7e6) < 0.02 * 22.7e6


@pytest.mark.parametrize("config", [{}, {"hidden_size": "x"}, {"hidden_size": 8, "num_hidden_layers": True}])
def test_a_file_that_lacks_sizes_tells_none(config: dict[str, Any]) -> None:
    assert architecture_of(config) is None


# -- what vLLM says ---------------------------------------------------------------------------------------------------


def test_the_recorded_page_of_a_real_server_is_read() -> None:
    found = read_metrics(RECORDED.read_text())
    assert found.model == "tiny"
    assert found.values["generated"] == 231
    assert (found.values["prefix_queries"], found.values["prefix_hits"]) == (324, 96)
    assert found.values["succeeded"] == 12
    assert (found.values["running"], found.values["waiting"], found.values["kv_used_share"]) == (0, 0, 0)
    assert found.mean("prompt_tokens") == 27
    assert found.mean("wait_s") == pytest.approx(0.000399424 / 12)
    assert found.mean("first_token_s") == pytest.approx(0.3396213 / 12)
    situation = RECORDINGS["idle GPU"].situation()
    assert situation.kv_capacity_tokens == 32768
    tiny = dataclasses.replace(RECORDINGS["idle GPU"], text=RECORDED.read_text(), config={}).situation()
    assert tiny.kv_bytes_per_token == 2048, "measured: 67108864 bytes for 32768 tokens"
    assert tiny.prefix_hit_share == pytest.approx(96 / 324)
    assert tiny.mean_batch == 1.0


def test_several_engines_behind_one_server_are_added_and_the_fullest_cache_counts() -> None:
    page = (
        '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0",model_name="a"} 3\n'
        'vllm:num_requests_running{engine="1",model_name="a"} 4\n'
        'vllm:num_requests_running{engine="0",model_name="b"} 9\n'
        '# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.2\n'
        'vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.7\n'
        '# TYPE vllm:generation_tokens counter\nvllm:generation_tokens_total{engine="0",model_name="a"} 5\n'
    )
    found = read_metrics(page)
    assert (found.model, found.values["running"], found.values["kv_used_share"]) == ("a", 7, 0.7)
    assert read_metrics(page, "b").values["running"] == 9


@pytest.mark.parametrize("page", ["", "hello", "vllm:x{", "up 1\n", "vllm:num_requests_running{} abc\n"])
def test_a_page_that_is_none_of_vllms_is_refused_with_the_reason(page: str) -> None:
    with pytest.raises(ScrapeError, match="/metrics"):
        read_metrics(page)


def test_names_of_before_are_known() -> None:
    page = recorded().replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    assert read_metrics(page.replace('model_name="tiny"} 0.0', 'model_name="tiny"} 0.5')).values["kv_used_share"] == 0.5


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(**figures: Any) -> Situation:
    """A queue before full batches of eight."""
    base: dict[str, Any] = {
        "config": {**reloadable_values(Settings()), "optimization.batcher.max_batch_size": 8},
        "source": "a test",
        "requests": 1000.0,
        "wait_ms": 200.0,
        "batching_ms": 10.0,
        "inference_ms": 20.0,
        "total_ms": 220.0,
        "mean_batch": 8.0,
        "p95_batch": 8.0,
        "busy_share": 1.0,
        "per_request_ms": 1.0,
        "per_batch_ms": 12.0,
        "prompt_tokens": 20.0,
    }
    return Situation("m", "muai", True, "pytorch", model="m", device="cpu", **{**base, **figures})


def test_full_batches_before_a_queue_grow_by_what_was_fitted() -> None:
    [one] = plan_of(ours(), "").optimizations
    assert {change.parameter: change.recommended_value for change in one.config_changes} == {
        "optimization.batcher.max_batch_size": 16
    }
    # 8/(8 + 12) = 0.4 for each ms; 12/24 = 0.5: 25 % more; 16/28 = 0.571: 43 % more.
    assert one.estimated_improvement.startswith("25-43% throughput increase")
    assert one.expected_impact.value == "high"


@pytest.mark.parametrize(
    "figures",
    [
        {"per_request_ms": 5.0, "per_batch_ms": 0.0},  # nothing is shared in a batch
        {"p95_batch": 4.0, "mean_batch": 3.0},  # batches are not full: something else holds them up
        {"memory_percent": 95.0},
        {"wait_ms": 5.0, "total_ms": 25.0},
    ],
)
def test_batches_do_not_grow_where_that_would_not_help(figures: dict[str, Any]) -> None:
    assert plan_of(ours(**figures), "").batching_config is None


def test_a_latency_target_and_a_cap_of_tokens_bound_the_size() -> None:
    config = {**ours().config, "optimization.batcher.latency_target_ms": 23.0}
    assert changes(plan_of(ours(config=config), "")) == {"optimization.batcher.max_batch_size": 11}
    config = {**ours().config, "optimization.batcher.max_batch_tokens": 200}
    assert changes(plan_of(ours(config=config), "")) == {"optimization.batcher.max_batch_size": 10}


def test_padding_makes_batches_smaller_unless_what_each_costs_would_eat_it_up() -> None:
    padded = {"padding_waste": 0.6, "wait_ms": 5.0, "total_ms": 25.0, "per_batch_ms": 0.5, "per_request_ms": 2.0}
    plan = plan_of(ours(**padded), "")
    assert changes(plan) == {"optimization.batcher.max_batch_size": 4}
    assert plan_of(ours(**{**padded, "per_batch_ms": 20.0}), "").optimizations == []


def test_waiting_for_others_before_an_idle_engine_ends() -> None:
    config = {**ours().config, "optimization.batcher.adaptive_batching": False}
    idle = ours(
        config=config, busy_share=0.1, wait_ms=42.0, batching_ms=40.0, total_ms=62.0, mean_batch=1.2, p95_batch=2
    )
    [one] = plan_of(idle, "").optimizations
    assert one.config_changes[0].recommended_value is True
    # 40 of 62 ms; a slot is idle nine tenths of the time.
    assert one.estimated_improvement.startswith("58-65% latency reduction")


def test_onnx_on_a_cpu_is_advised_8_bit_integers_before_a_queue() -> None:
    config = {**ours().config, "optimization.onnx.enable_quantization": False}
    plan = plan_of(dataclasses.replace(ours(config=config), engine="onnx"), "")
    assert changes(plan)["optimization.onnx.enable_quantization"] is True
    assert plan.quantization_config is not None
    assert plan.quantization_config.method.value == "int8"


def test_conversations_get_less_room_in_a_full_memory_and_more_in_an_empty_one() -> None:
    full = ours(memory_percent=95.0, kept_bytes=4e9, memory_total_bytes=16e9, lookups=100.0, evictions=0.0)
    assert changes(plan_of(full, ""))["optimization.cache.max_memory_mb"] == 2000
    calm = {"wait_ms": 5.0, "total_ms": 25.0}
    lost = ours(**calm, memory_percent=40.0, lookups=100.0, evictions=50.0)
    assert changes(plan_of(lost, ""))["optimization.cache.max_memory_mb"] == 8192
    assert plan_of(ours(**calm), "").estimated_total_improvement == "none: nothing holds the instance up"
